"""What the tests train on several ranks: the toys in their distributed forms, strategies, a recorder, and runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullOptimStateDictConfig as FullOptimizerStateDictConfig
from torch.distributed.fsdp import (
    FullStateDictConfig,
    FullyShardedDataParallel,
    OptimStateKeyType,
    StateDictType,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.optim import Optimizer
from torch.utils.data import TensorDataset

from . import harness, history, toys
from .history import Epoch
from .loop import ReferenceLoop, train
from .networks import CLASSIFICATION, FIRST, HEAD, NORM, SECOND, THIRD, Residual, Share
from .recipe import Recipe, adamw, momentum_sgd, phases_of

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")

SCHEDULE: dict[int, dict[str, Any]] = {
    0: {"params": [*HEAD], "max_transition_epoch": 2},
    1: {"params": [*THIRD, *SECOND], "lr": 0.05, "max_transition_step": 14},
    2: {"params": [*NORM, *FIRST], "lr": 0.02, "max_transition_epoch": 6},
}
AN_EPOCH_EACH: dict[int, dict[str, Any]] = {
    0: {"params": [*HEAD], "max_transition_epoch": 1},
    1: {"params": [*THIRD, *SECOND], "lr": 0.01, "max_transition_epoch": 2},
    2: {"params": [*NORM, *FIRST], "lr": 0.01, "max_transition_epoch": 3},
}
RECIPE = Recipe(
    phases=phases_of(AN_EPOCH_EACH),
    epochs=6,
    optimizer=adamw,
    network=Residual,
    task=CLASSIFICATION,
    restore_best=False,
)


# --- on one device, without the package ------------------------------------------------------------------------------


def recipe_of(schedule: Mapping[int, Mapping[str, Any]] = AN_EPOCH_EACH, **changes: Any) -> Recipe:
    return replace(RECIPE, phases=phases_of(schedule), **changes)


def on_one_device(schedule: Mapping[int, Mapping[str, Any]] = AN_EPOCH_EACH, **changes: Any) -> list[Epoch]:
    """What the reference loop trains on whole batches, without restoring unless the recipe is changed so."""
    return train(recipe_of(schedule, **changes)).epochs


class MixedPrecisionLoop(ReferenceLoop):
    """Trains as two ranks do that compute in bfloat16 and average gradients in float32."""

    def backward(self, x: Tensor, y: Tensor) -> None:
        shares = [self.gradients_in_bfloat16(x[rank::2], y[rank::2]) for rank in range(2)]
        for name, parameter in self.parameters.items():
            if parameter.requires_grad:
                parameter.grad = torch.stack([share[name].float() for share in shares]).mean(0)

    def gradients_in_bfloat16(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        low = copy.deepcopy(self.model).bfloat16()
        self.recipe.task.loss(low(x.bfloat16()), y).backward()
        return {name: parameter.grad for name, parameter in low.named_parameters() if parameter.grad is not None}


# --- modules ---------------------------------------------------------------------------------------------------------


class Classifier(toys.Toy):
    """Each rank sees its part of the data, as its strategy counts data-parallel ranks."""

    penalty = 0.0  # what each epoch adds to the monitored loss

    def __init__(self, optimizer: Callable[[Any], Optimizer] = momentum_sgd) -> None:
        super().__init__(replace(RECIPE, optimizer=optimizer))

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        loss = self.loss(batch) + self.penalty * self.trainer.current_epoch
        self.log("val_loss", loss, sync_dist=True, batch_size=len(batch[0]))

    def optimizer_parameters(self) -> Any:
        return [parameter for parameter in self.trainer.model.parameters() if parameter.requires_grad]

    def train_dataloader(self) -> Share:
        return self.share(self.recipe.task.training())

    def val_dataloader(self) -> Share:
        return self.share(self.recipe.task.validation())

    def share(self, data: TensorDataset) -> Share:
        place = getattr(self.trainer.strategy, "distributed_sampler_kwargs", None) or {"rank": 0, "num_replicas": 1}
        return Share(data, self.recipe.task.batch_size, place["rank"], place["num_replicas"])


class Worsening(Classifier):
    """The first epoch's checkpoint stays the best one."""

    penalty = 100.0


class Compiled(Classifier):
    """One layer is compiled."""

    def configure_model(self) -> None:
        self.network.second = torch.compile(self.network.second, backend="aot_eager")


class Sharded(Classifier):
    """FSDP2: every layer and the whole are units."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for layer in self.network.children():
            fully_shard(layer, mesh=mesh)
        fully_shard(self.network, mesh=mesh)


class RootSharded(Classifier):
    """FSDP2: one unit."""

    def configure_model(self) -> None:
        fully_shard(self.network, mesh=self.device_mesh["data_parallel"])


class WrappedByItself(Classifier):
    """FSDP1, wrapped in `configure_model`: every layer and the whole are units."""

    def __init__(self, optimizer: Callable[[Any], Optimizer] = momentum_sgd, use_orig_params: bool = True) -> None:
        super().__init__(optimizer)
        self.options = {"device_id": torch.device("cpu"), "use_orig_params": use_orig_params}

    def configure_model(self) -> None:
        for name, layer in self.network.named_children():
            setattr(self.network, name, FullyShardedDataParallel(layer, **self.options))
        self.network = FullyShardedDataParallel(self.network, **self.options)


class LayersWrapped(Classifier):
    """FSDP1, wrapped in `configure_model`: every layer is a unit, the whole is none."""

    def configure_model(self) -> None:
        for name, layer in self.network.named_children():
            setattr(self.network, name, FullyShardedDataParallel(layer, device_id=torch.device("cpu")))


class HalfSharded(Classifier):
    """FSDP2: two layers are units, the others are left to the adapter's plan."""

    def configure_model(self) -> None:
        for layer in (self.network.second, self.network.head):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])


class ParallelizedOnly(Classifier):
    """Two layers tensor parallel, the others plain tensors; left to a plan to be sharded over another dimension."""

    def configure_model(self) -> None:
        plan = {"second": ColwiseParallel(), "third": RowwiseParallel()}
        parallelize_module(self.network, self.device_mesh["tensor_parallel"], plan)


class TensorParallel(ParallelizedOnly):
    """Two layers tensor parallel, the others plain tensors; with a data-parallel dimension, sharded over it too."""

    def configure_model(self) -> None:
        super().configure_model()
        if self.device_mesh["data_parallel"].size() > 1:
            for layer in self.network.children():
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.network, mesh=self.device_mesh["data_parallel"])


class WorseningSharded(Worsening, Sharded):
    pass


class WorseningTensorParallel(Worsening, TensorParallel):
    pass


# --- strategies ------------------------------------------------------------------------------------------------------


class FSDPOnCPU(FSDPStrategy):
    """Lightning's FSDP strategy on CPUs: with the device named, and full checkpoints gathered without an off-load."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        if not any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            model = FullyShardedDataParallel(
                model,
                cpu_offload=self.cpu_offload,
                mixed_precision=self.mixed_precision_config,
                sharding_strategy=self.sharding_strategy,
                device_id=torch.device("cpu"),
                **self.kwargs,
            )
            self.kwargs.pop("auto_wrap_policy", None)  # what follows sees that the module is wrapped
        return super()._setup_model(model)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        if self._state_dict_type == "sharded":
            return super().lightning_module_state_dict()
        with _full_state(self.model, rank0_only=True):
            return self.model.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if self._state_dict_type == "sharded":
            return super().optimizer_state(optimizer)
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        with _full_state(self.model, rank0_only=True):
            state = FullyShardedDataParallel.optim_state_dict(self.model, optimizer)
            if self.global_rank == 0:
                state = FullyShardedDataParallel.rekey_optim_state_dict(state, OptimStateKeyType.PARAM_ID, self.model)
            return state


@contextmanager
def _full_state(model: nn.Module, rank0_only: bool) -> Iterator[None]:
    options = {"offload_to_cpu": False, "rank0_only": rank0_only}
    with FullyShardedDataParallel.state_dict_type(
        model, StateDictType.FULL_STATE_DICT, FullStateDictConfig(**options), FullOptimizerStateDictConfig(**options)
    ):
        yield


def ddp(**options: Any) -> Strategy:
    return DDPStrategy(process_group_backend="gloo", **options)


def fsdp(**options: Any) -> Strategy:
    """FSDP1, every layer and the whole a unit."""
    return FSDPOnCPU(**({"auto_wrap_policy": ModuleWrapPolicy({nn.Linear, nn.LayerNorm})} | options))


def fsdp_cpu_offload(**options: Any) -> Strategy:
    """FSDP1 with parameters off-loaded; memory of a CPU needs neither pinning nor streams, which it does not have."""
    torch.Tensor.pin_memory = lambda self, *_, **__: self
    torch.cpu.Stream.synchronize = lambda self: None
    return fsdp(cpu_offload=True, **options)


def fsdp2(ranks: int = 2, **options: Any) -> Strategy:
    return ModelParallelStrategy(ranks, 1, process_group_backend="gloo", **options)


def tensor_parallel(ranks: int = 2, **options: Any) -> Strategy:
    return ModelParallelStrategy(1, ranks, process_group_backend="gloo", **options)


def mesh_2d(**options: Any) -> Strategy:
    return ModelParallelStrategy(2, 2, process_group_backend="gloo", **options)


def make_trainer(root: Path, ranks: int, strategy: Strategy | str = "auto", **options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {"use_distributed_sampler": False, "enable_checkpointing": False}
    return toys.make_trainer(root, devices=ranks, strategy=strategy, **(defaults | options))


# --- observation -----------------------------------------------------------------------------------------------------


class Recorder(toys.Recorder):
    """Records weights in full and under the names that they have on one device."""

    @property
    def epochs(self) -> list[Epoch]:
        return self.history.epochs

    def weights(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        return whole_weights(trainer.strategy.model)

    def groups(self, pl_module: pl.LightningModule, optimizer: Optimizer) -> tuple[tuple[str, ...], ...]:
        names = {id(parameter): names_in(name, parameter) for name, parameter in pl_module.named_parameters()}
        return tuple(
            tuple(sorted(n for p in group["params"] for n in names[id(p)])) for group in optimizer.param_groups
        )


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter in full on every rank. All ranks must call it."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=False))
    return {plain_name(name): value.detach().clone() for name, value in state.items()}


def local_weights(module: nn.Module) -> dict[str, Tensor]:
    """What this rank holds itself; replicas under DDP."""
    return {plain_name(name): value.detach().clone() for name, value in module.named_parameters()}


def names_in(name: str, parameter: nn.Parameter) -> list[str]:
    """The one-device names of a parameter: its own, or those that FSDP with ``use_orig_params=False`` has merged."""
    prefix = plain_name(name).removesuffix("_flat_param")
    merged = getattr(parameter, "_fqns", None)
    return [plain_name(name)] if merged is None else [prefix + part for part in merged]


def plain_name(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


# Ranks sum in another order than one device does.
TOLERANCE = 1e-5
assert_same_epochs = partial(history.assert_same_epochs, tolerance=TOLERANCE)
assert_same_weights = partial(history.assert_same_weights, tolerance=TOLERANCE)


# --- scheduled runs --------------------------------------------------------------------------------------------------


def fit(
    root: Path,
    ranks: int,
    strategy: Callable[[], Any] | str = "auto",
    module: Callable[[Any], Classifier] = Classifier,
    optimizer: Callable[[Any], Any] = adamw,
    schedule: dict[int, dict[str, Any]] = AN_EPOCH_EACH,
    adapter: dict[str, Any] | None = None,
    max_depth: int = -1,
    resume_from: str | None = None,
    extra: Callable[[Path], Any] | None = None,
    **options: Any,
) -> list[Epoch]:
    """Train by a schedule, without restoring; further options are the trainer's."""
    from finetuning_scheduler import FinetuningScheduler

    scheduler = FinetuningScheduler(schedule, max_depth, restore_best=False, strategy_adapter_cfg=adapter)
    recorder = Recorder(lambda: scheduler.curr_depth)
    strategy = strategy if isinstance(strategy, str) else strategy()
    callbacks = [scheduler, recorder, *([extra(root)] if extra is not None else [])]
    trainer = make_trainer(root, ranks, strategy, callbacks=callbacks, **options)
    trainer.fit(module(optimizer), ckpt_path=resume_from)
    return recorder.epochs


def refused(*arguments: Any, **options: Any) -> str:
    """The message of a run that is refused before training."""
    with pytest.raises(MisconfigurationException) as error:
        fit(*arguments, **options)
    return str(error.value)


def refused_message(root: Path, strategy: Callable[[], Any], ranks: int = 2, **options: Any) -> str:
    """The message that every rank of a refused run gives."""
    messages = harness.run_ranks(partial(refused, **options), ranks, root, ranks, strategy)
    assert set(messages) == {messages[0]}
    return messages[0]
