"""The command ``fts``: its subcommands, each from a module of its own."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from . import check, diff, new, params

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


for command, examples in (
    (new.new, new.EXAMPLES),
    (check.check, check.EXAMPLES),
    (params.params, params.EXAMPLES),
    (diff.diff, diff.EXAMPLES),
):
    app.command(epilog=examples)(command)


def main() -> None:
    """Run the command ``fts``."""
    app(prog_name="fts")
