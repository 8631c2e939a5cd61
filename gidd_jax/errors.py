"""The errors that commands report as a single line instead of a traceback."""


class InputError(ValueError):
    """Bad input from the user: the message names the thing, the legal values and the fix."""


class DivergenceError(RuntimeError):
    """A loss that is not finite: the message names the step and the last good checkpoint."""
