"""A model as a tree of modules with counts; neighbours that are alike share a line."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from .outline import ModelOutline, TensorFacts

MOST_LINES = 200  # without --depth


@dataclass
class Node:
    """A module: its own parameters, and the modules in it.

    Attributes:
        name: The last part of its path.
        times: How many modules of this content the line stands for.
    """

    name: str
    parameters: dict[str, TensorFacts] = field(default_factory=dict)
    children: dict[str, Node] = field(default_factory=dict)
    selected: set[str] = field(default_factory=set)
    aliases: dict[str, str] = field(default_factory=dict)
    times: int = 1
    size: int = 0
    selected_size: int = 0
    tensors: int = 0
    selected_tensors: int = 0

    def count(self) -> None:
        """Add up what is in it."""
        for child in self.children.values():
            child.count()
        inner = list(self.children.values())
        own = {name: facts.size for name, facts in self.parameters.items()}
        self.size = sum(own.values()) + sum(child.size for child in inner)
        self.tensors = len(own) + sum(child.tensors for child in inner)
        self.selected_size = sum(own[name] for name in self.selected) + sum(child.selected_size for child in inner)
        self.selected_tensors = len(self.selected) + sum(child.selected_tensors for child in inner)

    def likeness(self) -> tuple[object, ...]:
        """What two modules share that can share a line."""
        own = tuple((name, facts.shape, name in self.selected) for name, facts in self.parameters.items())
        return (
            own,
            tuple(self.aliases.items()),
            tuple((name, *child.likeness()) for name, child in self.children.items()),
        )


@dataclass(frozen=True)
class Line:
    """A line of the tree.

    Attributes:
        guide: The branches in front of it.
        node: What it is about.
        folded: Whether what is in it is not shown.
    """

    guide: str
    node: Node
    folded: bool = False


def tree_of(outline: ModelOutline, selected: Collection[str]) -> Node:
    """Arrange the parameters of a model by module, neighbours that are alike as one."""
    root = Node(outline.title)
    for name, facts in outline.parameters.items():
        node, last = _descended(root, name)
        node.parameters[last] = facts
        if name in selected:
            node.selected.add(last)
    for alias, name in outline.tied.items():
        node, last = _descended(root, alias)
        node.aliases[last] = name
    root.count()
    _merge_alike(root)
    return root


def lines_of(root: Node, depth: int | None = None) -> list[Line]:
    """Lay out a tree; where something is selected, modules without any of it are not opened.

    Args:
        root: The tree.
        depth: How many levels are shown; ``None`` for as many as fit a page or two.
    """
    if depth is not None:
        return list(_lines(root, depth, opens_all=not root.selected_tensors))
    for levels in range(64, 1, -1):
        lines = list(_lines(root, levels, opens_all=not root.selected_tensors))
        if len(lines) <= MOST_LINES:
            return lines
    return list(_lines(root, 1, opens_all=not root.selected_tensors))


def _lines(node: Node, depth: int, guide: str = "", branch: str = "", *, opens_all: bool) -> Iterator[Line]:
    opened = depth > 0 and (opens_all or node.selected_tensors > 0)
    yield Line(guide + branch, node, folded=not opened and bool(node.children))
    if not opened:
        return
    inner = guide + {"": "", "|-- ": "|   ", "`-- ": "    "}[branch]
    children = list(node.children.values())
    for child in children:
        yield from _lines(child, depth - 1, inner, "`-- " if child is children[-1] else "|-- ", opens_all=opens_all)


def _descended(root: Node, name: str) -> tuple[Node, str]:
    *path, last = name.split(".")
    node = root
    for part in path:
        node = node.children.setdefault(part, Node(part))
    return node, last


def _merge_alike(node: Node) -> None:
    """Let numbered children with the same content share one line, and chains of single modules another."""
    alike: dict[tuple[object, ...], list[Node]] = {}
    for child in node.children.values():
        key = (child.likeness(),) if child.name.isdigit() else (child.name,)
        alike.setdefault(key, []).append(child)
    node.children = {nodes[0].name: _as_one(nodes) for nodes in alike.values()}
    for child in node.children.values():
        _merge_alike(child)
    for child in node.children.values():
        while len(child.children) == 1 and not child.parameters and not child.aliases and child.times == 1:
            (only,) = child.children.values()
            child.name, child.times, child.children = f"{child.name}.{only.name}", only.times, only.children
            child.parameters, child.selected, child.aliases = only.parameters, only.selected, only.aliases


def _as_one(nodes: list[Node]) -> Node:
    first = nodes[0]
    if len(nodes) > 1:
        first.name = as_ranges(int(node.name) for node in nodes)
        first.times = len(nodes)
        for sums in ("size", "tensors", "selected_size", "selected_tensors"):
            setattr(first, sums, sum(getattr(node, sums) for node in nodes))
    return first


def as_ranges(numbers: Iterable[int]) -> str:
    """Say numbers as ranges: ``0-3, 5``."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][-1] + 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    said = ["-".join(map(str, span)) for span in spans]
    return ", ".join(said if len(said) <= 4 else [*said[:2], "...", said[-1]])
