"""What a skipped call hands on in place of tensors that were not kept: NaN to the eye, computed when it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .trees import flatten, mapped


@dataclass(frozen=True)
class Surroundings:
    """The modes of PyTorch that a call was made in."""

    gradients: bool
    inference: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def now(cls, device_types: Sequence[str]) -> Surroundings:
        """Read them."""
        autocast = tuple(
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in device_types
        )
        return cls(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast)

    @property
    def code(self) -> str:
        """What of them decides about values."""
        return ",".join(f"{kind} {dtype}" for kind, enabled, dtype in self.autocast if enabled)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Bring them back for a while."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.gradients))
            for kind, enabled, dtype in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype if enabled else None, enabled=enabled))
            yield


class Deferred:
    """A call that was skipped, and can still be made.

    Args:
        make: Makes the call.
        arguments: The leaves of what it is given.
    """

    def __init__(self, make: Callable[[list[Any]], list[Any]], arguments: Sequence[Any], around: Surroundings) -> None:
        self._make = make
        self._arguments = [(each, version_of(each)) for each in arguments]
        self._around = around
        self._results: list[Any] | None = None

    def result(self, place: int) -> Any:
        """Return a leaf of the call's result.

        Raises:
            RuntimeError: What the call was given has been changed in place since.
        """
        if self._results is None:
            for argument, version in self._arguments:
                if version_of(argument) != version:
                    raise RuntimeError(
                        "expected the inputs of a frozen module to stay as they are until the step is over, got one "
                        "that was changed in place while another output of the module is read. "
                        'Fix: Use frozen_prefix="off".'
                    )
            with self._around.again():
                self._results = self._make([real(argument) for argument, _ in self._arguments])
            self._arguments = []
        return self._results[place]


def version_of(leaf: object) -> int:
    """Count the in-place changes of a tensor; those of inference tensors are not counted, by PyTorch."""
    if not isinstance(leaf, Tensor) or isinstance(leaf, StandIn) or leaf.is_inference():
        return 0
    return leaf._version


class StandIn(Tensor):
    """Filled with NaN. Whatever reads it with a function of PyTorch gets what the skipped call would have given."""

    source: tuple[Deferred, int]

    @staticmethod
    def of(source: Deferred, place: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> StandIn:
        """Stand in for a leaf of a call's result."""
        with torch.inference_mode(False):
            made = torch.full((), float("nan"), dtype=dtype, device=device).expand(tuple(shape)).as_subclass(StandIn)
        made.source = (source, place)
        return made

    def twin(self) -> StandIn:
        """Make another one for the same leaf."""
        return StandIn.of(*self.source, self.shape, self.dtype, self.device)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _ABOUT_FORM:
            return super().__torch_function__(function, types, args, kwargs)  # type: ignore[no-untyped-call]
        if function is Tensor.detach and isinstance(args[0], StandIn):
            return args[0].twin()
        return function(*mapped(real, list(args)), **mapped(real, kwargs))


def real(leaf: Any) -> Any:
    """Return what a leaf stands for: itself, if it is no stand-in."""
    if not isinstance(leaf, StandIn):
        return leaf
    call, place = leaf.source
    return call.result(place)


def stand_ins(value: object) -> list[StandIn]:
    """Find the stand-ins among the leaves of a value."""
    return [leaf for leaf in flatten(value)[0] if isinstance(leaf, StandIn)]


def _getter(name: str) -> Any:
    return getattr(Tensor, name).__get__


_ABOUT_FORM = {
    *map(_getter, ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "grad_fn", "grad")),
    *map(_getter, ("is_cuda", "is_nested", "is_sparse", "is_quantized", "is_meta", "is_cpu", "is_mps", "is_xla")),
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.nelement,
    Tensor.__len__,
    Tensor.is_floating_point,
    Tensor.is_complex,
    Tensor.is_inference,
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
    torch.is_inference,
}
