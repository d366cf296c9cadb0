"""Fully sharded data parallel, the first version: each unit's parameters are flattened into one tensor and sharded.

With ``use_orig_params=True`` the module goes on having a parameter for each of the original ones, a part of the flat
tensor; each can be frozen and thawed. With ``use_orig_params=False`` there is the flat tensor alone, so all that is in
it has to thaw at the same time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

from torch import nn

from .._lightning import FSDPStrategy, LightningModule, saves_sharded_checkpoints
from ..core.plan import block_numbers
from ..core.schedule.generate import generate
from ..core.schedule.schedule import Schedule
from ..core.session import Session
from ..core.sharding.flat_parameters import (
    flat_view,
    is_wrapped,
    names_in,
    paths_of,
    renew_backward_hooks,
    units,
    with_overrides,
)
from ..core.sharding.modules import select_modules
from ..core.sharding.units import Unit
from ..core.view import ModelView
from ..errors import Problem, ScheduleError
from . import loading
from .base import StrategyAdapter
from .limits import averaged_weights, gradient_clipping, saves_optimizers, stateless_optimizers


class FSDPStrategyAdapter(StrategyAdapter):
    """Serve ``FSDPStrategy``.

    Args:
        awp_overrides: Names of modules, or regular expressions that match whole names, to be units of their own beside
            those that the strategy's ``auto_wrap_policy`` makes.
    """

    def __init__(self, awp_overrides: Sequence[str] = ()) -> None:
        super().__init__()
        if isinstance(awp_overrides, str):
            raise TypeError(f"expected `awp_overrides` to be a list of names, got {awp_overrides!r}")
        self._overrides = list(awp_overrides)
        self._users_arguments: dict[str, Any] | None = None  # of the strategy, while it has others
        self._wrapped_before = self._wraps_itself = False

    @property
    def _strategy(self) -> FSDPStrategy:
        return cast("FSDPStrategy", self.trainer.strategy)

    @property
    def _root(self) -> nn.Module:
        """The module that the strategy trains: a unit around the LightningModule, unless that wraps itself."""
        return cast("nn.Module", self._strategy.model)

    @property
    def _flattened(self) -> bool:
        return not self._strategy.kwargs.get("use_orig_params")

    def connect(self, fts_parent: Any) -> None:
        """Note whether an earlier fit has wrapped the module already."""
        super().connect(fts_parent)
        self._wrapped_before = is_wrapped(self.trainer.lightning_module)

    def on_model_configured(self) -> None:
        """Add the overrides to the policy by which the strategy is about to wrap the module."""
        module = self.trainer.lightning_module
        self._wraps_itself = is_wrapped(module) and not self._wrapped_before
        if not self._overrides or self._wrapped_before:
            return
        if self._wraps_itself:
            message = "expected `awp_overrides` with a model that FSDP wraps, got one wrapped in `configure_model`"
            raise ScheduleError(Problem(message, fix="Drop `awp_overrides` and wrap those modules there too."))
        selected = select_modules(module, self._overrides, "`awp_overrides`")
        chosen = {part for modules in selected.values() for _, part in modules}
        own = self._users_arguments = self._strategy.kwargs
        self._strategy.kwargs = {**own, "auto_wrap_policy": with_overrides(own.get("auto_wrap_policy"), chosen)}

    def on_set_up(self) -> None:
        """Give the strategy the user's policy back."""
        if self._users_arguments is not None:
            self._strategy.kwargs, self._users_arguments = self._users_arguments, None

    def view(self, module: LightningModule) -> ModelView:
        """Take names and shapes from what is known of the flat tensors."""
        return flat_view(module, self._root)

    def problems(self, view: ModelView, schedule: Schedule) -> Iterable[Problem]:
        """Find what FSDP or Lightning's use of it cannot do; without original parameters, units of several phases."""
        yield from averaged_weights(self.trainer)
        yield from stateless_optimizers(self.trainer, schedule)
        if gradient_clipping(self.trainer) == "norm":
            message = "expected gradients clipped by value, the only way in Lightning's FSDPStrategy, got by norm"
            fix = (
                'Set gradient_clip_algorithm="value", or override `configure_gradient_clipping` to call '
                "self.trainer.strategy.model.clip_grad_norm_(gradient_clip_val)."
            )
            yield Problem(message, fix=fix)
        yield from self._outside(schedule)
        if not self._flattened:
            return
        if getattr(self.trainer.lightning_module, "no_decay", None):
            message = "expected no `no_decay` list with FSDP's use_orig_params=False, which merges parameters, got one"
            yield Problem(message, fix="Use FSDPStrategy(use_orig_params=True), or drop the module's `no_decay`.")
        if saves_optimizers(self.trainer) and not saves_sharded_checkpoints(self._strategy):
            message = "expected sharded checkpoints with FSDP's use_orig_params=False, since PyTorch cannot save the "
            message += 'optimizer whole, got state_dict_type="full"'
            yield Problem(message, fix='Use FSDPStrategy(state_dict_type="sharded").')
        yield from self._misaligned(view, schedule)
        yield from self._blocks_apart(view, schedule)

    def on_phase_thawed(self) -> None:
        """Let units take part in the backward pass anew."""
        renew_backward_hooks(self._root)

    def resume(self, path: str, session: Session, *, weights_only: bool | None) -> dict[str, Any]:
        """Load with the groups of the checkpoint's phase."""
        return loading.resume(self.trainer, path, session, weights_only=weights_only)

    def restore(self, path: str, session: Session, state_key: str) -> None:
        """Load with the groups that the optimizer had in the checkpoint's phase."""
        loading.restore(self.trainer, path, session, state_key)

    def _outside(self, schedule: Schedule) -> Iterator[Problem]:
        """Find parameters in no unit, whose gradients nobody would average over the ranks."""
        if self.trainer.world_size == 1:
            return
        held = names_in(self._root, paths_of(self.trainer.lightning_module))
        alone = [name for phase in schedule.phases for name in phase.params if name not in held]
        if alone:
            message = f"expected every parameter to thaw in a module that FSDP wraps, got {', '.join(alone)}"
            yield Problem(message, fix="Wrap the module that holds them too, and do not let FSDP ignore it.")

    def _blocks_apart(self, view: ModelView, schedule: Schedule) -> Iterator[Problem]:
        """Find units over several blocks where `lr_decay` is to give each block a learning rate of its own."""
        decaying = {name for phase in schedule.phases if phase.lr_decay is not None for name in phase.params}
        if not decaying:
            return
        number_of = block_numbers(generate(view.plain, "blocks"))
        for path, flat in units(self._root):
            names = view.names_of[id(flat)]
            if decaying.issuperset(names) and len({number_of[name] for name in names}) > 1:
                message = (
                    f"expected a unit for each block, since `lr_decay` gives each a learning rate of its own, got the "
                    f"unit {path or type(view.plain).__name__} over several"
                )
                yield Problem(message, fix="Add the blocks to `awp_overrides`, or use_orig_params=True.")

    def _misaligned(self, view: ModelView, schedule: Schedule) -> Iterator[Problem]:
        phase_of = {name: number for number, phase in enumerate(schedule.phases) for name in phase.params}
        found = [Unit(path, view.names_of[id(flat)], phase_of, view.plain) for path, flat in units(self._root)]
        separations = [(unit, unit.separation()) for unit in found if not unit.is_aligned]
        overrides = [*self._overrides, *(name for _, apart in separations for name in apart or ())]
        for unit, apart in separations:
            message = f"expected what FSDP flattens into one tensor to thaw in one phase, got the unit {unit}"
            yield Problem(message, fix=self._alignment_fix(overrides, fixable=apart is not None))

    def _alignment_fix(self, overrides: Sequence[str], *, fixable: bool) -> str:
        if not fixable:
            return "Give each module's own parameters one phase, or use FSDPStrategy(use_orig_params=True)."
        if self._wraps_itself:
            return f"Wrap these modules too in `configure_model`: {', '.join(overrides)}."
        return f"Use strategy_adapter_cfg={{'awp_overrides': {list(dict.fromkeys(overrides))}}}."
