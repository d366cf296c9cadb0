"""The one place that imports PyTorch Lightning, from either of its packages, and that touches its private names.

``lightning`` and the stand-alone ``pytorch_lightning`` carry the same code under two names, but their classes are not
interchangeable. The package that the program has already imported is used, else ``lightning``, else
``pytorch_lightning``.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState
from torch.optim.lr_scheduler import LRScheduler

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
    from lightning.pytorch.strategies import (
        DDPStrategy,
        DeepSpeedStrategy,
        FSDPStrategy,
        ModelParallelStrategy,
        SingleDeviceStrategy,
        Strategy,
    )
    from lightning.pytorch.trainer.states import TrainerFn
    from lightning.pytorch.utilities.types import LRSchedulerConfig
else:

    def _package() -> str:
        names = ("lightning.pytorch", "pytorch_lightning")
        for name in names:
            if name in sys.modules:
                return name
        return names[0] if importlib.util.find_spec("lightning") else names[1]

    _name = _package()
    pl = importlib.import_module(_name)
    EarlyStoppingReason = importlib.import_module(f"{_name}.callbacks.early_stopping").EarlyStoppingReason
    _strategies = importlib.import_module(f"{_name}.strategies")
    DDPStrategy, DeepSpeedStrategy = _strategies.DDPStrategy, _strategies.DeepSpeedStrategy
    FSDPStrategy, ModelParallelStrategy = _strategies.FSDPStrategy, _strategies.ModelParallelStrategy
    SingleDeviceStrategy, Strategy = _strategies.SingleDeviceStrategy, _strategies.Strategy
    TrainerFn = importlib.import_module(f"{_name}.trainer.states").TrainerFn
    LRSchedulerConfig = importlib.import_module(f"{_name}.utilities.types").LRSchedulerConfig
    MisconfigurationException = importlib.import_module(f"{_name}.utilities.exceptions").MisconfigurationException

Callback = pl.Callback
LightningModule = pl.LightningModule
Trainer = pl.Trainer
EarlyStopping = pl.callbacks.EarlyStopping
ModelCheckpoint = pl.callbacks.ModelCheckpoint
ModelPruning = pl.callbacks.ModelPruning
StochasticWeightAveraging = pl.callbacks.StochasticWeightAveraging

__all__ = [
    "AttachableCallback",
    "Callback",
    "DDPStrategy",
    "DeepSpeedStrategy",
    "EarlyStopping",
    "EarlyStoppingReason",
    "FSDPStrategy",
    "InspectableEarlyStopping",
    "LightningModule",
    "MisconfigurationException",
    "ModelCheckpoint",
    "ModelParallelStrategy",
    "ModelPruning",
    "NotifyingModelCheckpoint",
    "SingleDeviceStrategy",
    "StochasticWeightAveraging",
    "Strategy",
    "Trainer",
    "TrainerFn",
    "after_configure_model",
    "around_setup",
    "callbacks_of",
    "default_checkpoint_directory",
    "forget_checkpoints",
    "forget_scores",
    "install_lr_scheduler",
    "install_optimizer",
    "is_default_checkpoint",
    "is_search_checkpoint",
    "load_model_and_precision",
    "loading_with",
    "note_chosen_directory",
    "note_directory",
    "pl",
    "rebuild_ddp",
    "refuse_other_package",
    "remember",
    "remembered",
    "saves_sharded_checkpoints",
    "step_plateau_schedulers",
    "strategy_flags",
    "validation_metrics",
]


def refuse_other_package(trainer: Trainer) -> None:
    """Raise an error if the trainer, or a callback that stops or saves, is of the Lightning package not in use.

    Such an object would do its work, but is an instance of no class that is known here.

    Raises:
        MisconfigurationException: It says which packages are mixed and what to import.
    """
    mine, other = pl.__name__, "pytorch_lightning" if pl.__name__ == "lightning.pytorch" else "lightning.pytorch"
    names = {Trainer.__name__, EarlyStopping.__name__, ModelCheckpoint.__name__}
    for found in (trainer, *callbacks_of(trainer)):
        for kind in type(found).__mro__:
            if kind.__name__ in names and kind.__module__.startswith(f"{other}."):
                raise MisconfigurationException(
                    f"expected one Lightning package, got two: FinetuningScheduler uses `{mine}`, and "
                    f"{type(found).__name__} is of `{other}`. Fix: import everything from `{mine}`; or everything from "
                    f"`{other}`, before `finetuning_scheduler` and without importing `{mine}`."
                )


class AttachableCallback(Callback):
    """A callback that learns of its trainer before any callback's ``setup`` hook has run.

    Lightning calls ``setup`` in list order, and ``EarlyStopping.setup`` replaces the ``None`` of
    ``check_on_train_epoch_end``. Whoever wants to see the user's own arguments has to look before that; the only
    earlier moment is when the trainer hands each callback the module's ``log`` function.
    """

    def on_attach(self, trainer: Trainer) -> None:
        """Called with the trainer that is about to fit, validate, test or predict."""

    @property
    def log(self) -> Any:
        """The module's ``log`` function."""
        return self.__dict__["log"]

    @log.setter
    def log(self, function: Any) -> None:
        self.__dict__["log"] = function
        self.on_attach(function.__self__.trainer)


class InspectableEarlyStopping(EarlyStopping):
    """``EarlyStopping`` whose verdict and moment of checking a subclass can see and change."""

    @property
    def check_on_train_epoch_end(self) -> bool | None:
        """When the check runs: at the end of the training epoch, of validation, or (``None``) not yet decided."""
        return self._check_on_train_epoch_end

    @check_on_train_epoch_end.setter
    def check_on_train_epoch_end(self, value: bool | None) -> None:
        self._check_on_train_epoch_end = value

    def judge(self, current: torch.Tensor) -> tuple[bool, str | None]:
        """Tell whether the session should stop for this value of the monitored quantity, and why."""
        return super()._evaluate_stopping_criteria(current)

    def _validate_condition_metric(self, logs: dict[str, torch.Tensor]) -> bool:
        try:
            return super()._validate_condition_metric(logs)
        except RuntimeError as error:  # it lists the metrics that were logged
            raise MisconfigurationException(str(error)) from error

    def _evaluate_stopping_criteria(self, current: torch.Tensor) -> tuple[bool, str | None]:
        return self.judge(current)


class NotifyingModelCheckpoint(ModelCheckpoint):
    """``ModelCheckpoint`` that tells a subclass of each file it is about to write."""

    def before_save(self, filepath: str) -> None:
        """Called with the path of a checkpoint about to be written, when the best path is already up to date."""

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        self.before_save(filepath)
        super()._save_checkpoint(trainer, filepath)


# What a checkpoint callback learns while it runs; everything else is how it was configured.
_CHECKPOINT_STATE = (
    "_last_checkpoint_saved",
    "_last_global_step_saved",
    "_last_time_checked",
    "best_k_models",
    "best_model_path",
    "best_model_score",
    "current_score",
    "kth_best_model_path",
    "kth_value",
    "last_model_path",
)
_DIRECTORIES = "_given_and_chosen_directory"  # the attribute in which a checkpoint callback is told
_CHECKPOINT_CONFIGURATION = (
    "CHECKPOINT_NAME_LAST",
    "FILE_EXTENSION",
    "_enable_version_counter",
    "_every_n_epochs",
    "_every_n_train_steps",
    "_train_time_interval",
    "auto_insert_metric_name",
    "filename",
    "mode",
    "monitor",
    "save_last",
    "save_on_exception",
    "save_top_k",
    "save_weights_only",
    "verbose",
)


def forget_checkpoints(callback: ModelCheckpoint) -> None:
    """Let a checkpoint callback start anew; it chooses a directory anew, too, unless it has been given one."""
    fresh = vars(ModelCheckpoint(monitor=callback.monitor, mode=callback.mode))
    vars(callback).update({name: fresh[name] for name in _CHECKPOINT_STATE if name in fresh})
    callback.dirpath = vars(callback).get(_DIRECTORIES, (callback.dirpath, None))[0]


def note_directory(callback: ModelCheckpoint, trainer: Trainer) -> None:
    """Note which directory a checkpoint callback has been given; to be asked by every rank, before its ``setup``."""
    if vars(callback).get(_DIRECTORIES, (None, ""))[1] != callback.dirpath:
        chosen = callback.dirpath is None or str(callback.dirpath) == default_checkpoint_directory(trainer)
        vars(callback)[_DIRECTORIES] = (None if chosen else callback.dirpath, callback.dirpath)


def note_chosen_directory(callback: ModelCheckpoint) -> None:
    """Note which directory a trainer has chosen for a checkpoint callback."""
    given, _ = vars(callback).get(_DIRECTORIES, (callback.dirpath, None))
    vars(callback)[_DIRECTORIES] = (given, callback.dirpath)


def forget_scores(callback: EarlyStopping) -> None:
    """Let an early stopping callback start anew."""
    callback.best_score = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)
    callback.stopping_reason, callback.stopping_reason_message = EarlyStoppingReason.NOT_STOPPED, None
    callback.wait_count = callback.stopped_epoch = 0


def default_checkpoint_directory(trainer: Trainer) -> str:
    """Tell where a checkpoint callback saves that has been given no directory; to be asked by every rank."""
    directory: str = ModelCheckpoint()._ModelCheckpoint__resolve_ckpt_dir(trainer)  # type: ignore[attr-defined]
    return directory


def is_default_checkpoint(callback: Callback, trainer: Trainer) -> bool:
    """Whether a callback is configured like the one that a trainer adds by itself.

    Only what use does not change is compared. The directory is chosen when a trainer uses the callback first.
    """
    if type(callback) is not ModelCheckpoint:
        return False
    default = ModelCheckpoint()
    if any(getattr(callback, name) != getattr(default, name) for name in _CHECKPOINT_CONFIGURATION):
        return False
    return callback.dirpath is None or str(callback.dirpath) == str(default_checkpoint_directory(trainer))


def validation_metrics(trainer: Trainer) -> set[str]:
    """Name the metrics that the validation inside a fit has logged."""
    results = trainer.fit_loop.epoch_loop.val_loop._results
    return set(results.metrics(on_step=False)["callback"])


def load_model_and_precision(trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Load a checkpoint's weights, precision state and datamodule state; of the callbacks, those that keep weights.

    The connector's methods run the module's and the precision plugin's own hooks, as at the start of a fit.
    """
    connector = trainer._checkpoint_connector
    previous = connector._loaded_checkpoint
    connector._loaded_checkpoint = dict(checkpoint)
    try:
        connector.restore_datamodule()
        connector.restore_model()
        _return_keepers_of_weights(trainer, connector._loaded_checkpoint)
        connector.restore_precision_plugin_state()
    finally:
        connector._loaded_checkpoint = previous


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
    if isinstance(callback, (AttachableCallback, EarlyStopping, ModelCheckpoint)):
        return False
    state = checkpoint["callbacks"].get(callback.state_key)
    return _holds_weights(state, trainer) or _writes_weights(callback, trainer, checkpoint)


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
    return trainer.strategy.reduce_boolean_decision(rewritten or _holds_weights(added, trainer), all=False)


def _holds_weights(value: object, trainer: Trainer) -> bool:
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


@contextmanager
def after_configure_model(module: LightningModule, action: Callable[[], None]) -> Iterator[None]:
    """Call ``action`` whenever the module's ``configure_model`` has run.

    It is the only moment between the module getting its layers and the strategy setting it up, and Lightning offers it
    to the module alone. For as long as this lasts, the module counts as one that overrides ``configure_model``.
    """
    own = module.configure_model

    def configure_model() -> None:
        own()
        action()

    with _replaced(module, "configure_model", configure_model):
        yield


@contextmanager
def around_setup(
    trainer: Trainer, module: LightningModule, *, before_optimizers: Callable[[], None], after: Callable[[], None]
) -> Iterator[None]:
    """Call functions while the strategy sets up the module, when there is no hook yet.

    ``before_optimizers`` is called before the module's ``configure_optimizers``, when the module has been wrapped and
    moved, and ``after`` when the optimizers exist: before any callback's ``on_fit_start``, in which some already train.
    """
    configure, set_up = module.configure_optimizers, trainer.strategy.setup

    def configure_optimizers() -> Any:
        before_optimizers()
        return configure()

    def setup(trainer: Trainer) -> None:
        with _replaced(module, "configure_optimizers", configure_optimizers):
            set_up(trainer)
        after()

    with _replaced(trainer.strategy, "setup", setup):
        yield


_SEARCHES = (".lr_find_", ".scale_batch_size_")  # what Lightning's finders call their temporary checkpoints


def is_search_checkpoint(path: object) -> bool:
    """Whether a checkpoint is one that a search for a learning rate or a batch size goes back to."""
    return path is not None and str(path).rpartition("/")[2].startswith(_SEARCHES)


def remember(trainer: Trainer, fit: object) -> None:
    """Keep the last fit of a trainer with it, whichever callback object has carried it out."""
    vars(trainer)["_finetuning_fit"] = fit


def remembered(trainer: Trainer) -> Any:
    """Return the last fit of a trainer, if there is one."""
    return vars(trainer).get("_finetuning_fit")


@contextmanager
def loading_with(strategy: Strategy, load: Callable[[str, bool | None], dict[str, Any]]) -> Iterator[None]:
    """Let ``load`` read the next checkpoint that the strategy is asked for; those after it are read as usual.

    Strategies that load checkpoints after ``on_fit_start`` load the optimizer's state too, and nothing tells earlier
    which checkpoint a run is resumed from.
    """
    usual = strategy.load_checkpoint
    with ExitStack() as replacement:

        def load_checkpoint(checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
            if is_search_checkpoint(checkpoint_path):
                return usual(checkpoint_path, weights_only)
            replacement.close()
            return load(str(checkpoint_path), weights_only)

        replacement.enter_context(_replaced(strategy, "load_checkpoint", load_checkpoint))
        yield


@contextmanager
def _replaced(instance: object, method: str, function: Callable[..., Any]) -> Iterator[None]:
    """Replace a method of one instance for a while."""
    before = vars(instance).get(method)
    vars(instance)[method] = function
    try:
        yield
    finally:
        vars(instance).pop(method, None)
        if before is not None:
            vars(instance)[method] = before


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the trainer's own list of callbacks, which its hooks go through."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    return callbacks


def strategy_flags(trainer: Trainer) -> set[str]:
    """Return the names by which a user may know the trainer's strategy: what was asked for, and what it is called."""
    asked = trainer._accelerator_connector._strategy_flag
    names = {type(trainer.strategy).__name__, getattr(trainer.strategy, "strategy_name", "")}
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


def step_plateau_schedulers(trainer: Trainer) -> None:
    """Step the schedulers that wait for a metric, for the epoch that has just ended, as Lightning would have."""
    for config in trainer.lr_scheduler_configs:
        due = config.reduce_on_plateau and config.interval == "epoch" and trainer.current_epoch % config.frequency == 0
        if due and config.monitor in trainer.callback_metrics:
            trainer.lightning_module.lr_scheduler_step(config.scheduler, trainer.callback_metrics[config.monitor])
