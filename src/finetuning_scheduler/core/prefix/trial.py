"""Running a step once more without anything of it remaining, and comparing what two runs have made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..steps import stepping
from .calls import Forward, eagerly
from .refusal import Refused
from .stand_ins import real, version_of
from .state import State
from .trees import flatten

Quiet = Callable[[], AbstractContextManager[object]]


class Trials:
    """Runs steps of which nothing remains.

    Args:
        model: The model.
        optimizer: Tells which optimizer must not step.
        quiet: Keeps what the step reports from being counted twice.
    """

    def __init__(self, model: nn.Module, optimizer: Callable[[], Optimizer], quiet: Quiet) -> None:
        self._model = model
        self._optimizer = optimizer
        self._quiet = quiet

    def run(
        self, step: Callable[[], Any], modules: Iterable[nn.Module], of: Callable[..., Any], *, eager: bool = False
    ) -> tuple[Any, State]:
        """Run a step; return its result and the state that it has led to, and bring back the state before.

        Args:
            step: Runs the user's step, and may do more.
            modules: Whose attributes may change.
            of: The user's step.
            eager: Whether compiled modules are called as they were written.

        Raises:
            Refused: The step fails, or does more than compute a result.
        """
        modules = list(modules)
        parameters = [each for each in self._model.parameters() if each.requires_grad]
        gradients = [(each, each.grad, None if each.grad is None else each.grad.clone()) for each in parameters]
        before, versions = State.of(modules, of), versions_of(self._model)
        if before.inside.runs_on is not None:
            raise Refused(f"the step may read or write a {before.inside.runs_on}, which cannot be put back")
        try:
            with self._quiet(), self._without_steps(), _without_replication():
                if eager:
                    with eagerly(self._model):
                        result = step()
                else:
                    result = step()
            after = State.of(modules, of)
        except Refused:
            raise
        except Exception as error:  # whatever the user's code raises here, the plain step that follows tells it
            raise Refused(f"the step cannot be run twice on a batch: {type(error).__name__}: {error}") from error
        finally:
            before.restore()
        if _restored(gradients):
            raise Refused("the step runs backward itself: give it the forward pass and the loss only")
        if (name := moved(self._model, versions)) is not None:
            raise Refused(f"the step changes `{name}` itself")
        return result, after

    @contextmanager
    def _without_steps(self) -> Iterator[None]:
        """Let nothing be trained."""
        inner = stepping(self._optimizer())

        def refuse(*_: object) -> None:
            raise Refused("the step calls the optimizer itself: give it the forward pass and the loss only")

        handle = None if inner is None else inner.register_step_pre_hook(refuse)
        try:
            yield
        finally:
            if handle is not None:
                handle.remove()


@contextmanager
def _without_replication() -> Iterator[None]:
    """Let replicated models be called without talking to other replicas, nor waiting for a backward pass."""
    before = DistributedDataParallel.forward

    def forward(self: DistributedDataParallel, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    DistributedDataParallel.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        DistributedDataParallel.forward = before  # type: ignore[method-assign]


def _restored(gradients: Sequence[tuple[nn.Parameter, Tensor | None, Tensor | None]]) -> bool:
    """Give parameters back the gradients that they had; tell if they had others."""
    changed = False
    for parameter, gradient, content in gradients:
        same = parameter.grad is gradient and (gradient is None or content is None or torch.equal(gradient, content))
        if not same:
            parameter.grad = gradient
            if gradient is not None and content is not None:
                gradient.copy_(content)
            changed = True
    return changed


def versions_of(model: nn.Module) -> dict[str, int]:
    """Note how often each parameter has been changed in place."""
    return {name: version_of(parameter) for name, parameter in model.named_parameters()}


def moved(model: nn.Module, before: Mapping[str, int]) -> str | None:
    """Name a parameter that has been changed since."""
    now = versions_of(model)
    return next((name for name, version in before.items() if now.get(name) != version), None)


class Observed:
    """What modules that are not skipped return, in the order of their calls."""

    def __init__(self) -> None:
        self.results: list[tuple[str, Any]] = []

    def called(self, name: str, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call and note what it returns."""
        result = original(*args, **kwargs)
        self.results.append((name, result))
        return result


def gradients_of(result: object, parameters: Sequence[nn.Parameter]) -> list[Tensor | None] | None:
    """Return the gradients of all that a result has to be differentiated; ``None`` if there is nothing.

    Nothing is accumulated, and the result can be differentiated again.
    """
    total: Tensor | None = None
    for leaf in flatten(result)[0]:
        leaf = real(leaf)
        if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.is_floating_point():
            total = leaf.sum() if total is None else total + leaf.sum()
    if total is None or not parameters:
        return None
    try:
        return list(torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True))
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
    return _accumulated(total, parameters)


def _accumulated(total: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """Differentiate in the way that reentrant checkpointing needs."""
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        total.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        return [parameter.grad for parameter in parameters]
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient
