"""`python -m llfast` and the console command."""

from __future__ import annotations

import io
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from .cli import app
from .cli_options import UsageError
from .errors import LlfastError, LlfastWarning
from .output import print_note

_INTERRUPTED = 130  # what typer makes of Ctrl-C, and shells expect


def main() -> None:
    """Run the command line: an error is one line on standard error.

    Exit status: 1 for errors, 2 for misuse, 130 for Ctrl-C.
    """
    # A stream that was closed is None: what would go there is lost, and nothing else.
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115 (until the program ends)
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    warnings.simplefilter("ignore")
    warnings.simplefilter("always", LlfastWarning)
    warnings.showwarning = lambda message, *_, **__: print_note(f"llfast: warning: {message}")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for terminals that know few letters
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except KeyboardInterrupt:  # before typer, which turns it into an exit status, has begun
        code = _INTERRUPTED
    except UsageError as error:
        code = _explain(error)
    except BrokenPipeError:
        # The reader of a pipe has gone; nothing that Python flushes at exit must fail, either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except (LlfastError, ValueError, TypeError, OSError, KeyError) as error:
        print_note(f"llfast: error: {error}")
        code = 1
    except MemoryError as error:
        reason = f": {error}" if str(error) else ""
        print_note(f"llfast: error: memory has run out{reason}")
        code = 1
    if code == _INTERRUPTED:
        print_note("llfast: interrupted; what is done is kept, the same command goes on from there")
    if code:
        sys.exit(code)


def _explain(error: Any) -> int:
    """Say in a line what is wrong with the words of a command; returns the exit status."""
    message = error.format_message()
    if message:  # none where the help was printed, for want of any word
        path = error.ctx.command_path if error.ctx else "llfast"
        print_note(f"llfast: error: {message.removesuffix('.')}; see `{path} --help`")
    return int(error.exit_code)


if __name__ == "__main__":
    main()
