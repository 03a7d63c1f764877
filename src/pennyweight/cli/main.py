"""`pennyweight`: the commands, and how a run ends: 0 done, 1 failed, 2 misused."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import typer

from pennyweight import __version__
from pennyweight.cli import bench, convert, demo, evaluate, imatrix, inspect, plan, quantize, run, verify
from pennyweight.cli.console import say
from pennyweight.core.memory import keep_freed_memory

app = typer.Typer(
    name="pennyweight",
    help="Turn a trained model into a smaller one, in the file that its runtime reads, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Plain help: drawing boxes would import half a second of libraries.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Seconds after which a thread that runs Python lets another one go on. Threads that hash or solve ask for that after
# each piece of work, and while modules are being imported would wait five milliseconds every time.
_SWITCH_SECONDS = 0.0005


def _explained(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, whose foreseen errors end as one line on standard error and an exit code."""

    @functools.wraps(command)
    def explained(**options: Any) -> None:
        try:
            command(**options)
        except KeyboardInterrupt as interrupt:
            say("\ninterrupted" + _notes(interrupt))
            raise typer.Exit(1) from interrupt
        except Exception as error:
            raise typer.Exit(_explain(error)) from error

    return explained


def _explain(error: Exception) -> int:
    from pennyweight.core.errors import PennyweightError, UsageError

    if isinstance(error, OSError) and error.strerror:
        place = "" if isinstance(error, PennyweightError) else f"{error.filename or 'input or output'}: "
        say(f"error: {place}{error.strerror}" + _notes(error))
        return 1
    if isinstance(error, PennyweightError):
        say(f"error: {error}" + _notes(error))
        return 2 if isinstance(error, UsageError) else 1
    raise error


def _notes(error: BaseException) -> str:
    """What the run that was ended had to say, after a semicolon."""
    return "".join(f"; {note}" for note in getattr(error, "__notes__", ()))


for _name, _command in (
    ("inspect", inspect.inspect),
    ("plan", plan.plan),
    ("quantize", quantize.quantize),
    ("imatrix", imatrix.imatrix),
    ("evaluate", evaluate.evaluate),
    ("verify", verify.verify),
    ("convert", convert.convert),
    ("run", run.run),
    ("bench", bench.bench),
    ("demo", demo.demo),
):
    app.command(_name)(_explained(_command))


def _version(value: bool) -> None:
    if value:
        typer.echo(f"pennyweight {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def _quiet() -> None:
    """Keep what the libraries say to their own users from ours; read when they are imported, which is later."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _leave(end: SystemExit) -> None:
    """End the process as `end` says, without taking apart what was imported, which takes a tenth of a second."""
    if not isinstance(end.code, int | None):
        raise end
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(end.code or 0)


def main() -> None:
    """Run a command."""
    keep_freed_memory()
    _quiet()
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        app()
    except SystemExit as end:
        _leave(end)


if __name__ == "__main__":
    main()
