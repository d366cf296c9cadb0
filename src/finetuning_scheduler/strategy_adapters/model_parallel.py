"""FSDP2 and tensor parallel: parameters are distributed tensors, sharded when the module's layers are made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from .._lightning import ModelParallelStrategy, TrainerFn, saves_sharded_checkpoints
from ..core.optim.param_groups import mesh_of
from ..core.schedule.schedule import Schedule
from ..core.session import Session
from ..core.sharding.fully_shard import FSDPPlan
from ..core.sharding.replicas import check_replicas
from ..core.view import ModelView
from ..errors import Problem, ScheduleError
from . import loading
from .base import StrategyAdapter
from .limits import averaged_weights, gradient_clipping, stateless_optimizers


class ModelParallelStrategyAdapter(StrategyAdapter):
    """Serve ``ModelParallelStrategy``: modules sharded by a plan, beside those sharded in ``configure_model``.

    Args:
        fsdp_plan: By name of a module, or regular expression that matches whole names, the arguments of
            ``torch.distributed.fsdp.fully_shard`` for it (``None`` for none). It is carried out in order after
            ``configure_model``, so inner modules come before those that hold them; modules that are sharded already are
            left alone. Two more arguments can be written in a configuration file: ``act_ckpt``, activation
            checkpointing as ``"composable"``, ``"wrapped"`` or ``"wrapped_offload"`` (which also moves what is kept to
            the CPU), alone or in a list with the arguments of ``torch.utils.checkpoint.checkpoint``, and
            ``cpu_offload_policy``, ``True`` or the arguments of ``CPUOffloadPolicy``.
        fsdp_default_kwargs: Arguments of each module that gives none of that name. The mesh is the strategy's
            ``data_parallel`` one unless given. Here and in the plan ``mp_policy`` may be the arguments of
            ``MixedPrecisionPolicy``, with types by name.
    """

    def __init__(
        self,
        fsdp_plan: Mapping[str, Mapping[str, Any] | None] | None = None,
        fsdp_default_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._settled: set[nn.Module] = set()
        self._plan = FSDPPlan(fsdp_plan or {}, fsdp_default_kwargs or {})

    @property
    def _strategy(self) -> ModelParallelStrategy:
        return cast("ModelParallelStrategy", self.trainer.strategy)

    def connect(self, fts_parent: Any) -> None:
        """Refuse averaged weights, before a callback that averages copies the module if it is listed later."""
        super().connect(fts_parent)
        if self.trainer.state.fn == TrainerFn.FITTING and (problems := list(averaged_weights(self.trainer))):
            raise ScheduleError(problems)

    def on_model_configured(self) -> None:
        """Carry out the plan."""
        self._plan.apply(self.trainer.lightning_module, self._strategy.device_mesh["data_parallel"])

    def problems(self, view: ModelView, schedule: Schedule) -> Iterable[Problem]:
        """Find parameters that nobody would keep equal on all ranks, and what Lightning cannot do."""
        names = [name for phase in schedule.phases for name in phase.params]
        yield from self._unsharded(view, names)
        if gradient_clipping(self.trainer) and len({mesh_of(view.tensors[name]) for name in names}) > 1:
            message = (
                "expected gradients that can be clipped together, got those of plain tensors or of several meshes "
                "beside distributed ones"
            )
            fix = "Override `configure_gradient_clipping`, or parallelise the modules that hold plain tensors too."
            yield Problem(message, fix=fix)
        if saves_sharded_checkpoints(self._strategy):
            return
        yield from stateless_optimizers(self.trainer, schedule)
        if any(isinstance(module, ActivationWrapper) for module in view.model.modules()):
            message = (
                "expected distributed checkpoints of a model with wrappers for activation checkpointing, since "
                "Lightning cannot load full ones into it, got save_distributed_checkpoint=False"
            )
            fix = "Use act_ckpt: composable, or ModelParallelStrategy(save_distributed_checkpoint=True)."
            yield Problem(message, fix=fix)

    def _unsharded(self, view: ModelView, names: Iterable[str]) -> Iterator[Problem]:
        """Find parameters whose gradients nobody would average over the data-parallel ranks."""
        mesh = self._strategy.device_mesh
        if (ranks := mesh["data_parallel"].size()) == 1:
            return
        alone = [name for name in names if mesh_of(view.tensors[name]) in (None, mesh["tensor_parallel"])]
        if alone:
            message = (
                f"expected every parameter to thaw in a module that `fully_shard` has sharded, since {ranks} "
                f"data-parallel ranks share out the data, got {', '.join(alone)}"
            )
            yield Problem(message, fix="Shard the module that holds them, in `configure_model` or by `fsdp_plan`.")

    def on_phase_thawed(self) -> None:
        """Let each unit that now has something to train settle the precision in which it reduces gradients.

        A unit does so before its first forward pass, by the parameters that require gradients then; if there are none,
        gradients of parameters thawed later are reduced in the precision of the computation (PyTorch issue 186998).
        """
        for module in self.trainer.lightning_module.modules():
            if not isinstance(module, FSDPModule) or module in self._settled:
                continue
            if any(parameter.requires_grad for parameter in _own_parameters(module)):
                module.unshard()
                module.reshard()
                self._settled.add(module)

    def check_replicas(self, parameters: Iterable[nn.Parameter]) -> None:
        """Compare the plain tensors, of which every rank has a copy."""
        plain = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
        expected = (
            "plain tensors to begin equal and to get equal gradients: does `seed_everything` come before the module is "
            "made, and do the ranks of a tensor-parallel group get the same rows?"
        )
        check_replicas(plain, self._strategy.root_device, expected)

    def resume(self, path: str, session: Session, *, weights_only: bool | None) -> dict[str, Any]:
        """Load with the groups of the checkpoint's phase."""
        return loading.resume(self.trainer, path, session, weights_only=weights_only)

    def restore(self, path: str, session: Session, state_key: str) -> None:
        """Load with the groups that the optimizer had in the checkpoint's phase."""
        loading.restore(self.trainer, path, session, state_key)


def _own_parameters(unit: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters of a unit without those of the units inside it."""
    yield from unit.parameters(recurse=False)
    for child in unit.children():
        if not isinstance(child, FSDPModule):
            yield from _own_parameters(child)
