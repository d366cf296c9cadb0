"""What a user can set besides the schedule, in any loop."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal

import torch

from ..errors import Problem
from .schedule.values import plain
from .thaw import FrozenModulesMode

FrozenPrefixMode = Literal["off", "validation", "all"]


@dataclass(frozen=True)
class Settings:
    """How a schedule is executed. ``FinetuningScheduler`` and ``PhaseRunner`` take these as arguments of their own.

    Attributes:
        max_depth: Deepest phase to execute; -1, or more than the schedule has, executes all of it.
        base_max_lr: Learning rate of a phase after the first that names none; ``None`` takes the initial learning rate
            of phase 0's first parameter group.
        no_decay: Fragments of names whose parameters get a group with ``weight_decay=0`` in each phase.
        restore_best: Restore the best state so far before each transition.
        enforce_phase0_params: Make the optimizer hold exactly phase 0's parameters.
        apply_lambdas_new_pgs: New parameter groups start at their learning rate times the present value of a
            scheduler's last ``lr_lambda``, which they follow in any case.
        frozen_bn_track_running_stats: Frozen BatchNorm layers go on tracking their running statistics.
        frozen_modules_mode: ``"train"`` leaves module modes alone; ``"eval"`` keeps modules whose parameters are all
            frozen in eval mode during training.
        frozen_prefix: What runs before the first trained parameter is computed once a sample and replayed: nowhere
            (``"off"``), in validation, or in training too (``"all"``, with ``frozen_modules_mode="eval"``).
        prefix_budget: Bytes of memory for what is replayed; ``None`` for a quarter of what is free. The rest goes to
            files.
        prefix_dir: Where these files are, in a directory of their own that is removed at the end; ``None`` for the
            system's directory of temporary files.
        prefix_dtype: A floating-point type in which it is kept, such as ``torch.bfloat16``, which rounds it; ``None``
            keeps it as it is.
    """

    max_depth: int = -1
    base_max_lr: float | None = 1e-5
    no_decay: Collection[str] = ()
    restore_best: bool = True
    enforce_phase0_params: bool = True
    apply_lambdas_new_pgs: bool = False
    frozen_bn_track_running_stats: bool = True
    frozen_modules_mode: FrozenModulesMode = "train"
    frozen_prefix: FrozenPrefixMode = "off"
    prefix_budget: int | None = None
    prefix_dir: str | PathLike[str] | None = None
    prefix_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        """Take scalars of numpy for the numbers and switches that they are."""
        for name in ("max_depth", "base_max_lr", *_FLAGS):
            object.__setattr__(self, name, plain(getattr(self, name)))
        depth: Any = self.max_depth
        object.__setattr__(self, "max_depth", -1 if depth is None else depth)

    def problems(self) -> Iterator[Problem]:
        """List what is not of the right kind."""
        depth: Any = self.max_depth
        if not _is_integer(depth) or depth < -1:
            message = f"expected `max_depth` to be -1 or a phase, got {depth!r}"
            yield Problem(message, fix="Use -1 for all phases.")
        lr: Any = self.base_max_lr
        if lr is not None and not _is_positive_number(lr):
            fix = "Use a learning rate above 0, or None for that of phase 0."
            yield Problem(f"expected `base_max_lr` to be a number above 0, got {lr!r}", fix=fix)
        yield from self._no_decay_problems()
        for name in _FLAGS:
            yield from flag_problems(name, getattr(self, name))
        if self.frozen_modules_mode not in ("train", "eval"):
            message = f"expected `frozen_modules_mode` to be 'train' or 'eval', got {self.frozen_modules_mode!r}"
            yield Problem(message, fix="Use 'train' to leave module modes alone.")
        yield from self._prefix_problems()

    def _no_decay_problems(self) -> Iterator[Problem]:
        fragments: Any = self.no_decay
        is_list = isinstance(fragments, (list, tuple, set, frozenset))
        if not (is_list and all(isinstance(part, str) and part for part in fragments)):
            fix = 'Make it a list, such as ["bias", "LayerNorm.weight"].'
            yield Problem(f"expected `no_decay` to be a list of name fragments, got {fragments!r}", fix=fix)

    def _prefix_problems(self) -> Iterator[Problem]:
        mode: Any = self.frozen_prefix
        if mode not in ("off", "validation", "all"):
            message = f"expected `frozen_prefix` to be 'off', 'validation' or 'all', got {mode!r}"
            yield Problem(message, fix="Use 'off' to compute everything in each step.")
        elif mode == "all" and self.frozen_modules_mode != "eval":
            message = f"expected frozen_modules_mode='eval' with frozen_prefix='all', got {self.frozen_modules_mode!r}"
            yield Problem(message, fix="Set frozen_modules_mode='eval', or reuse in validation only.")
        budget: Any = self.prefix_budget
        if budget is not None and (not _is_integer(budget) or budget < 0):
            message = f"expected `prefix_budget` to be a number of bytes, got {budget!r}"
            yield Problem(message, fix="Use None for a quarter of the free memory.")
        directory: Any = self.prefix_dir
        if directory is not None and not isinstance(directory, (str, PathLike)):
            message = f"expected `prefix_dir` to be a path, got {directory!r}"
            yield Problem(message, fix="Use None for the system's directory of temporary files.")
        dtype: Any = self.prefix_dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            message = f"expected `prefix_dtype` to be a floating-point type, got {dtype!r}"
            yield Problem(message, fix="Use torch.bfloat16, or None to keep outputs as they are.")


_FLAGS = ("restore_best", "enforce_phase0_params", "apply_lambdas_new_pgs", "frozen_bn_track_running_stats")


def flag_problems(name: str, value: object) -> Iterator[Problem]:
    """Find a switch that is neither on nor off."""
    if not isinstance(plain(value), bool):
        yield Problem(f"expected `{name}` to be True or False, got {value!r}", fix="Use True or False.")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_positive_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
