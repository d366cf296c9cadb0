"""What to measure, when, and where it is written. All of it can be set in a LightningCLI configuration."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from .module_hooks import RECORDED, rss_after_forward, rss_before_forward
from .saved_tensors import keep, unchanged


@dataclass(frozen=True)
class MemProfilerFuncs:
    """Names of the decorated methods that each kind of measurement is made in; ``None``: those of ``default``."""

    default: set[str] | None = None
    """Methods for the kinds that have no set of their own; ``None``: every decorated method."""
    cpu: set[str] | None = None
    """Methods around which the memory of the process is read."""
    cuda: set[str] | None = None
    """Methods around which ``torch.cuda.memory_stats`` is read."""
    cuda_allocator_history: set[str] | None = None
    """Methods in which the history of CUDA's caching allocator is recorded, if that is switched on."""
    fsdp: set[str] | None = None
    """Methods that run under FSDP2's memory tracker, if that is switched on."""

    def collects(self, kind: str, name: str) -> bool:
        """Whether a kind, which is the name of a field, is measured in a decorated method."""
        own: set[str] | None = getattr(self, kind)
        chosen = self.default if own is None else own
        return chosen is None or name in chosen

    def any(self, name: str) -> bool:
        """Whether anything is measured in a decorated method."""
        return any(self.collects(each.name, name) for each in fields(self) if each.name != "default")

    def named(self) -> dict[str, set[str]]:
        """The sets that have been given, by field."""
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        return {kind: names for kind, names in given.items() if names is not None}


@dataclass(frozen=True)
class MemProfilerSchedule:
    """Which calls of a method are measured. Calls are counted from 0, for each method and each phase anew."""

    warmup_iters: int = 0
    """How many calls go by unmeasured first."""
    max_iter: int | None = 10
    """The first call that is not measured any more; ``None``: no end, and files that grow with the training."""

    def includes(self, iteration: int) -> bool:
        """Whether a call is measured."""
        return self.warmup_iters <= iteration and (self.max_iter is None or iteration < self.max_iter)


@dataclass(frozen=True)
class MemoryHooks:
    """Functions, or import paths of functions, that are called around the forward pass of every module."""

    pre_forward: Callable[..., Any] | str = rss_before_forward
    """As ``torch.nn.Module.register_forward_pre_hook`` takes it: ``hook(module, args)``."""
    post_forward: Callable[..., Any] | str = rss_after_forward
    """As ``torch.nn.Module.register_forward_hook`` takes it: ``hook(module, args, output)``."""


@dataclass(frozen=True)
class SavedTensorsFuncs:
    """Functions, or import paths of functions, as ``torch.autograd.graph.saved_tensors_hooks`` takes them."""

    pack: Callable[..., Any] | str = keep
    """Takes a tensor that is kept for the backward pass, after it was counted; returns what is kept in its place."""
    unpack: Callable[..., Any] | str = unchanged
    """Makes that tensor again of what ``pack`` has returned."""


@dataclass(frozen=True)
class MemProfilerCfg:
    """What the profiler measures, when, and where it is written."""

    enabled: bool = True
    """``False``: nothing is set up, and decorated methods are called as if they were not decorated."""
    collect_funcs: MemProfilerFuncs = field(default_factory=MemProfilerFuncs)
    """Which methods are measured, for each kind of measurement."""
    cuda_allocator_history: bool = False
    """Record the history of CUDA's caching allocator; one file for each measured call."""
    track_fsdp_mem: bool = False
    """Run methods under FSDP2's memory tracker, which says what the bytes are used for."""
    fsdp_mem_track_module_depth: int = 2
    """How many levels of modules the tracker's numbers are written for."""
    fsdp_mem_tracker_tabulate: bool = False
    """Write the tracker's text as tables."""
    fsdp_mem_tracker_units: str = "MiB"
    """Unit of the tracker's text: ``B``, ``KiB``, ``MiB`` or ``GiB``. The other files are in bytes."""
    fsdp_mem_tracker_root_module: str = ""
    """Name of the module under ``fully_shard`` that is tracked; empty: the outermost one."""
    dump_memorystats_pickle: bool = False
    """Write each rank's snapshots as a pickle file."""
    dump_memorystats_yaml: bool = True
    """Write each rank's snapshots as a YAML file."""
    schedule: MemProfilerSchedule = field(default_factory=MemProfilerSchedule)
    """Which calls of a method are measured."""
    save_dir: str | None = None
    """Folder of the files; ``None``: the trainer's ``log_dir``, else its ``default_root_dir``."""
    enable_memory_hooks: bool = False
    """Call ``memory_hooks`` around the forward pass of every module while a method is measured."""
    enable_saved_tensors_hooks: bool = True
    """Count the bytes that are kept for the backward pass while a method is measured."""
    memory_hooks: MemoryHooks = field(default_factory=MemoryHooks)
    """What is called around the forward pass of every module."""
    saved_tensors_funcs: SavedTensorsFuncs = field(default_factory=SavedTensorsFuncs)
    """What is kept in place of a tensor that the backward pass needs, for example a copy on another device."""
    save_hook_attrs: tuple[str, ...] = RECORDED
    """The attributes, set on modules by ``memory_hooks``, that are written."""
    retain_hooks_for_funcs: set[str] = field(default_factory=lambda: {"training_step"})
    """Methods after which the hooks stay on to the end of the batch, so that they see its backward pass."""


def imported(function: Callable[..., Any] | str) -> Callable[..., Any]:
    """Return a function, or import it from a path such as ``package.module.function``.

    Raises:
        ValueError: There is none.
    """
    if not isinstance(function, str):
        found: Any = function
    else:
        module, _, name = function.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"expected a function or its import path, got {function!r}: {error}.") from error
    if not callable(found):
        raise ValueError(f"expected a function or its import path, got {function!r}, a {type(found).__name__}.")
    return found  # type: ignore[no-any-return]
