"""The errors a user can cause, each with the exit status the command line gives it.

Every message is one line that names the file, tensor or option at fault and the mend. Names come
from files that others made, so what would end the line, or steer a terminal, is escaped, and what
would fill a screen is cut in the middle.
"""

_LONGEST = 2000


class SalienceError(Exception):
    """Wrong use or bad input. The command line prints the message and exits with 2."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(_one_line(message))


class DoesNotFitError(SalienceError):
    """The work needs more memory than there is. The command line exits with 3."""

    exit_code = 3


class StorageError(SalienceError):
    """A disk that is full, gone or not writable. What was written before is kept."""


def _one_line(text: str) -> str:
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    line = " ".join(text.splitlines())
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
