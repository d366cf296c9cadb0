"""The command ``fts``: its subcommands, each from a module of its own."""

from __future__ import annotations

import gc
from typing import Annotated

import typer

from .. import __version__
from . import check, diff, lr, merge, new, params, plan

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


for command, short, examples in (
    (new.new, "Write a commented schedule for a model.", new.EXAMPLES),
    (check.check, "Find everything that is wrong with a schedule.", check.EXAMPLES),
    (params.params, "Show a model's modules, and what a pattern selects.", params.EXAMPLES),
    (diff.diff, "Tell what two schedules do differently.", diff.EXAMPLES),
    (merge.merge, "Make a checkpoint without frozen weights whole.", merge.EXAMPLES),
    (plan.plan, "Tell what each phase trains, and what it costs.", plan.EXAMPLES),
    (lr.lr, "Tell the learning rates of every group, without training.", lr.EXAMPLES),
):
    app.command(short_help=short, epilog=examples)(command)


def main() -> None:
    """Run the command ``fts``."""
    gc.disable()  # a command ends soon; looking for cycles among 40,000 tensors takes a third of its time
    app(prog_name="fts")
