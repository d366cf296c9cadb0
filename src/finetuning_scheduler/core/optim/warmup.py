"""Linear warm-up of the groups a phase adds, over whatever LR scheduler is in force."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..steps import stepping


@dataclass
class Ramp:
    """A warm-up in progress: of which groups, over how many steps, and how many of these are done."""

    group_indices: Sequence[int]
    steps: int
    done: int = 0


class Warmup:
    """Scale the learning rates of some groups while the optimizer steps, and only then.

    Step ``i`` (from 0) of a ramp of ``n`` steps uses ``i / n`` of the learning rate, as the warm-up schedules of
    ``transformers`` do. LR schedulers never see the scaled values, so that recursive ones are not disturbed.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._ramps: dict[int, Ramp] = {}
        self._unscaled: dict[int, Any] = {}
        self._handles: list[RemovableHandle] = []

    def start(self, phase: int, group_indices: Sequence[int], steps: int) -> None:
        """Begin a phase's ramp over ``steps`` optimizer steps of the groups at these positions."""
        self._ramps[phase] = Ramp(group_indices, steps)
        self.attach(self._optimizer)

    def attach(self, optimizer: Optimizer) -> None:
        """Go on with this optimizer, which has the same groups as the one before."""
        self.settle()
        self._detach()
        self._optimizer = optimizer
        if self._ramps:
            inner = stepping(optimizer) or optimizer  # a wrapper has the groups of the one inside, but no hooks
            # One by one: what is attached is known, and detached, if attaching the next one fails.
            self._handles.append(inner.register_step_pre_hook(self._scale))
            self._handles.append(inner.register_step_post_hook(self._step_done))
            # An exception in a step must not leave scaled learning rates in what is saved because of it.
            self._handles.append(inner.register_state_dict_pre_hook(lambda _: self.settle()))

    def settle(self) -> None:
        """Undo a scaling that an exception in the middle of a step left behind."""
        for index, lr in self._unscaled.items():
            self._optimizer.param_groups[index]["lr"] = lr
        self._unscaled.clear()

    @property
    def ramps(self) -> dict[int, Ramp]:
        """Copy the ramps in progress, by phase."""
        return dict(self._ramps)

    def go_on(self, optimizer: Optimizer, ramps: Mapping[int, Ramp]) -> None:
        """Go on with these ramps and this optimizer."""
        self._ramps = dict(ramps)
        self.attach(optimizer)

    def load_state_dict(self, done: Mapping[int, int]) -> None:
        """Go on with so many steps done, by phase, all ramps having been started again."""
        self._ramps = {phase: ramp for phase, ramp in self._ramps.items() if phase in done}
        for phase, ramp in self._ramps.items():
            ramp.done = done[phase]
        self.attach(self._optimizer)

    def _scale(self, optimizer: Optimizer, *_: Any) -> None:
        self.settle()
        for ramp in self._ramps.values():
            for index in ramp.group_indices:
                group = optimizer.param_groups[index]
                self._unscaled[index] = group["lr"]
                group["lr"] = group["lr"] * (ramp.done / ramp.steps)

    def _step_done(self, *_: Any) -> None:
        self.settle()
        for ramp in self._ramps.values():
            ramp.done += 1
        # The hooks stay, doing nothing: PyTorch is going through them at this moment.
        self._ramps = {phase: ramp for phase, ramp in self._ramps.items() if ramp.done < ramp.steps}

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
