"""A batch that was computed plainly is replayed, and all that either has led to is compared."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..session import Session
from .closeness import Comparison
from .padding import PaddedBatch
from .refusal import Refused
from .state import State
from .trial import Observed, Trials, gradients_of


@dataclass(frozen=True)
class Made:
    """A step that has been made plainly.

    Attributes:
        step: Makes it once more.
        before: The state of the modules that are not skipped, before it.
        output: What it has returned.
        observed: What the modules that it calls have returned.
        padding: What counts of its batch, where padding does not.
    """

    step: Callable[[], Any]
    before: State
    output: object
    observed: Observed
    padding: PaddedBatch | None


class Verification:
    """Compares steps made plainly with themselves, replayed.

    Args:
        session: Tells what is trained.
        trials: Runs steps of which nothing remains.
        comparison: Tells what is the same.
    """

    def __init__(self, session: Session, trials: Trials, comparison: Comparison) -> None:
        self._session = session
        self._trials = trials
        self._comparison = comparison

    def difference(
        self,
        made: Made,
        live: Collection[nn.Module],
        replaying: Callable[[Observed], AbstractContextManager[None]],
        over: Callable[[], None],
    ) -> str | None:
        """Replay a step that has just been made; say what differs, if anything does.

        Args:
            made: The step.
            live: The modules that are not skipped.
            replaying: The context in which calls are replayed, and noted.
            over: Called when the forward pass is over.
        """
        after = State.of(live, getattr(made.step, "func", made.step))
        parameters = [each for each in self._session.parameters.values() if each.requires_grad]
        comparison = replace(self._comparison, padding=made.padding)
        gradients, seen = _gradients(made.output, parameters), Observed()
        replayed_gradients: list[list[Tensor | None] | None] = []

        def replayed() -> Any:
            with replaying(seen):
                result = made.step()
                over()
                replayed_gradients.append(_gradients(result, parameters))
            return result

        made.before.restore()
        try:
            result, state = self._trials.run(replayed, live, made.step)
            return (
                comparison.results(made.output, result, "the result of the step")
                or _differing_outputs(made.observed, seen, comparison)
                or comparison.gradients(gradients, replayed_gradients[0])
                or comparison.states(after, state)
            )
        except (Refused, RuntimeError) as error:
            return str(error)
        finally:
            after.restore()


def _gradients(output: object, parameters: list[nn.Parameter]) -> list[Tensor | None] | None:
    return gradients_of(output, parameters) if torch.is_grad_enabled() else None


def _differing_outputs(plain: Observed, replayed: Observed, comparison: Comparison) -> str | None:
    if [name for name, _ in plain.results] != [name for name, _ in replayed.results]:
        return "other modules are called"
    for (name, one), (_, other) in zip(plain.results, replayed.results, strict=True):
        where = f"the result of `{name}`" if name else "the result of the model"
        if (found := comparison.results(one, other, where)) is not None:
            return found
    return None
