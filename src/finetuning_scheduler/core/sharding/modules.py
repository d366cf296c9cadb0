"""Modules selected by name or regular expression, as an adapter's configuration names them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from ...errors import Problem, ScheduleError
from ..schedule.expression import INVALID, Clock, compiled, too_slow
from ..schedule.names import ParameterIndex, closest_names, matching_names
from ..schedule.wording import did_you_mean
from ..view import CONTAINERS, plain_name


def select_modules(root: nn.Module, selectors: Iterable[str], argument: str) -> dict[str, list[tuple[str, nn.Module]]]:
    """Find the modules inside ``root`` that each selector stands for: the one of that name, or all it matches whole.

    Args:
        root: The module whose submodules are named.
        selectors: Names or regular expressions.
        argument: Where the selectors come from, for messages.

    Returns:
        For each selector the modules with their names, inner ones before those that hold them.

    Raises:
        ScheduleError: With every selector that is no regular expression, matches nothing, or selects a module that has
            no forward pass.
    """
    # A module's wrapper has the module's name; the innermost of them, which comes last, is the module itself.
    modules = {plain_name(name): module for name, module in root.named_modules() if name}
    index = ParameterIndex(tuple(modules))
    selected: dict[str, list[tuple[str, nn.Module]]] = {}
    problems = []
    clock = Clock()
    for selector in selectors:
        try:
            names = [selector] if selector in modules else matching_names(compiled(selector, clock), index)
        except TimeoutError:
            problems.append(Problem(*too_slow(clock), selector=selector))
            continue
        except INVALID as error:
            message = f"expected a module's name or a regular expression in {argument}, got an invalid one: {error}"
            problems.append(Problem(message, fix="Correct the expression.", selector=selector))
            continue
        chosen = [(name, modules[name]) for name in names if not isinstance(modules[name], CONTAINERS)]
        if not chosen:
            problems.append(_nothing(selector, names, index, argument))
        selected[selector] = sorted(chosen, key=lambda item: -item[0].count("."))
    if problems:
        raise ScheduleError(problems)
    return selected


def _nothing(selector: str, containers: Sequence[str], index: ParameterIndex, argument: str) -> Problem:
    """Say why a selector stands for no module."""
    if containers:
        message = f"expected {argument} to select modules with a forward pass, got {', '.join(containers)}"
        return Problem(message, fix=f"Select the modules inside, such as '{containers[0]}.*'.", selector=selector)
    fix = did_you_mean(closest_names(selector, index), "Use names of the LightningModule's named_modules().")
    return Problem(f"expected {argument} to match a module, got no match", fix=fix, selector=selector)
