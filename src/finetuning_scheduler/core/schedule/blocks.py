"""The repeated blocks of a model: as its library tells them, else as its modules show."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.parameter import UninitializedParameter

# a kind of block that holds less than this share of what the largest kind holds is not worth phases of its own, such as
# the two linear layers of a head
MIN_KIND_SHARE = 0.1
_CONTAINERS = (nn.Sequential, nn.ModuleList)
_Kind = tuple[type[nn.Module], tuple[str, ...]]


def blocks_of(model: nn.Module) -> dict[str, str]:
    """Tell the block of each parameter that is in one.

    Asked are, in this order, timm's ``group_matcher`` of the model and ``_no_split_modules`` of transformers' models in
    it. Else blocks are modules of one kind in the same ``Sequential``, ``ModuleList``, or module with numbered
    children: the outermost ones only, of kinds that hold a good share of the parameters. Several towers each keep
    their blocks.
    """
    names = [name for name, _ in model.named_parameters()]
    return _by_timm(model, names) or _enclosing(names, _by_transformers(model) or _main_blocks(model))


def told_blocks(module: nn.Module) -> dict[str, Any]:
    """Return what a class has to have for its modules to tell their blocks as this module does."""
    told: dict[str, Any] = {}
    if isinstance(names := getattr(module, "_no_split_modules", None), (list, tuple, set)):
        told["_no_split_modules"] = names
    if (patterns := _matched_by(module)) is not None:
        told["group_matcher"] = staticmethod(lambda coarse=False: patterns)
    return told


def _matched_by(module: nn.Module) -> Mapping[str, Any] | None:
    """Ask a module for timm's patterns."""
    matcher = getattr(module, "group_matcher", None)
    told = matcher(coarse=False) if callable(matcher) else None
    return told if isinstance(told, Mapping) else None


def _by_timm(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Group names by the first of timm's patterns that they begin with, and by the numbers that it captures."""
    for path, module in model.named_modules():
        if (told := _matched_by(module)) is not None:
            rules = list(_timm_rules(told))
            prefix = f"{path}." if path else ""
            own = {name: _timm_group(name.removeprefix(prefix), rules) for name in names if name.startswith(prefix)}
            return {name: f"{prefix}{group}" for name, group in own.items() if group is not None}
    return {}


def _timm_rules(told: Mapping[str, Any]) -> Iterator[tuple[str, re.Pattern[str], tuple[int, ...]]]:
    """Yield group, pattern, and the numbers that stand in for captured ones."""
    for group, given in told.items():
        for rule in [given] if isinstance(given, str) else given:
            pattern, numbers = (rule, None) if isinstance(rule, str) else rule
            yield group, re.compile(pattern), tuple(numbers or ())


def _timm_group(name: str, rules: Iterable[tuple[str, re.Pattern[str], tuple[int, ...]]]) -> str | None:
    for group, pattern, numbers in rules:
        if (found := pattern.match(name)) is not None:
            captured = [each for each in found.groups() if each is not None]
            return ".".join([group, *captured, *map(str, numbers)]) if captured else None
    return None


def _by_transformers(model: nn.Module) -> set[str]:
    """Find the modules of the classes that transformers' models keep on one device: their blocks."""
    told: set[str] = set()
    for module in model.modules():
        if isinstance(names := getattr(module, "_no_split_modules", None), (list, tuple, set)):
            told.update(map(str, names))
    paths = {path for path, module in model.named_modules() if type(module).__name__ in told}
    # a list of them is what makes blocks; embeddings, which are kept together as well, are none
    counts = Counter(path.rpartition(".")[0] for path in paths)
    return {path for path in paths if counts[path.rpartition(".")[0]] > 1}


def _enclosing(names: Iterable[str], blocks: set[str]) -> dict[str, str]:
    """Tell the block around each name, the outermost one."""
    found: dict[str, str] = {}
    for name in names:
        parts = name.split(".")
        prefixes = (".".join(parts[:length]) for length in range(1, len(parts)))
        block = next((prefix for prefix in prefixes if prefix in blocks), None)
        if block is not None:
            found[name] = block
    return found


def parameter_size(parameter: nn.Parameter) -> int:
    """The number of values; 0 for a lazy parameter, which has none before the first forward pass."""
    return 0 if isinstance(parameter, UninitializedParameter) else parameter.numel()


def _main_blocks(model: nn.Module) -> set[str]:
    """The paths of the repeated blocks, without the kinds that hold few parameters."""
    blocks: dict[_Kind, list[str]] = defaultdict(list)
    sizes: Counter[_Kind] = Counter()
    for path, module, kind in _repeated(model, ""):
        blocks[kind].append(path)
        sizes[kind] += sum(map(parameter_size, module.parameters()))
    least = MIN_KIND_SHARE * max(sizes.values(), default=0)
    return {path for kind, paths in blocks.items() if sizes[kind] >= least for path in paths}


def _repeated(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module, _Kind]]:
    """The outermost repeated blocks below a module: path, module and kind."""
    children = {name: child for name, child in module.named_children() if next(child.parameters(), None) is not None}
    numbered = {
        name: _kind(child) for name, child in children.items() if isinstance(module, _CONTAINERS) or name.isdigit()
    }
    counts = Counter(numbered.values())
    for name, child in children.items():
        child_path = f"{path}.{name}" if path else name
        if name in numbered and counts[numbered[name]] > 1:
            yield child_path, child, numbered[name]
        else:
            yield from _repeated(child, child_path)


def _kind(module: nn.Module) -> _Kind:
    """Modules of one class are of one kind; plain containers also need the same parameters inside."""
    kind = type(module)
    return kind, tuple(name for name, _ in module.named_parameters()) if kind in _CONTAINERS else ()
