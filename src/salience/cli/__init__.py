"""The command `salience`.

Exit status: 0 done, 2 wrong use or bad input, 3 does not fit, 1 anything else. Errors are one line
on stderr, and so is progress; `--json` prints one JSON object on stdout.
"""

from salience.cli.app import main

__all__ = ["main"]
