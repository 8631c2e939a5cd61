"""The errors that commands report as a single line instead of a traceback."""


class InputError(ValueError):
    """Bad input from the user: the message names the thing, the legal values and the fix."""


class RunError(RuntimeError):
    """Something that ended a run: the message says what, and where the run can continue from."""


class DivergenceError(RunError):
    """A loss that is not finite: the message names the step and the last good checkpoint."""


class StorageError(RunError):
    """Something that could not be written: the message names it and the last good checkpoint."""


def first_line(error: BaseException) -> str:
    """Return what a library's error says, short enough for a line, or else its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
