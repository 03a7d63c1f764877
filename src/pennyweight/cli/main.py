"""`pennyweight`: the commands, and how a run ends: 0 done, 1 failed, 2 misused."""

from __future__ import annotations

import os
import sys

import typer

from pennyweight import __version__
from pennyweight.cli import demo, evaluate, inspect, quantize, run, verify
from pennyweight.cli.console import say

app = typer.Typer(
    name="pennyweight",
    help="Turn a trained model into a smaller one, in the file that its runtime reads, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("inspect")(inspect.inspect)
app.command("quantize")(quantize.quantize)
app.command("evaluate")(evaluate.evaluate)
app.command("verify")(verify.verify)
app.command("run")(run.run)
app.command("demo")(demo.demo)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"pennyweight {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main() -> None:
    """Run a command; errors that Pennyweight foresees are one line on standard error."""
    try:
        app(standalone_mode=True)
    except KeyboardInterrupt:
        say("interrupted; finished blocks are kept: the same command continues there")
        sys.exit(1)
    except BrokenPipeError:
        # The reader of our output is gone; nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        sys.exit(_explain(error))


def _explain(error: Exception) -> int:
    from pennyweight.core.errors import PennyweightError, UsageError

    if isinstance(error, PennyweightError):
        say(f"error: {error}")
        return 2 if isinstance(error, UsageError) else 1
    if isinstance(error, OSError) and error.strerror:
        say(f"error: {error.filename or 'the output'}: {error.strerror.lower()}; finished blocks are kept")
        return 1
    raise error


if __name__ == "__main__":
    main()
