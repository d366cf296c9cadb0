"""``fts diff``: what two schedules do differently, not how they are written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .models import Init, ModelOutline, read_model
from .output import OK, PROBLEMS, AsJson, Output, answering, counted

if TYPE_CHECKING:
    from rich.text import Text

    from ..core.schedule.model import Phase
    from .shapes import DiffAnswer, Move, Setting

EXAMPLES = """\
Examples:

\b
  fts diff before.yaml after.yaml
  fts diff before.yaml after.yaml bert-base-uncased/
  fts diff before.yaml after.yaml model.safetensors --json

With MODEL, the parameters themselves are compared: other patterns that select
the same are no difference. Without it, the selectors are.

Exit status: 0 if both do the same, 1 if not, 2 if one cannot be used."""

First = Annotated[str, typer.Argument(metavar="A", help="A schedule's YAML file.", show_default=False)]
Second = Annotated[str, typer.Argument(metavar="B", help="Another.", show_default=False)]
OptionalModel = Annotated[
    str | None, typer.Argument(metavar="[MODEL]", help="A file, a folder, or package.module:Class, as of fts params.")
]
_MOST_SELECTORS = 12


def diff(a: First, b: Second, model: OptionalModel = None, init: Init = None, as_json: AsJson = False) -> None:
    """Tell what the schedules A and B do differently: what thaws when, and the settings of each phase."""
    with answering(as_json=as_json) as output:
        from .shapes import DiffAnswer

        outline = None if model is None else read_model(model, init)
        before, after = _phases(a, outline), _phases(b, outline)
        moves = list(_moves(before, after, outline))
        settings = list(_settings(before, after))
        answer = DiffAnswer(
            same=not moves and not settings,
            a=a,
            b=b,
            model=None if outline is None else outline.summary,
            moves=moves,
            settings=settings,
        )
        if as_json:
            output.answer(answer)
        else:
            _print(output, answer, outline)
    raise typer.Exit(OK if answer.same else PROBLEMS)


def _phases(path: str, outline: ModelOutline | None) -> Sequence[Phase]:
    """Read a schedule that can be used, in full names if there is a model."""
    from .findings import readable, usable

    if outline is not None:
        return usable(path, outline).phases
    from ..core.schedule.schedule import Schedule

    return Schedule.parse(readable(path)).phases


def _moves(before: Sequence[Phase], after: Sequence[Phase], outline: ModelOutline | None) -> Iterator[Move]:
    """Yield what is thawed in another phase, by the phases in A and B."""
    from .shapes import Move

    first, second = _phase_of(before), _phase_of(after)
    order = list(dict.fromkeys([*first, *second])) if outline is None else [*outline.parameters]
    moved: dict[tuple[int | None, int | None], list[str]] = defaultdict(list)
    for name in order:
        if first.get(name) != second.get(name):
            moved[first.get(name), second.get(name)].append(name)
    last = max(len(before), len(after))
    for (a, b), names in sorted(moved.items(), key=lambda item: [last if each is None else each for each in item[0]]):
        yield Move(a=a, b=b, selectors=names, parameters=None if outline is None else outline.sizes_of(names))


def _phase_of(phases: Sequence[Phase]) -> Mapping[str, int]:
    return {name: number for number, phase in enumerate(phases) for name in phase.params}


def _settings(before: Sequence[Phase], after: Sequence[Phase]) -> Iterator[Setting]:
    """Yield the other keys that differ, phase by phase."""
    from .shapes import Setting

    for number in range(max(len(before), len(after))):
        first = _values(before[number]) if number < len(before) else None
        second = _values(after[number]) if number < len(after) else None
        if first is None or second is None:
            yield Setting(phase=number, key="phase", a=first is not None, b=second is not None)
            continue
        for key in first | second:
            if first.get(key) != second.get(key):
                yield Setting(phase=number, key=key, a=first.get(key), b=second.get(key))


def _values(phase: Phase) -> dict[str, Any]:
    """The keys of a phase that are not at their defaults, nested ones by their path."""
    return dict(_flat({key: value for key, value in _given(phase).items() if key != "params"}, ""))


def _given(phase: Phase) -> dict[str, Any]:
    given: dict[str, Any] = phase.model_dump(exclude_defaults=True)
    return given


def _flat(values: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", list(value) if isinstance(value, tuple) else value


def _print(output: Output, answer: DiffAnswer, outline: ModelOutline | None) -> None:
    from rich.text import Text

    if answer.same:
        compared = "the selectors" if outline is None else "what thaws when"
        output.print(Text("no difference", "bold green").append(f" in {compared} and in the settings", "not bold"))
        return
    output.print(Text(f"--- {answer.a}", "bold red"))
    output.print(Text(f"+++ {answer.b}", "bold green"))
    for move in answer.moves:
        output.print()
        output.print(_headline(move))
        for line in _said(move, outline):
            output.print(f"    {line}")
    if answer.settings:
        output.print()
        output.print(Text("settings", "bold"))
    for setting in answer.settings:
        _print_setting(output, setting)


def _headline(move: Move) -> Text:
    from rich.text import Text

    if move.parameters is None:  # nobody knows what the selectors mean
        side = ("in A only, ", "bold red") if move.b is None else ("in B only, ", "bold green")
        if move.a is None or move.b is None:
            return Text.assemble(side, f"phase {move.b if move.a is None else move.a}")
        return Text.assemble((f"phase {move.a}", "bold red"), " -> ", (f"phase {move.b}", "bold green"))
    text = Text.assemble(
        ("frozen" if move.a is None else f"phase {move.a}", "bold red"),
        " -> ",
        ("frozen" if move.b is None else f"phase {move.b}", "bold green"),
    )
    return text.append(f"  {counted(len(move.selectors), 'tensor')}, {move.parameters:,} parameters")


def _said(move: Move, outline: ModelOutline | None) -> list[str]:
    """Say the names in patterns; very many of them are cut."""
    from ..core.schedule.collapse import collapsed

    said = move.selectors if outline is None else collapsed(move.selectors, outline.parameters)
    more = len(said) - _MOST_SELECTORS
    return said if more <= 1 else [*said[:_MOST_SELECTORS], f"and {more:,} more, with --json"]


def _print_setting(output: Output, setting: Setting) -> None:
    from rich.text import Text

    place = f"    phase {setting.phase}: "
    if setting.key == "phase":
        only = ("only in A", "red") if setting.a else ("only in B", "green")
        output.print(Text(place).append(*only))
        return
    a, b = ("none" if value is None else str(value) for value in (setting.a, setting.b))
    output.print(Text(f"{place}{setting.key}: ").append(a, "red").append(" -> ").append(b, "green"))
