"""Floating point operations of a training step, forward and backward, counted on tensors without values."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from ..core.plan import Plan
from ..core.view import ModelView
from .costs import Costs, between, from_parameters, measured_at

_MOST_RUNS = 48  # of forward and backward; a generated schedule has hundreds of phases


class CountingError(Exception):
    """Operations cannot be counted; the message says why."""


@dataclass(frozen=True)
class Operations:
    """The operations of a step.

    Attributes:
        total: All of them.
        reusable: Those in frozen modules whose output depends on nothing that is trained.
    """

    total: int
    reusable: int


def costs_of(plan: Plan, view: ModelView, batch: Any) -> Costs:
    """Tell the costs of each phase from a sample batch; from shares of parameters, with the reason, if that fails.

    Args:
        plan: The plan.
        view: The model. Its values are neither read nor changed.
        batch: What its ``training_step`` takes if it has one; else its arguments: a mapping by name, or a tuple.
    """
    try:
        return _counted(plan, Step(view.model, batch))
    except CountingError as error:
        return from_parameters(plan, view, (f"The sample batch could not be used: {error}.",))


def _counted(plan: Plan, step: Step) -> Costs:
    full = step.count(None)
    chosen = measured_at(len(plan.phases), _MOST_RUNS)
    found = {phase: step.count(set(plan.phases[phase].trainable)) for phase in chosen}
    counts = [state.trainable_count for state in plan.phases]
    steps = between({phase: each.total / full.total for phase, each in found.items()}, counts)
    saved = between({phase: each.reusable / each.total for phase, each in found.items()}, counts)
    notes = ["Costs are floating point operations of a forward and backward pass of the sample batch."]
    if len(chosen) < len(counts):
        notes.append(f"They were counted in {len(chosen)} of {len(counts)} phases; between these they are estimates.")
    return Costs(list(steps), list(saved), "flops", tuple(notes))


class Step:
    """A forward and backward pass of a model on the meta device.

    Args:
        model: The model; it is not changed.
        batch: What it takes.
    """

    def __init__(self, model: nn.Module, batch: Any) -> None:
        self._model = model
        self._call = _Call(model)
        self._batch = _emptied(batch)

    def count(self, trainable: Collection[str] | None) -> Operations:
        """Count operations.

        Args:
            trainable: The names of the parameters that are trained; ``None`` for all.

        Raises:
            CountingError: The model does not run without values, or nothing of what it does is counted.
        """
        tensors = {f"model.{name}": _without_values(buffer) for name, buffer in self._model.named_buffers()}
        for name, parameter in self._model.named_parameters():
            wanted = trainable is None or name in trainable
            copy = _without_values(parameter)
            tensors[f"model.{name}"] = copy.requires_grad_(wanted and (copy.is_floating_point() or copy.is_complex()))
        trained = {id(tensor) for tensor in tensors.values() if tensor.requires_grad}
        try:
            return self._run(tensors, trained)
        except CountingError:
            raise
        except Exception as error:  # a model of anybody's, without values
            reason = " ".join(str(error).split())[:200]
            raise CountingError(f"{type(error).__name__}: {reason}") from error

    def _run(self, tensors: dict[str, Tensor], trained: set[int]) -> Operations:
        counter = FlopCounterMode(display=False)
        with _quiet(), torch.enable_grad(), _in_train_mode(self._model), counter:
            with _watching(self._model, trained, counter.get_total_flops) as reused:
                loss = _loss(functional_call(self._call, tensors, (self._batch,), tie_weights=True))
            torch.autograd.backward(loss)
        if not counter.get_total_flops():
            raise CountingError("none of the model's operations is one that PyTorch counts")
        return Operations(counter.get_total_flops(), reused.operations)


class _Call(nn.Module):
    """Calls a model as its training does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> Any:
        step: Callable[..., Any] | None = getattr(self.model, "training_step", None)
        if step is not None:
            return step(batch, 0) if _takes_two(step) else step(batch)
        if isinstance(batch, Mapping):
            return self.model(**batch)
        return self.model(*batch) if isinstance(batch, (tuple, list)) else self.model(batch)


def _takes_two(step: Callable[..., Any]) -> bool:
    """Whether a training step takes the batch's number, too."""
    kinds = [parameter.kind for parameter in inspect.signature(step).parameters.values()]
    return len(kinds) > 1 or inspect.Parameter.VAR_POSITIONAL in kinds


def _loss(output: Any) -> Tensor:
    """Take the loss of what a model returns; else the sum of all that depends on what is trained."""
    named = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    found = [named] if isinstance(named, Tensor) else _tensors(output)
    found = [tensor for tensor in found if tensor.requires_grad]
    if not found:
        raise CountingError("nothing that the model returns depends on what is trained")
    return torch.stack([tensor.sum().float() for tensor in found]).sum()


def _tensors(output: Any) -> list[Tensor]:
    """List the tensors in nested mappings, lists and tuples."""
    if isinstance(output, Tensor):
        return [output]
    inner = output.values() if isinstance(output, Mapping) else output if isinstance(output, (list, tuple)) else ()
    return [tensor for each in inner for tensor in _tensors(each)]


def _emptied(value: Any) -> Any:
    """Copy nested mappings, lists and tuples, with tensors without values."""
    if isinstance(value, Mapping):
        return {key: _emptied(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        inner = [_emptied(each) for each in value]
        return type(value)(*inner) if hasattr(value, "_fields") else type(value)(inner)
    return _without_values(value)


@dataclass
class _Reused:
    """What of the forward pass was computed in frozen modules from nothing that is trained."""

    operations: int = 0
    open: list[tuple[int, int]] = field(default_factory=list)  # all operations, and the reusable, as a module begins


@contextmanager
def _watching(model: nn.Module, trained: set[int], total: Callable[[], int]) -> Iterator[_Reused]:
    """Watch modules run: a frozen one whose outputs need no gradient counts whole, others by what they hold."""
    reused = _Reused()

    def before(module: nn.Module, *_: Any) -> None:
        reused.open.append((total(), reused.operations))

    def after(module: nn.Module, _: Any, output: Any) -> None:
        began, reusable = reused.open.pop()
        holds_trained = any(id(tensor) in trained for tensor in module.parameters())
        if not holds_trained and not any(tensor.requires_grad for tensor in _tensors(output)):
            reused.operations = reusable + total() - began

    handles = []
    for module in model.modules():
        if module is not model:
            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield reused
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _in_train_mode(model: nn.Module) -> Iterator[None]:
    """Let modules be as in training for a while; in eval mode some take a way whose operations are not counted."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = True
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as Lightning's of values logged without a trainer
        yield


def _without_values(value: Any) -> Any:
    return torch.empty_like(value, device="meta").detach() if isinstance(value, Tensor) else value
