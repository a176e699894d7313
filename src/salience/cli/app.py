"""The command line: one file for each group of commands, put together here.

Heavy imports happen inside each command, so that `--help` answers at once.
"""

import os
import sys
from typing import Any

import typer

from salience.cli import bench
from salience.cli.chat import chat
from salience.cli.compare import compare
from salience.cli.doctor import doctor
from salience.cli.evaluate import evaluate
from salience.cli.models import convert, inspect
from salience.cli.quantize import plan, quantize, report
from salience.cli.serve import serve
from salience.errors import SalienceError

app = typer.Typer(
    name="salience",
    help="Activation-aware low-bit weights for language models.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench.app)
app.command()(plan)
app.command()(quantize)
app.command()(convert)
app.command()(inspect)
app.command()(doctor)
app.command("eval")(evaluate)
app.command()(compare)
app.command()(chat)
app.command()(serve)
app.command()(report)

# The base of what typer raises for wrong options: click's, or in newer versions its own copy of it.
_WrongUseError: type[Any] = typer.BadParameter.__mro__[2]
_INTERRUPTED = 130  # the exit status that shells give Ctrl-C


def main() -> None:
    """Run the command line; errors a user can cause are one line and their own exit status."""
    # Transformers' warnings are for programmers, and stderr is for one line.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        status = app(sys.argv[1:] or ["--help"], standalone_mode=False) or 0
    except _WrongUseError as error:
        _fail(f"{error.format_message()} (see --help)", 2)
    except SalienceError as error:
        _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        status = _INTERRUPTED
    # Some versions of typer raise, others return this.
    if status == _INTERRUPTED:
        print("interrupted; what can be continued goes on with the same command", file=sys.stderr)
    sys.exit(status)


def _fail(message: str, status: int) -> None:
    # Names in a file may hold line ends; the message is one line all the same.
    print("error:", " ".join(message.splitlines()), file=sys.stderr)
    sys.exit(status)
