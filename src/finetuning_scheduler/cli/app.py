"""The command ``fts``: its subcommands, each from a module of its own."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from . import check, params

app = typer.Typer(
    name="fts",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"finetuning-scheduler {__version__}")
        raise typer.Exit


@app.callback()
def _fts(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Look at fine-tuning schedules and models: write, check and compare schedules before anything is trained."""


app.command(epilog=check.EXAMPLES)(check.check)
app.command(epilog=params.EXAMPLES)(params.params)


def main() -> None:
    """Run the command ``fts``."""
    app(prog_name="fts")
