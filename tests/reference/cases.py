"""What the tests train on several ranks: a small network, data that ranks share out, strategies, and a recorder.

A combined batch has ``BATCH`` rows; rank r of W takes the rows ``r::W`` of it. As the loss is a mean, a run on W ranks
equals a run on one device that is given whole batches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from torch.optim import SGD, AdamW, Optimizer

from . import harness

FEATURES, WIDTH, CLASSES = 8, 16, 4
ROWS, BATCH = 32, 8
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")

HEAD = ("network.head.bias", "network.head.weight")
THIRD = ("network.third.bias", "network.third.weight")
SECOND = ("network.second.bias", "network.second.weight")
NORM = ("network.norm.bias", "network.norm.weight")
FIRST = ("network.first.bias", "network.first.weight")


# --- network and data ------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Four linear layers and a LayerNorm; every layer is a wrap unit of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.third = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.first(x)))
        x = x + torch.tanh(self.third(torch.tanh(self.second(x))))
        return self.head(x)


def build_network() -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(20)
        return Network()


class Batches:
    """A rank's part of each combined batch, the same in every epoch."""

    def __init__(self, seed: int, rank: int = 0, ranks: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(ROWS, FEATURES, generator=generator)
        y = torch.randint(CLASSES, (ROWS,), generator=generator)
        whole = zip(x.split(BATCH), y.split(BATCH), strict=True)
        self.batches = [(x[rank::ranks], y[rank::ranks]) for x, y in whole]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)


def sgd(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.1, momentum=0.9)


def adamw(parameters: Any) -> Optimizer:
    return AdamW(parameters, lr=0.01, weight_decay=0.01)


class Classifier(pl.LightningModule):
    """Trains the network; each rank sees its part of the data, as its strategy counts data-parallel ranks."""

    penalty = 0.0  # what each epoch adds to the monitored loss

    def __init__(self, optimizer: Callable[[Any], Optimizer] = sgd) -> None:
        super().__init__()
        self.network = build_network()
        self.optimizer = optimizer

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("val_loss", loss + self.penalty * self.trainer.current_epoch, sync_dist=True, batch_size=len(batch[0]))

    def configure_optimizers(self) -> Optimizer:
        return self.optimizer([p for p in self.trainer.model.parameters() if p.requires_grad])

    def train_dataloader(self) -> Batches:
        return self._batches(seed=1)

    def val_dataloader(self) -> Batches:
        return self._batches(seed=2)

    def _batches(self, seed: int) -> Batches:
        place = getattr(self.trainer.strategy, "distributed_sampler_kwargs", None) or {"rank": 0, "num_replicas": 1}
        return Batches(seed, place["rank"], place["num_replicas"])


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

    def __init__(self, optimizer: Callable[[Any], Optimizer] = sgd, use_orig_params: bool = True) -> None:
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


class TensorParallel(Classifier):
    """Two layers tensor parallel, the others plain tensors; with a data-parallel dimension, sharded over it too."""

    def configure_model(self) -> None:
        plan = {"second": ColwiseParallel(), "third": RowwiseParallel()}
        parallelize_module(self.network, self.device_mesh["tensor_parallel"], plan)
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
    defaults: dict[str, Any] = {
        "default_root_dir": root,
        "accelerator": "cpu",
        "devices": ranks,
        "strategy": strategy,
        "use_distributed_sampler": False,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_epochs": 6,
    }
    return pl.Trainer(**(defaults | options))


# --- mixed precision by hand -----------------------------------------------------------------------------------------


def mixed_precision_by_hand(schedule: dict[int, dict[str, Any]], ranks: int = 2) -> list[dict[str, Tensor]]:
    """Train as ranks do that compute in bfloat16 and average gradients in float32; weights at the end of each epoch.

    Each phase of the schedule ends at its `max_transition_epoch`; phase 0 has the optimizer's own learning rate.
    """
    network = build_network()
    parameters = {f"network.{name}": parameter for name, parameter in network.named_parameters()}
    optimizer: Any = None
    history: list[dict[str, Tensor]] = []
    for phase in schedule.values():
        fresh = [parameters[name] for name in phase["params"]]
        if optimizer is None:
            optimizer = sgd(fresh)
        else:
            optimizer.add_param_group({"params": fresh, "lr": phase["lr"]})
        while len(history) < phase["max_transition_epoch"]:
            for batches in zip(*(Batches(1, rank, ranks) for rank in range(ranks)), strict=True):
                gradients = [bfloat16_gradients(network, batch) for batch in batches]
                for name, parameter in network.named_parameters():
                    parameter.grad = torch.stack([gradient[name].float() for gradient in gradients]).mean(0)
                optimizer.step()
            history.append({name: parameter.detach().clone() for name, parameter in parameters.items()})
    return history


def bfloat16_gradients(network: Network, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    low = copy.deepcopy(network).bfloat16()
    nn.functional.cross_entropy(low(batch[0].bfloat16()), batch[1]).backward()
    return {name: parameter.grad for name, parameter in low.named_parameters()}


# --- observation -----------------------------------------------------------------------------------------------------


@dataclass
class Epoch:
    """A rank's state at the end of one epoch; weights are whole, under the names they have on one device."""

    epoch: int
    phase: int
    weights: dict[str, Tensor]
    groups: list[list[str]]
    lrs: list[float]


@dataclass
class Recorder(pl.Callback):
    """Records every epoch's end. List it after the callback under test."""

    phase_of: Callable[[], int] = lambda: 0
    epochs: list[Epoch] = field(default_factory=list)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        (optimizer,) = trainer.optimizers
        self.epochs.append(
            Epoch(
                trainer.current_epoch,
                self.phase_of(),
                whole_weights(trainer.strategy.model),
                group_names(pl_module, optimizer),
                [group["lr"] for group in optimizer.param_groups],
            )
        )


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter in full on every rank. All ranks must call it."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=False))
    return {plain_name(name): value.detach().clone() for name, value in state.items()}


def local_weights(module: nn.Module) -> dict[str, Tensor]:
    """What this rank holds itself; replicas under DDP."""
    return {plain_name(name): value.detach().clone() for name, value in module.named_parameters()}


def group_names(module: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    names = {id(parameter): names_in(name, parameter) for name, parameter in module.named_parameters()}
    return [sorted(n for p in group["params"] for n in names[id(p)]) for group in optimizer.param_groups]


def names_in(name: str, parameter: nn.Parameter) -> list[str]:
    """The one-device names of a parameter: its own, or those that FSDP with ``use_orig_params=False`` has merged."""
    prefix = plain_name(name).removesuffix("_flat_param")
    merged = getattr(parameter, "_fqns", None)
    return [plain_name(name)] if merged is None else [prefix + part for part in merged]


def plain_name(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def assert_same_epochs(actual: list[Epoch], expected: list[Epoch], tolerance: float = 1e-5) -> None:
    """Compare two runs epoch by epoch."""
    assert [(e.epoch, e.phase, e.groups) for e in actual] == [(e.epoch, e.phase, e.groups) for e in expected]
    for one, other in zip(actual, expected, strict=True):
        assert one.lrs == other.lrs, f"epoch {one.epoch}"
        torch.testing.assert_close(
            one.weights,
            other.weights,
            rtol=0,
            atol=tolerance,
            msg=lambda text, epoch=one.epoch: f"epoch {epoch}: {text}",
        )


# --- scheduled runs --------------------------------------------------------------------------------------------------

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
