"""What a trainer steps, saves and loads."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from .callbacks import AttachableCallback, callbacks_of
from .package import (
    Callback,
    DDPStrategy,
    EarlyStopping,
    FSDPStrategy,
    LightningDataModule,
    LightningModule,
    LRSchedulerConfig,
    ModelCheckpoint,
    ModelParallelStrategy,
    Strategy,
    StrategyRegistry,
    Trainer,
)


def load_model_and_precision(
    trainer: Trainer, checkpoint: Mapping[str, Any], load: Callable[[], None] | None = None
) -> None:
    """Load a checkpoint's weights, precision state and datamodule state; of the callbacks, those that keep weights.

    The connector's methods run the module's and the precision plugin's own hooks, as at the start of a fit.

    Args:
        trainer: The trainer.
        checkpoint: What it loads.
        load: Loads the weights instead, if no hook asks for them.
    """
    connector = trainer._checkpoint_connector
    previous = connector._loaded_checkpoint
    connector._loaded_checkpoint = dict(checkpoint)
    try:
        connector.restore_datamodule()
        connector.restore_model() if load is None else load()
        _return_keepers_of_weights(trainer, connector._loaded_checkpoint)
        connector.restore_precision_plugin_state()
    finally:
        connector._loaded_checkpoint = previous


def hooks_ask_for_weights(trainer: Trainer) -> bool:
    """Whether code of the user's has its say when weights are loaded: then it needs all of them, as they were saved."""
    module, plugin = trainer.lightning_module, trainer.precision_plugin
    kinds = [type(callback) for callback in callbacks_of(trainer) if not _is_known(callback)]
    return (
        type(module).on_load_checkpoint is not LightningModule.on_load_checkpoint
        or type(module).load_state_dict is not nn.Module.load_state_dict
        or any(name in vars(module) for name in ("on_load_checkpoint", "load_state_dict"))
        or type(plugin).on_load_checkpoint is not LightningModule.on_load_checkpoint  # one base class of both
        or any(kind.on_load_checkpoint is not Callback.on_load_checkpoint for kind in kinds)
    )


def loads_in_its_own_way(strategy: Strategy) -> bool:
    """Whether a strategy has a way of its own to load the weights or the optimizer's state."""
    names = ("load_model_state_dict", "load_optimizer_state_dict", "lightning_module_state_dict")
    kind = type(strategy)
    return any(getattr(kind, name) is not getattr(Strategy, name) for name in names)


def datamodule_of(trainer: Trainer) -> LightningDataModule | None:
    """Return the datamodule of a fit, if it has one."""
    datamodule: LightningDataModule | None = trainer.datamodule  # type: ignore[attr-defined]  # set by a connector
    return datamodule


def loaded_optimizer_state(trainer: Trainer) -> object:
    """Return what a checkpoint that is being resumed from has for the only optimizer; ``None`` if it has nothing."""
    states = trainer._checkpoint_connector._loaded_checkpoint.get("optimizer_states")
    return states[0] if isinstance(states, list) and states else None


def _return_keepers_of_weights(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Let callbacks that keep or rewrite weights, such as averages, return to a checkpoint's moment; others go on.

    They are asked in the order of Lightning's own resume: when the module has its weights, which a callback may have
    rewritten in the file.
    """
    keepers = [callback for callback in callbacks_of(trainer) if _keeps_weights(callback, trainer, checkpoint)]
    for callback in keepers:
        callback.on_load_checkpoint(trainer, trainer.lightning_module, checkpoint)
    for callback in keepers:
        if state := checkpoint["callbacks"].get(callback.state_key):
            callback.load_state_dict(deepcopy(state))


def _keeps_weights(callback: Callback, trainer: Trainer, checkpoint: Mapping[str, Any]) -> bool:
    """Whether a callback has put weights into its state in a checkpoint, or puts them into what is saved."""
    if _is_known(callback):
        return False
    state = checkpoint["callbacks"].get(callback.state_key)
    return holds_weights(state, trainer) or _writes_weights(callback, trainer, checkpoint)


def _is_known(callback: Callback) -> bool:
    """Whether a callback is of a kind that keeps no weights."""
    return isinstance(callback, (AttachableCallback, EarlyStopping, ModelCheckpoint))


def _writes_weights(callback: Callback, trainer: Trainer, checkpoint: Mapping[str, Any]) -> bool:
    """Let a callback that also reads checkpoints have a throw-away one to save, and see what it does to weights."""
    kind = type(callback)
    if Callback.on_save_checkpoint is kind.on_save_checkpoint or Callback.on_load_checkpoint is kind.on_load_checkpoint:
        return False
    weights = trainer.strategy.lightning_module_state_dict()
    before = {**checkpoint, "state_dict": dict(weights)}
    saved = dict(before)
    callback.on_save_checkpoint(trainer, trainer.lightning_module, saved)
    written = saved.get("state_dict", {})
    rewritten = written.keys() != weights.keys() or any(written[name] is not weights[name] for name in weights)
    added = [value for key, value in saved.items() if value is not before.get(key)]
    # Under some strategies rank zero alone sees the weights; what the callback does next may need all ranks.
    return trainer.strategy.reduce_boolean_decision(rewritten or holds_weights(added, trainer), all=False)


def holds_weights(value: object, trainer: Trainer) -> bool:
    """Whether a value of a checkpoint has a tensor for each of those that the optimizer's first group trains.

    They train from the start, so that who averages anything averages them. Other tensors of a callback, such as
    metrics by class, may have the shape of one of them, but hardly of each.
    """
    trained = Counter(parameter.shape for parameter in trainer.optimizers[0].param_groups[0]["params"])
    return bool(trained) and trained <= Counter(tensor.shape for tensor in _tensors(value))


def _tensors(value: object) -> Iterator[torch.Tensor]:
    """Go through the tensors in nested mappings and sequences."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def strategy_flags(trainer: Trainer) -> set[str]:
    """Return the names by which a user may know the trainer's strategy.

    That is what was asked for, its class, and the plainest name under which Lightning has it: ``"ddp"`` of the strategy
    ``"ddp_find_unused_parameters_true"`` or of an object, too.
    """
    asked, kind = trainer._accelerator_connector._strategy_flag, type(trainer.strategy)
    registered = [name for name, entry in StrategyRegistry.items() if entry["strategy"] is kind]
    names = {kind.__name__, getattr(trainer.strategy, "strategy_name", ""), min(registered, key=len, default="")}
    return {name for name in (*names, asked) if isinstance(name, str) and name}


def saves_sharded_checkpoints(strategy: FSDPStrategy | ModelParallelStrategy) -> bool:
    """Whether each rank saves its shards, instead of rank zero everything in one file."""
    if isinstance(strategy, FSDPStrategy):
        return strategy._state_dict_type == "sharded"
    return strategy._save_distributed_checkpoint


def rebuild_ddp(trainer: Trainer) -> None:
    """Wrap the module anew, so that gradients of exactly the parameters that require them are reduced.

    ``DistributedDataParallel`` looks at ``requires_grad`` once, when it is made. The weights are equal on all ranks
    already and are not sent again.
    """
    strategy = cast("DDPStrategy", trainer.strategy)
    settings = strategy._ddp_kwargs
    hooks = list(getattr(strategy.model, "_comm_hooks", ()))  # the strategy's and the user's own
    # The old reducer goes first: two would hold buckets at the same time.
    strategy.model = None
    strategy._ddp_kwargs = {**settings, "init_sync": False}
    try:
        strategy.model = strategy._setup_model(trainer.lightning_module)
    finally:
        strategy._ddp_kwargs = settings
    for hook, state in hooks:
        if isinstance(state, PowerSGDState):  # what it remembers of each bucket does not fit the new ones
            for memory in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
                memory.clear()
        strategy.model.register_comm_hook(state, hook)


def begins_epoch_again(checkpoint: dict[str, Any]) -> bool:
    """Let a checkpoint that is written as an epoch starts say that the one before has just ended; tell if it is one.

    A run that is resumed from what Lightning writes there does not train the epoch: its counters of batches are still
    those of the epoch before. From the end of that epoch on, Lightning continues exactly.
    """
    loop = checkpoint["loops"]["fit_loop"]
    total, current = loop["epoch_progress"]["total"], loop["epoch_progress"]["current"]
    starts = total["ready"] - 1 == total["started"] == total["processed"] == total["completed"]
    if not (starts and current["completed"] and loop["epoch_loop.batch_progress"]["current"]["ready"]):
        return False
    _count_epochs(checkpoint, -1)
    return True


def goes_on_in_epoch(checkpoint: dict[str, Any]) -> None:
    """Take back what :func:`begins_epoch_again` has made of a checkpoint: the program that wrote it is still there."""
    _count_epochs(checkpoint, 1)


def _count_epochs(checkpoint: dict[str, Any], number: int) -> None:
    progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]
    for counters in (progress["total"], progress["current"]):
        counters["ready"] += number
        counters["completed"] += number


def installer(trainer: Trainer) -> Callable[[], None]:
    """Return a function that lets the trainer step again what it steps now."""
    strategy = trainer.strategy
    optimizers, configs = strategy.optimizers, strategy.lr_scheduler_configs

    def install() -> None:
        strategy.optimizers, strategy.lr_scheduler_configs = optimizers, configs

    return install


def install_optimizer(trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
    """Let the trainer step this optimizer from now on."""
    trainer.strategy.optimizers = [optimizer]


def install_lr_scheduler(trainer: Trainer, scheduler: LRScheduler, settings: Mapping[str, Any]) -> None:
    """Let the trainer step this LR scheduler, and no other, from now on.

    Args:
        trainer: The trainer.
        scheduler: The scheduler.
        settings: Fields of Lightning's ``LRSchedulerConfig``.
    """
    trainer.strategy.lr_scheduler_configs = [LRSchedulerConfig(scheduler, **settings)]


def optimizer_states(trainer: Trainer) -> dict[str, Any]:
    """Return what a checkpoint has of the optimizers and LR schedulers that the trainer steps."""
    return {
        "optimizer_states": [trainer.strategy.optimizer_state(each) for each in trainer.optimizers],
        "lr_schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
    }


def step_plateau_schedulers(trainer: Trainer) -> list[str]:
    """Step the schedulers that wait for a metric, for the epoch that has just ended, as Lightning would have.

    Returns:
        The metrics that are not known, for whose schedulers the step is left out.
    """
    unknown = []
    for config in trainer.lr_scheduler_configs:
        due = config.reduce_on_plateau and config.interval == "epoch" and trainer.current_epoch % config.frequency == 0
        if due and config.monitor in trainer.callback_metrics:
            trainer.lightning_module.lr_scheduler_step(config.scheduler, trainer.callback_metrics[config.monitor])
        elif due:
            unknown.append(str(config.monitor))
    return unknown


def scheduler_step_of(module: LightningModule) -> Callable[[LRScheduler], None] | None:
    """Return how the module makes a step of an LR scheduler, on a copy of the module; ``None`` if in the usual way."""
    if getattr(module.lr_scheduler_step, "__func__", None) is LightningModule.lr_scheduler_step:
        return None
    stand_in = copy.copy(module)  # what it counts is counted there
    stand_in.trainer = module.trainer

    def step(scheduler: LRScheduler) -> None:
        stand_in.lr_scheduler_step(scheduler, 1.0 if isinstance(scheduler, ReduceLROnPlateau) else None)

    return step
