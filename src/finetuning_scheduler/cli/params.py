"""``fts params``: what a model consists of, and what a pattern selects."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Annotated

import typer

from .models import Init, Model, ModelOutline, read_model
from .output import OK, PROBLEMS, AsJson, Output, answering, counted, share

if TYPE_CHECKING:
    from rich.text import Text

    from ..core.schedule.resolve import Resolution
    from .shapes import Finding
    from .tree import Line

EXAMPLES = """\
Examples:

\b
  fts params bert-base-uncased/
  fts params model.safetensors 'encoder.layer.(8|9|10|11).*'
  fts params runs/last.ckpt '.*LayerNorm.*' --depth 3
  fts params my_package.models:Classifier --init num_labels=3 --json

Exit status: 0, 1 if PATTERN selects nothing, 2 if there is no such model."""

Pattern = Annotated[
    str | None,
    typer.Argument(metavar="[PATTERN]", help="A name or regular expression, as among a phase's params."),
]
Depth = Annotated[int | None, typer.Option("--depth", min=1, help="How many levels of modules are shown.")]


def params(
    model: Model, pattern: Pattern = None, depth: Depth = None, init: Init = None, as_json: AsJson = False
) -> None:
    """Show the modules of MODEL with the number of parameters in each, and what PATTERN selects."""
    with answering(as_json=as_json) as output:
        from .findings import findings

        outline = read_model(model, init)
        found = None if pattern is None else _selection(pattern, outline)
        names = list(outline.parameters)
        if found is not None:
            names = list(found.phases[0].params) if found.phases and not found.errors else []
        said = [] if found is None else [_of_pattern(finding) for finding in findings(found, "")]
        if as_json:
            _answer(output, outline, pattern, names, said)
        else:
            _print(output, outline, pattern, names, said, depth)
    raise typer.Exit(OK if names else PROBLEMS)


def _selection(pattern: str, outline: ModelOutline) -> Resolution:
    """Look a pattern up as that of a schedule's only phase."""
    from ..core.schedule.draft import draft
    from ..core.schedule.resolve import resolve_names

    return resolve_names(draft({0: {"params": [pattern]}}), outline.index)


def _of_pattern(finding: Finding) -> Finding:
    return finding.model_copy(update={"phase": None})


def _answer(output: Output, outline: ModelOutline, pattern: str | None, names: list[str], said: list[Finding]) -> None:
    from .shapes import ParamsAnswer, Tensor

    chosen = set(names)
    aliases: dict[str, list[str]] = defaultdict(list)
    for alias, name in outline.tied.items():
        aliases[name].append(alias)
    tensors = [
        Tensor(
            name=name,
            shape=list(facts.shape),
            dtype=facts.dtype,
            parameters=facts.size,
            selected=name in chosen,
            aliases=aliases[name],
        )
        for name, facts in outline.parameters.items()
    ]
    output.answer(
        ParamsAnswer(
            model=outline.summary,
            pattern=pattern,
            selected_tensors=len(names),
            selected_parameters=outline.sizes_of(names),
            tensors=tensors,
            buffers=list(outline.buffers),
            findings=said,
        )
    )


def _print(
    output: Output,
    outline: ModelOutline,
    pattern: str | None,
    names: list[str],
    said: list[Finding],
    depth: int | None,
) -> None:
    from .findings import print_findings
    from .tree import lines_of, tree_of

    root = tree_of(outline, set(names) if pattern is not None else ())
    lines = lines_of(root, depth)
    if names:
        for row in _rows(lines, outline.total, with_pattern=pattern is not None, width=output.console.width):
            output.print(row)
        output.print()
    print_findings(output, said)
    total = f"{outline.title}: {counted(len(outline.parameters), 'tensor')}, {outline.total:,} parameters."
    if pattern is not None:
        size = outline.sizes_of(names)
        part = f"{len(names):,} of {counted(len(outline.parameters), 'tensor')}"
        total = f"'{pattern}' selects {part}, {size:,} of {outline.total:,} parameters ({share(size, outline.total)})."
    output.paragraph(total, style="bold")
    if not names:
        return
    for note in outline.notes:
        output.paragraph(note)
    if any(line.node.times > 1 for line in lines):
        output.paragraph("Of modules that are alike, what is below them is that of one.")
    if any(line.folded for line in lines) and depth is None and pattern is None:
        output.paragraph("Not all levels are shown: --depth says how many.")


def _rows(lines: list[Line], total: int, *, with_pattern: bool, width: int) -> list[Text]:
    """Say each line of the tree in columns: module, parameters, share or what is selected, tensors."""
    from rich.text import Text

    titles = ["module", "parameters", "selected" if with_pattern else "share", "tensors"]
    cells = [_cells(line, total, with_pattern=with_pattern) for line in lines]
    widths = [max(len(titles[column]), *(len(row[column]) for row in cells)) for column in range(3)]
    rest = max(16, width - sum(widths) - 6)
    head = f"{titles[0]:<{widths[0]}}  {titles[1]:>{widths[1]}}  {titles[2]:>{widths[2]}}  {titles[3]}"
    rows = [Text(head.rstrip(), "bold")]
    for line, (name, size, second, _) in zip(lines, cells, strict=True):
        chosen, guide = with_pattern and line.node.selected_tensors > 0, len(line.guide)
        row = Text(line.guide, "dim").append(name[guide:].ljust(widths[0] - guide), _style(chosen, with_pattern))
        row.append(f"  {size:>{widths[1]}}  ", "not dim")
        row.append(f"{second:>{widths[2]}}", _style(chosen, False))
        row.append("  ").append_text(_tensors(line, rest, with_pattern=with_pattern))
        row.rstrip()
        rows.append(row)
    return rows


def _cells(line: Line, total: int, *, with_pattern: bool) -> list[str]:
    node = line.node
    name = node.name if node.times == 1 else f"{node.name} ({node.times} alike)"
    second = share(node.size, total)
    if with_pattern:
        second = f"{node.selected_size:,}" if node.selected_tensors else "-"
    return [line.guide + name, f"{node.size:,}", second, ""]


def _style(chosen: bool, with_pattern: bool) -> str:
    if chosen:
        return "not dim bold green"
    return "not dim" if not with_pattern else "dim"


def _tensors(line: Line, width: int, *, with_pattern: bool) -> Text:
    """Name a module's own parameters; of a module that is folded, count what is in it."""
    from rich.text import Text

    node = line.node
    if line.folded:
        return Text(counted(node.tensors, "tensor") + " inside", "dim")
    words: list[tuple[str, str]] = []
    for name, facts in sorted(node.parameters.items(), key=lambda item: item[0] not in node.selected):
        chosen = name in node.selected
        shape = "x".join(map(str, facts.shape)) or "1"
        mark = "*" if chosen else ""
        words.append((f"{mark}{name} {shape}", _style(chosen, with_pattern)))
    words += [(f"{alias} = {name}", "dim") for alias, name in node.aliases.items()]
    text = Text()
    for position, (word, style) in enumerate(words):
        separator = ", " if position else ""
        if position and len(text) + len(separator + word) > width:
            return text.append(f", +{len(words) - position}", "dim")
        text.append(separator).append(word, style)
    return text
