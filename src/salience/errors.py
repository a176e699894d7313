"""The errors a user can cause, each with the exit status the command line gives it.

Every message is one line that names the file, tensor or option at fault and the mend.
"""


class SalienceError(Exception):
    """Wrong use or bad input. The command line prints the message and exits with 2."""

    exit_code = 2


class DoesNotFitError(SalienceError):
    """The work needs more memory than there is. The command line exits with 3."""

    exit_code = 3


class StorageError(SalienceError):
    """A disk that is full, gone or not writable. What was written before is kept."""
