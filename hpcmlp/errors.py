"""The errors a user sees: one sentence and an exit code each."""


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


EXIT_CODES = {kind.code: kind for kind in HpcmlpError.__subclasses__()}


def flag(name: str) -> str:
    """Return the command-line spelling of the option `name`, for sentences that name one. Local."""
    return "--" + name.replace("_", "-")
