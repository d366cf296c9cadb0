"""Counting what autograd keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, UntypedStorage, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy

from ._torch import version


class Kept(NamedTuple):
    """A tensor that is kept for the backward pass."""

    tensor: Tensor
    version: int


def keep(tensor: Tensor) -> Kept:
    """Keep a tensor as it is, without its history, which would hold the tensor in a circle."""
    return Kept(tensor.detach(), version(tensor))


def unchanged(kept: Kept) -> Tensor:
    """Give a tensor back.

    Raises:
        RuntimeError: It was changed in place; PyTorch says so itself only where there are no hooks.
    """
    if version(kept.tensor) != kept.version:
        raise RuntimeError(
            f"expected a tensor as it was when it was kept for the backward pass, got one of shape "
            f"{list(kept.tensor.shape)} that was modified by an inplace operation since."
        )
    return kept.tensor


class Count:
    """Bytes of storages that were packed; each storage is counted once, however many tensors look at it."""

    def __init__(self) -> None:
        self.bytes = 0
        # Weak references keep a storage's identity, not its memory: a later one at the same address is another one.
        self.seen: set[StorageWeakRef] = set()


class SavedTensors:
    """Counts tensors that are kept for the backward pass, but for a model's parameters.

    Args:
        model: Whose parameters are not counted.
        pack: Called with each tensor after it was counted.
        unpack: Called with what ``pack`` returned.
    """

    def __init__(self, model: nn.Module, pack: Callable[..., Any], unpack: Callable[..., Any]) -> None:
        self._model = model
        self._pack_function, self._unpack_function = pack, unpack
        self._parameters: set[StorageWeakRef] = set()
        self._sharded = False
        self.counts: list[Count] = []

    @contextmanager
    def on(self) -> Iterator[None]:
        """Count into each of ``counts``."""
        self._parameters = references(self._model.parameters())
        self._sharded = any(isinstance(part, (FSDPModule, FullyShardedDataParallel)) for part in self._model.modules())
        try:
            with saved_tensors_hooks(self._pack, self._unpack_function):
                yield
        finally:
            self._parameters = set()

    def _pack(self, tensor: Tensor) -> Any:
        for storage in storages(tensor):
            self._add(reference_to(storage), storage.nbytes())
        return self._pack_function(tensor)

    def _add(self, reference: StorageWeakRef, size: int) -> None:
        new = [count for count in self.counts if reference not in count.seen]
        if not new or reference in self._parameters or (self._sharded and self._gathered(reference)):
            return
        for count in new:
            count.seen.add(reference)
            count.bytes += size

    def _gathered(self, reference: StorageWeakRef) -> bool:
        """Whether a storage holds parameters now: those that are sharded have another one during the forward pass."""
        gathered = references(self._model.parameters())
        self._parameters |= gathered
        return reference in gathered


def references(tensors: Iterable[Tensor]) -> set[StorageWeakRef]:
    """Refer to all storages of tensors."""
    return {reference_to(storage) for tensor in tensors for storage in storages(tensor)}


def reference_to(storage: UntypedStorage) -> StorageWeakRef:
    """Refer to a storage without keeping its memory."""
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]


def storages(tensor: Tensor) -> Iterator[UntypedStorage]:
    """Yield what a tensor's elements are kept in: none for sparse ones, those of its parts for distributed ones."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        for part in (getattr(tensor, name) for name in names):
            if isinstance(part, Tensor):
                yield from storages(part)
    elif tensor.layout is torch.strided and not is_lazy(tensor):
        yield tensor.untyped_storage()
