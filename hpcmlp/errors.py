"""The errors a user sees: one sentence and an exit code each."""

_SENTENCE_LIMIT = 1500
_LINE_LIMIT = 20_000


def printable(text: str, limit: int = _SENTENCE_LIMIT) -> str:
    """Return `text` as one line that a terminal shows and does not obey, at most `limit` characters.

    Local. Names and values out of files may hold newlines, escape sequences, halves of surrogate pairs, or be endless.
    """
    line = " ".join(text[:2 * limit + 1].split("\n"))
    if not (line.isprintable() and line.isascii()):
        line = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in line)
    return line if len(line) <= limit else f"{line[:limit // 2]} ... {line[5 - limit + limit // 2:]}"


def printable_lines(text: str) -> str:
    """Return `text` with each of its lines made `printable`. Local."""
    return "\n".join(printable(line, _LINE_LIMIT) for line in text.split("\n"))


class HpcmlpError(Exception):
    """An error that ends a program with one sentence on standard error and `code`.

    `agreed` is True once all ranks raise the same error (`comm.agreement`), so that
    rank 0 alone may speak and all ranks may simply leave.
    """

    code = 70
    agreed = False


class UsageError(HpcmlpError):
    """Wrong usage of the command line."""

    code = 2


class DataError(HpcmlpError):
    """Data that cannot be used: damaged, contradictory or not finite."""

    code = 65


class InputMissing(HpcmlpError):
    """An input that is not there or cannot be read."""

    code = 66


class Unavailable(HpcmlpError):
    """A service, device or amount of memory that is needed and not there."""

    code = 69


class RunFailed(HpcmlpError):
    """A run that cannot go on: numbers not finite, replicas that drift."""

    code = 70


class CannotWrite(HpcmlpError):
    """An output that cannot be written."""

    code = 73


class StoppedAndSaved(HpcmlpError):
    """Stopped early by a signal or a limit, with everything saved."""

    code = 75


class ConfigError(HpcmlpError):
    """A configuration or launch that cannot work."""

    code = 78


# By number, since a module of names costs every rank: ENOSPC, EROFS, EFBIG, EDQUOT; EMFILE, ENFILE; EIO, EACCES,
# ENOTDIR, ENAMETOOLONG, ELOOP, ESTALE. The same numbers wherever Linux runs.
_KINDS = {**dict.fromkeys((28, 30, 27, 122), CannotWrite), **dict.fromkeys((24, 23), Unavailable),
          **dict.fromkeys((5, 13, 20, 36, 40, 116), InputMissing)}


def of_system(error: OSError) -> HpcmlpError | None:
    """Return the user's error for one that the file system had, or None where the fault may be ours. Local."""
    kind = _KINDS.get(error.errno)
    if kind is None:
        return None
    advice = "; raise the limit on open files (ulimit -n)" if kind is Unavailable else ""
    return kind(f"{error.filename or 'a file'}: {error.strerror}{advice}.")


EXIT_CODES = {kind.code: kind for kind in HpcmlpError.__subclasses__()}


def flag(name: str) -> str:
    """Return the command-line spelling of the option `name`, for sentences that name one. Local."""
    return "--" + name.replace("_", "-")
