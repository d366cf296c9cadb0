"""DDP: what the reducer sends, hooks and settings, replicas, processes that Lightning starts."""

from __future__ import annotations

import os
import weakref
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from tests.reference import cases, harness
from tests.reference.cases import SCHEDULE, Classifier
from tests.reference.recipe import adamw, momentum_sgd

HEAD_SIZE, UPPER_SIZE, LOWER_SIZE = 68, 272 + 272, 32 + 144


def test_gradients_of_frozen_parameters_are_not_sent(tmp_path: Path) -> None:
    for numbers in harness.run_ranks(count_reduced_elements, 2, tmp_path):
        upper = HEAD_SIZE + UPPER_SIZE
        assert numbers == [HEAD_SIZE] * 2 + [upper] + [upper + LOWER_SIZE] * 3


def count_reduced_elements(root: Path) -> list[int]:
    """Count the elements that the reducer knows at the end of each epoch."""
    from finetuning_scheduler import FinetuningScheduler

    counts: list[int] = []

    class Count(cases.pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            sizes = trainer.strategy.model._get_ddp_logging_data()["bucket_sizes"]  # bytes of float32, by bucket
            counts.append(sum(int(size) for size in sizes.split(",")) // 4)

    callbacks = [FinetuningScheduler(SCHEDULE, restore_best=False), Count()]
    cases.make_trainer(root, 2, cases.ddp(), callbacks=callbacks, max_epochs=20).fit(Classifier(adamw))
    return counts


class WriteWeights(cases.pl.Callback):
    """The launched processes' own memory is gone when they return; each leaves its weights behind."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        torch.save(cases.local_weights(pl_module), self.root / f"rank-{trainer.global_rank}.pt")


def launch(root: Path, devices: int, strategy: str) -> None:
    """Let Lightning start the processes itself."""
    from finetuning_scheduler import FinetuningScheduler

    for name in ("LOCAL_RANK", "RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    root.mkdir()
    callbacks = [FinetuningScheduler(SCHEDULE), WriteWeights(root)]
    cases.make_trainer(root, devices, strategy, callbacks=callbacks, max_epochs=20, enable_checkpointing=True).fit(
        Classifier(momentum_sgd)
    )


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_notebook", "ddp_fork_find_unused_parameters_true", "ddp_spawn"])
def test_processes_that_lightning_forks_equal_one_device(strategy: str, tmp_path: Path) -> None:
    harness.run_ranks(launch, 1, tmp_path / "one", 1, "auto")
    harness.run_ranks(launch, 1, tmp_path / "two", 2, strategy)
    expected = torch.load(tmp_path / "one" / "rank-0.pt", weights_only=True)
    for rank in range(2):
        weights = torch.load(tmp_path / "two" / f"rank-{rank}.pt", weights_only=True)
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("flag", ["ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true"])
def test_the_strategy_can_be_asked_for_by_name(flag: str, tmp_path: Path) -> None:
    expected = cases.on_one_device()
    for epochs in harness.run_ranks(cases.fit, 2, tmp_path, 2, flag):
        cases.assert_same_epochs(epochs, expected)


def fit_ddp_replicas(root: Path) -> list[dict[str, torch.Tensor]]:
    from finetuning_scheduler import FinetuningScheduler

    seen: list[dict[str, torch.Tensor]] = []

    class Watch(cases.pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            seen.append(cases.local_weights(pl_module))

    trainer = cases.make_trainer(
        root, 2, cases.ddp(), callbacks=[FinetuningScheduler(SCHEDULE, restore_best=False), Watch()], max_epochs=20
    )
    trainer.fit(Classifier(adamw))
    return seen


@pytest.mark.quick
def test_replicas_are_bitwise_identical_after_every_step(tmp_path: Path) -> None:
    first, second = harness.run_ranks(fit_ddp_replicas, 2, tmp_path)
    assert len(first) == len(second) > 20
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def counting_hook(sent, bucket):  # DDP refuses annotations that are not evaluated
    """Average as DDP does, and note how many elements went out."""
    sent[int(bucket.buffer().numel())] += 1
    return allreduce_hook(None, bucket)


class Hooked(Classifier):
    """Registers a communication hook; Lightning registers the strategy's own on GPUs only."""

    def __init__(self, sent: Counter[int]) -> None:
        super().__init__(adamw)
        self.sent = sent

    def on_fit_start(self) -> None:
        self.trainer.strategy.model.register_comm_hook(self.sent, counting_hook)


def fit_with_a_hook(root: Path) -> tuple[Counter[int], dict[str, bool]]:
    from finetuning_scheduler import FinetuningScheduler

    sent: Counter[int] = Counter()
    strategy = cases.ddp(gradient_as_bucket_view=True)
    settings: dict[str, bool] = {}

    class Look(cases.pl.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            settings["gradient_as_bucket_view"] = trainer.strategy.model.gradient_as_bucket_view

    callbacks = [FinetuningScheduler(SCHEDULE, restore_best=False), Look()]
    cases.make_trainer(root, 2, strategy, callbacks=callbacks, max_epochs=20).fit(Hooked(sent))
    settings["wraps with init_sync"] = "init_sync" in strategy._ddp_kwargs
    return sent, settings


def test_hooks_and_settings_survive_every_thaw(tmp_path: Path) -> None:
    for sent, settings in harness.run_ranks(fit_with_a_hook, 2, tmp_path):
        upper = HEAD_SIZE + UPPER_SIZE
        assert sent == {HEAD_SIZE: 8, upper: 6, upper + LOWER_SIZE: 10}  # elements sent in a step: steps
        assert settings == {"gradient_as_bucket_view": True, "wraps with init_sync": False}


class PowerSGD(Classifier):
    """Registers a hook that remembers an error for each bucket of gradients."""

    def on_fit_start(self) -> None:
        state = PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2, min_compression_rate=0.5)
        self.trainer.strategy.model.register_comm_hook(state, powerSGD_hook)


def test_a_hook_that_remembers_buckets_goes_on_with_those_of_the_next_phase(tmp_path: Path) -> None:
    first, second = harness.run_ranks(partial(cases.fit, module=PowerSGD), 2, tmp_path, 2, cases.ddp)
    assert [epoch.phase for epoch in first] == [0, 1, 2]
    cases.assert_same_epochs(first, second, tolerance=0)


class WatchReducers(cases.pl.Callback):
    """Counts the reducers that are there when another is made, and sees whether weights are sent again."""

    def __init__(self) -> None:
        self.alive: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()
        self.others_when_made: list[int] = []
        self.frozen_weight_kept = False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        make = DistributedDataParallel.__init__

        def counted(reducer: Any, *arguments: Any, **options: Any) -> None:
            self.others_when_made.append(len(self.alive))
            make(reducer, *arguments, **options)
            self.alive.add(reducer)

        self.alive.add(trainer.strategy.model)
        DistributedDataParallel.__init__ = counted
        if harness.rank() == 1:
            pl_module.network.first.bias.data.fill_(7.0)  # frozen until the last phase

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 1:  # phase 1
            self.frozen_weight_kept = bool((pl_module.network.first.bias == 7.0).all())


def watch_reducers(root: Path) -> tuple[list[int], bool]:
    from finetuning_scheduler import FinetuningScheduler

    watch = WatchReducers()
    callbacks = [FinetuningScheduler(cases.AN_EPOCH_EACH, max_depth=1, restore_best=False), watch]
    cases.make_trainer(root, 2, cases.ddp(), callbacks=callbacks).fit(Classifier(adamw))
    return watch.others_when_made, watch.frozen_weight_kept


def test_the_old_reducer_goes_first_and_weights_are_not_sent_again(tmp_path: Path) -> None:
    (others, _), (also, kept) = harness.run_ranks(watch_reducers, 2, tmp_path)
    assert others == also == [0]
    assert kept


class Disturb(cases.pl.Callback):
    """Changes one rank's replica before each step of an epoch. List it before the scheduler."""

    def __init__(self, layer: str, epoch: int) -> None:
        self.layer, self.epoch = layer, epoch

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.current_epoch == self.epoch and harness.rank() == 1:
            with torch.no_grad():
                pl_module.get_parameter(f"network.{self.layer}.weight")[0, 0] += 1e-3


class SaveFirstEpoch(cases.pl.Callback):
    def __init__(self, root: Path) -> None:
        self.root = root

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.root / "first.ckpt")


def fit_disturbed(root: Path, layer: str, epoch: int, resume_from: Path | None = None) -> tuple[str, int]:
    from finetuning_scheduler import FinetuningScheduler

    callbacks = [Disturb(layer, epoch), FinetuningScheduler(SCHEDULE, restore_best=False)]
    trainer = cases.make_trainer(root, 2, cases.ddp(), callbacks=callbacks, max_epochs=20)
    with pytest.raises(RuntimeError) as error:
        trainer.fit(Classifier(adamw), ckpt_path=resume_from)
    return str(error.value), trainer.global_step


DRIFT = "The ranks' copies of the model differ after the first step of a phase (ranks [1] from rank 0). Expected"


def test_replicas_that_drift_apart_end_the_run_after_the_first_step_of_a_phase(tmp_path: Path) -> None:
    for message, step in harness.run_ranks(fit_disturbed, 2, tmp_path, "third", 2):
        assert message.startswith(DRIFT)
        assert step == 9  # two epochs of four steps, and one


def test_replicas_are_compared_after_the_first_step_of_a_resumed_run_too(tmp_path: Path) -> None:
    """The run is resumed inside phase 0, where no transition is due for an epoch."""
    harness.run_ranks(partial(cases.fit, schedule=SCHEDULE, extra=SaveFirstEpoch), 2, tmp_path, 2, cases.ddp)
    for message, step in harness.run_ranks(fit_disturbed, 2, tmp_path, "head", 1, tmp_path / "first.ckpt"):
        assert message.startswith(DRIFT)
        assert step == 5  # an epoch of four steps, and one


def overlapping(parameters: Any) -> torch.optim.Optimizer:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(
        parameters, optimizer_class=torch.optim.SGD, lr=0.1, momentum=0.9, overlap_with_ddp=True
    )


def refused(root: Path, optimizer: Any) -> str:
    from finetuning_scheduler import FinetuningScheduler

    trainer = cases.make_trainer(root, 2, cases.ddp(), callbacks=[FinetuningScheduler(SCHEDULE, restore_best=False)])
    with pytest.raises(MisconfigurationException) as error:
        trainer.fit(Classifier(optimizer))
    return str(error.value)


def test_a_zero_redundancy_optimizer_that_overlaps_is_refused(tmp_path: Path) -> None:
    for message in harness.run_ranks(partial(refused, optimizer=overlapping), 2, tmp_path):
        assert message == (
            "expected the optimizer to step by itself, got overlap_with_ddp=True. "
            "Fix: Make the optimizer without `overlap_with_ddp`."
        )
