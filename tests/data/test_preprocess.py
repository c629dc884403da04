"""Preprocessing is one function for preparation and prediction: same bits, invertible, errors with row and column."""

import json
from dataclasses import replace

import numpy as np
import pytest

from hpcmlp.data.cleaning import Policy, check_weights, judge, take
from hpcmlp.data.preprocess import Preprocessor, Report
from hpcmlp.data.tables import Memory, Table
from hpcmlp.data.targets import TargetFacts, Targets, choose_task, class_names, describe_targets
from hpcmlp.errors import DataError

RANDOM = np.random.default_rng(2)


class Text(Table):
    """A table whose NaN means missing."""

    name = "raw.csv"
    nan_is_missing = True


def texts(*values):
    out = np.empty(len(values), object)
    out[:] = values
    return out


def columns_form(**changes):
    made = Preprocessor("columns", ("u", "kind", "v"), {"kind": ("a", "b")}, {"u": 2.5, "kind": "b"},
                        (1.0, 0.0, 0.0, -3.0), (0.5, 1.0, 1.0, 0.1), "float32", False,
                        Targets("regression", ("t",), None, (10.0,), (4.0,)))
    return replace(made, **changes)


def rows_of(n=6):
    kind = texts(*["a", "b", "c"] * 2)[:n]
    return {"v": np.arange(n) * 7.0, "kind": kind, "u": np.arange(n) + 0.1, "other": np.ones(n)}


def test_columns_are_found_by_name_and_one_hot_levels_kept():
    report = Report()
    x = columns_form().transform(rows_of(), report=report)
    assert x.dtype == np.float32 and x.shape == (6, 4)
    np.testing.assert_array_equal(x[:, 1:3], [[1, 0], [0, 1], [0, 0]] * 2)
    np.testing.assert_array_equal(x[:, 0], (((np.arange(6) + 0.1) - 1.0) * 0.5).astype(np.float32))
    assert columns_form().feature_names == ["u", "kind=a", "kind=b", "v"]
    assert report.unknown == {"kind": 2} and "2 values" in report.sentences()[0]


def test_through_json_any_cut_of_the_rows_gives_the_same_bits():
    made = columns_form(shift=(1 / 3, 0.0, 0.0, -np.pi), scale=(np.e, 1.0, 1.0, 1e-7))
    back = Preprocessor.from_dict(json.loads(json.dumps(made.to_dict())))
    assert back == made
    rows = {"u": RANDOM.normal(size=500), "v": RANDOM.normal(size=500), "kind": texts(*(["a", "b"] * 250))}
    rows["u"][::7] = np.nan
    whole = made.transform(rows, Text())
    for cut in (1, 3, 250):
        parts = [back.transform({k: v[i:i + cut] for k, v in rows.items()}, Text()) for i in range(0, 500, cut)]
        assert np.concatenate(parts).tobytes() == whole.tobytes()


def test_the_transform_inverts_to_the_raw_values():
    x = RANDOM.normal(5, 100, (300, 3))
    made = Preprocessor("matrix", ("x0", "x1", "x2"), {}, {}, tuple(x.mean(0).tolist()), tuple((1 / x.std(0)).tolist()),
                        "float32", False, Targets("regression", ("y",), None, (3.0,), (0.25,)))
    z = made.transform({"x": x})
    np.testing.assert_allclose(z.astype(float) / np.array(made.scale) + np.array(made.shift), x, rtol=1e-5, atol=1e-4)
    y = RANDOM.normal(size=300)
    encoded = made.targets({"x": x, "y": y})
    assert encoded.shape == (300, 1) and encoded.dtype == np.float32
    np.testing.assert_allclose(encoded[:, 0].astype(float) * 0.25 + 3.0, y, atol=1e-5)


def test_a_matrix_may_be_given_by_columns_of_its_names_or_in_its_order():
    x = RANDOM.normal(size=(4, 2))
    made = Preprocessor("matrix", ("x0", "x1"), {}, {}, (0.0, 0.0), (1.0, 1.0), "float32", False,
                        Targets("classification", ("y",), ("0", "1")))
    for rows in ({"x": x}, {"x1": x[:, 1], "x0": x[:, 0]}, {"a": x[:, 0], "b": x[:, 1]}):
        assert np.array_equal(made.transform(rows), x.astype(np.float32))
    assert np.array_equal(made.transform(Memory("m", x)), x.astype(np.float32))


def test_pixels_stay_pixels():
    made = Preprocessor("matrix", ("x0", "x1"), {}, {}, (1.0, 1.0), (1.0, 1.0), "uint8", False,
                        Targets("classification", ("y",), ("0", "1")))
    x = np.array([[0, 255], [7, 8]], np.uint8)
    for given in (x, x.astype(float), x.astype(np.int64)):
        got = made.transform({"x": given})
        assert got.dtype == np.uint8 and np.array_equal(got, x)
    for bad in (0.5, -1, 256, np.nan):
        with pytest.raises(DataError, match=f"row 1, column 'x0' is {bad}.*0 to 255"):
            made.transform({"x": np.array([[0, 1], [bad, 1]])})


def broken(**columns):
    return {**rows_of(), **columns}


@pytest.mark.parametrize("rows, words", [
    (broken(u=np.array([1, np.inf, 2, 3, 4, 5])), "row 101, column 'u' is inf"),
    (broken(v=np.array([1, 2, np.nan, 3, 4, 5])), "row 102, column 'v'.*missing"),
    (broken(v=np.array([1, 2, 3, -np.inf, 4, 5])), "row 103, column 'v' is -inf"),
    (broken(u=texts("1", "2", "3", "x9", "5", "6")), "row 103, column 'u': 'x9' is no number"),
    (broken(v=np.full(6, 1e300)), "row 100, column 'v'.*too large"),
    ({"u": np.ones(2), "kind": texts("a", "b")}, "no column 'v'"),
    ({"x": np.ones((2, 3))}, "matrix.*columns by name"), ({"x": np.ones((2, 4))}, "4 columns; the model takes 3")])
def test_what_cannot_be_transformed_is_named(rows, words):
    with pytest.raises(DataError, match=words):
        columns_form().transform(rows, Text(), 100)


def test_missing_values_are_filled_only_where_it_was_so_prepared():
    rows = broken(u=np.array([np.nan, 1, 1, 1, 1, 1.0]), kind=texts(None, "a", "a", "a", "a", "a"))
    report = Report()
    x = columns_form().transform(rows, Text(), report=report)
    assert x[0].tolist() == [0.75, 0, 1, np.float32(0.3)] and report.filled == {"u": 1, "kind": 1}
    with pytest.raises(DataError, match="'u' is nan"):                  # in a binary file NaN went wrong
        columns_form().transform(rows, Table())
    assert columns_form(invalid_is_missing=True).transform(rows, Table())[0, 0] == 0.75
    with pytest.raises(DataError, match="'kind'.*missing"):
        columns_form(fills={"u": 1.0}).transform(rows, Text())


def test_a_damaged_description_is_refused():
    good = columns_form().to_dict()
    for change in ({"version": 2}, {"shift": [1.0]}, {"target": None}, {"extra": 1}):
        with pytest.raises(DataError, match="preprocessing"):
            Preprocessor.from_dict({**good, **change})
    with pytest.raises(DataError, match="preprocessing"):
        Preprocessor.from_dict({})


def test_text_columns_are_those_whose_spelling_counts():
    assert columns_form().text_columns == ("kind",)
    named = columns_form(target=Targets("classification", ("t",), ("no", "yes")))
    assert named.text_columns == ("kind", "t")
    numeric = columns_form(target=Targets("classification", ("t",), ("1", "2")))
    assert numeric.text_columns == ("kind",)


# targets

def facts(*parts):
    return TargetFacts.merged([json.loads(json.dumps(describe_targets(np.asarray(p)).to_list())) for p in parts])


@pytest.mark.parametrize("y, task", [
    ([0, 1, 2] * 5, "classification"), ([0.0, 1.0] * 4, "classification"), ([1.5, 2, 3], "regression"),
    (list(range(1000)), "regression"), ([10**6, 3] * 4, "classification"), (np.eye(3), "multilabel"),
    (np.ones((3, 2)) * 2, "regression")])
def test_targets_suggest_their_task(y, task):
    assert choose_task(facts(y)) == task
    half = len(y) // 2
    assert choose_task(facts(y[:half], y[half:], y[:0])) == task


def test_class_names_are_kept_in_order():
    y = np.array([10.0, 2.0, 3.0, 2.0])
    names = class_names(facts(y[:1], y[1:]), y, Table(), np.arange(4))
    assert names == ("2", "3", "10")
    target = Targets("classification", ("y",), names)
    codes = target.encode(y, Table())
    assert codes.tolist() == [2, 0, 1, 0] and codes.dtype == np.int32
    words = texts("no", "yes", "no")
    assert class_names(facts(words), words, Table(), np.arange(3)) == ("no", "yes")
    assert class_names(facts([-1, 1]), np.array([-1, 1]), Table(), np.arange(2)) == ("-1", "1")
    assert choose_task(facts(words, np.empty(0))) == "classification"


@pytest.mark.parametrize("value, words", [(0.5, "row 12: target is 0.5"), (-1, "row 12: target is -1"),
                                          (np.inf, "row 12: target is inf")])
def test_numbers_that_are_no_classes_are_named(value, words):
    y = np.array([0, 1, value, 2])
    with pytest.raises(DataError, match=words):
        class_names(facts(y), y, Table(), np.arange(10, 14))


@pytest.mark.parametrize("task, y, words", [
    ("classification", np.array([0, 7]), "row 6: target t is '7'; the classes are 0, 1"),
    ("classification", np.array([0, np.nan]), "row 6: target t is missing or NaN"),
    ("classification", texts("0", "x"), "row 6: target t is 'x'"),
    ("classification", np.ones((2, 2)), "2 target columns"),
    ("regression", np.array([0, np.inf]), "row 6: target t is inf; it must be finite"),
    ("regression", texts("1", "x"), "row 6: target 'x' is no number"), ("regression", np.ones((2, 2)), "has 2 targets"),
    ("multilabel", np.array([[0.0], [2.0]]), "row 6: target t is 2; it must be 0 or 1")])
def test_targets_that_do_not_fit_are_named(task, y, words):
    with pytest.raises(DataError, match=words):
        Targets(task, ("t",), ("0", "1") if task == "classification" else None).encode(y, Table(), 5)


# cleaning

def test_the_policies_count_drop_and_refuse():
    rows = {"u": np.array([1, np.nan, np.inf, 4]), "k": texts("a", "b", None, "c"), "t": np.array([0, 1, np.nan, 1])}
    verdict = judge(rows, ("u", "k"), ("t",), Text(), 0, Policy("drop", "drop"))
    assert verdict.keep.tolist() == [True, False, False, True]
    assert (verdict.missing, verdict.invalid, verdict.missing_targets) == ({"u": 1, "k": 1}, {"u": 1}, 1)
    assert take(rows, verdict.keep)["u"].tolist() == [1, 4]
    with pytest.raises(DataError, match="row 32: target t is missing"):
        judge(rows, ("u", "k"), ("t",), Text(), 30, Policy("median", "drop"))
    rows["t"] = np.zeros(4)
    assert judge(rows, ("u", "k"), ("t",), Text(), 0, Policy("median", "missing")).keep.all()
    for policy, words in ((Policy("error", "drop"), "row 31, column 'u'.*missing"),
                          (Policy("median", "error"), "row 32, column 'u' is inf")):
        with pytest.raises(DataError, match=words):
            judge(rows, ("u", "k"), ("t",), Text(), 30, policy)
    matrix = {"x": np.array([[1, 2], [3, np.nan]]), "y": np.zeros(2)}
    with pytest.raises(DataError, match="row 1, column 'b' is nan"):
        judge(matrix, ("a", "b"), ("y",), Table(), 0, Policy())
    assert judge(matrix, ("a", "b"), ("y",), Table(), 0, Policy("median", "drop")).keep.tolist() == [True, False]


def test_weights_are_finite_and_not_negative():
    assert check_weights(np.array([0, 2]), Table(), 0).dtype == np.float32
    for bad in (-1.0, np.nan, np.inf):
        with pytest.raises(DataError, match=f"row 5: the weight is {bad}"):
            check_weights(np.array([1.0, bad]), Table(), 4)


@pytest.mark.parametrize("change", [
    lambda v: v.update(shift=["a"] * 4), lambda v: v.update(scale=[True] * 4), lambda v: v.update(fills=1),
    lambda v: v.update(fills={"u": "text"}), lambda v: v.update(fills={"kind": 1.0}), lambda v: v.update(levels=[1]),
    lambda v: v["levels"].update(kind=[["a"], "b"]), lambda v: v["levels"].update(other=["a"]),
    lambda v: v.update(inputs=["u", 1, "v"]), lambda v: v.update(inputs=["u", "u", "v"]),
    lambda v: v.update(form="rows"), lambda v: v.update(invalid_is_missing=1), lambda v: v.update(x_dtype="float16"),
    lambda v: v["target"].update(classes=[1, 2]), lambda v: v["target"].update(names="y"),
    lambda v: v["target"].update(task="guess"), lambda v: v.update(shift=[float("nan")] * 4)])
def test_a_description_with_values_of_wrong_types_is_refused(change):
    values = json.loads(json.dumps(columns_form().to_dict()))
    assert Preprocessor.from_dict(json.loads(json.dumps(values))) == columns_form()
    change(values)
    with pytest.raises(DataError, match="preprocessing is damaged"):
        Preprocessor.from_dict(values)
