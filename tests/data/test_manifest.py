"""The manifest is read back as written, and anything unsound is one sentence."""

import json
from dataclasses import replace

import pytest

from hpcmlp.data.manifest import Manifest, ShardEntry, read_manifest, write_manifest
from hpcmlp.errors import DataError, InputMissing


def example():
    entry = ShardEntry("train-00000-of-00001.h5", 7, 1234, "0" * 64)
    return Manifest("toy", "classification", 2, "float32", ["a", "b"], {"train": (entry,), "val": ()}, ["no", "yes"],
                    ["y"], {"x": 1}, class_counts={"train": [3, 4]})


def test_a_manifest_is_read_back_as_written(tmp_path):
    write_manifest(tmp_path, example())
    back = read_manifest(tmp_path)
    assert back == example() and back.digest() == example().digest()
    assert (back.rows("train"), back.rows("val"), back.rows("test"), back.num_outputs) == (7, 0, 0, 2)


def test_digests_tell_what_differs():
    one = example()
    other = replace(one, splits={"train": (ShardEntry("train-00000-of-00001.h5", 7, 1234, "1" * 64),)})
    assert one.digest() != other.digest() and one.preprocessing_digest() == other.preprocessing_digest()
    assert one.preprocessing_digest() != replace(one, preprocessing={"x": 2}).preprocessing_digest()


def broken(change):
    values = json.loads(json.dumps(example().to_dict()))
    change(values)
    return json.dumps(values)


BROKEN = {
    "no JSON": ("{", "not a manifest"), "no text": (b"\xff\xfe", "not a manifest"), "deep": ("[" * 100_000, "manifest"),
    "a list": ("[]", "JSON object"), "NaN": ('{"format_version": NaN}', "NaN"),
    "infinity in disguise": ('{"format_version": 1, "name": 1e999}', "1e999 is no number"),
    "hundreds of digits": ('{"format_version": 1, "name": ' + "9" * 400 + "}", "9999... is no number"),
    "thousands of digits": ('{"format_version": 1, "name": ' + "9" * 5000 + "}", "9999... is no number"),
    "doubled key": ('{"name": 1, "name": 2}', "twice"),
    "newer": (lambda v: v.update(format_version=2), "format_version is 2"),
    "true is no version": (lambda v: v.update(format_version=True), "format_version"),
    "key missing": (lambda v: v.pop("task"), "'task'"), "key unknown": (lambda v: v.update(extra=1), "'extra'"),
    "task": (lambda v: v.update(task="guess"), "guess"), "type": (lambda v: v.update(x_dtype="object"), "x_dtype"),
    "width": (lambda v: v.update(num_features=0), "num_features"),
    "names": (lambda v: v.update(feature_names=["a"]), "feature_names has 1"),
    "classes": (lambda v: v.update(classes=None), "classes"), "weights": (lambda v: v.update(weighted=1), "weighted"),
    "shift": (lambda v: v.update(load_shift=[1.0, "2"]), "load_shift"),
    "counts": (lambda v: v.update(class_counts={"train": [-1]}), "class_counts"),
    "split": (lambda v: v["splits"].update(extra=[]), "splits"),
    "path": (lambda v: v["splits"]["train"][0].update(file="../x.h5"), "not a shard"),
    "rows": (lambda v: v["splits"]["train"][0].update(rows=-1), "not a shard"),
    "true is no count": (lambda v: v["splits"]["train"][0].update(rows=True), "not a shard"),
    "digest": (lambda v: v["splits"]["train"][0].update(sha256="0"), "not a shard"),
    "twice": (lambda v: v["splits"]["train"].append(v["splits"]["train"][0]), "twice"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_manifest_is_one_sentence(tmp_path, case):
    content, words = BROKEN[case]
    content = broken(content) if callable(content) else content
    (tmp_path / "dataset.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=words) as error:
        read_manifest(tmp_path)
    assert "dataset.json" in str(error.value) and "\n" not in str(error.value)


def test_a_directory_without_a_manifest_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "nothere"):
        with pytest.raises(InputMissing, match=str(path)):
            read_manifest(path)
