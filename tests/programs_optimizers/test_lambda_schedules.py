"""LambdaLR and MultiplicativeLR, and so every schedule of ``transformers``, act on the groups that phases add.

A group that enters at ``lr`` when the scheduler has counted to ``e`` has, at count ``c`` > ``e``, ``lr * lambda(c)``
under LambdaLR and the product over the steps since it entered under MultiplicativeLR.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    LambdaLR,
    LRScheduler,
    MultiplicativeLR,
    SequentialLR,
)

from tests.core_programs.loops import BATCHES_PER_EPOCH, LOWER_LR, UPPER_LR, differing, momentum_sgd

from .toys import Fit, LearningRates, Toy, phases, plain_fit, prepared

EPOCHS = 6
PHASE_1_EPOCH, PHASE_2_EPOCH = 2, 4
HEAD_LR = 0.1
FACTORS = (0.9, 0.5, 1.25, 0.8, 1.1)

Function = Callable[[int], float]


def factor(count: int) -> float:
    return FACTORS[count % len(FACTORS)]


def one(_: int) -> float:
    return 1.0


class Decay:
    """A lambda with a state that LambdaLR saves."""

    def __init__(self, base: float) -> None:
        self.base = base

    def __call__(self, count: int) -> float:
        return self.base**count


class OwnLambdaLR(LambdaLR):
    """A subclass as users write it."""


@dataclass(frozen=True)
class Row:
    """A scheduler over one group and the function it applies; ``recursive`` as MultiplicativeLR does."""

    make: Callable[[Optimizer], LRScheduler]
    function: Function
    recursive: bool = False

    def rate(self, lr: float, entered: int, count: int, *, scaled: bool) -> float:
        """The rate at ``count`` of a group that entered at ``lr`` and count ``entered``, scaled at once or not."""
        if not self.recursive:
            return lr * self.function(count) if count > entered or scaled else lr
        for each in range(entered + (not scaled), count + 1):
            lr = lr * self.function(each)
        return lr

    def expected(self, interval: str, *, apply_lambdas: bool = False) -> list[LearningRates]:
        """The learning rates that each optimizer step sees."""
        seen = []
        for step in range(EPOCHS * BATCHES_PER_EPOCH):
            epoch = step // BATCHES_PER_EPOCH
            per_epoch, count = (BATCHES_PER_EPOCH, step) if interval == "step" else (1, epoch)
            rates = [self.rate(HEAD_LR, 0, count, scaled=not self.recursive)]
            for lr, start in ((UPPER_LR, PHASE_1_EPOCH), (LOWER_LR, PHASE_2_EPOCH)):
                if epoch >= start:
                    rates.append(self.rate(lr, start * per_epoch, count, scaled=apply_lambdas))
            seen.append(tuple(rates))
        return seen


ROWS = {
    "LambdaLR": Row(lambda optimizer: LambdaLR(optimizer, factor), factor),
    "a subclass of LambdaLR": Row(lambda optimizer: OwnLambdaLR(optimizer, factor), factor),
    "LambdaLR with a callable object": Row(lambda optimizer: LambdaLR(optimizer, Decay(0.9)), Decay(0.9)),
    "MultiplicativeLR": Row(lambda optimizer: MultiplicativeLR(optimizer, factor), factor, recursive=True),
    "MultiplicativeLR in a chain": Row(
        lambda optimizer: ChainedScheduler(
            [ConstantLR(optimizer, factor=1.0, total_iters=1), MultiplicativeLR(optimizer, factor)], optimizer=optimizer
        ),
        factor,
        recursive=True,
    ),
}


class Scheduled(Toy):
    def __init__(
        self,
        make_scheduler: Callable[[Optimizer], LRScheduler],
        interval: str,
        optimizer_over: Callable[[Any], Optimizer] = momentum_sgd,
    ) -> None:
        super().__init__(scores=(4.0, 5.0, 3.0, 3.5, 2.0, 1.0))  # the best epoch before each phase is not the last one
        self.make_scheduler, self.interval, self.optimizer_over = make_scheduler, interval, optimizer_over

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer_over(self.parameters())
        return [optimizer], [{"scheduler": self.make_scheduler(optimizer), "interval": self.interval}]


def scheduled(root: Path, module: Toy, *callbacks: Callback, **options: Any) -> Fit:
    return prepared(module, root, phases(PHASE_1_EPOCH, PHASE_2_EPOCH), callbacks=callbacks, epochs=EPOCHS, **options)


@pytest.mark.parametrize("apply_lambdas", [False, True], ids=["enters at its rate", "enters scaled"])
@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_a_new_group_follows_the_lambda_from_the_next_scheduler_step_on(
    row: Row, interval: str, apply_lambdas: bool, tmp_path: Path
) -> None:
    done = scheduled(tmp_path, Scheduled(row.make, interval), apply_lambdas_new_pgs=apply_lambdas).run()
    assert done.rates == row.expected(interval, apply_lambdas=apply_lambdas)


@pytest.mark.parametrize("row", [ROWS["LambdaLR"], ROWS["MultiplicativeLR"]], ids=["LambdaLR", "MultiplicativeLR"])
def test_restoring_the_best_checkpoint_changes_no_learning_rate(row: Row, tmp_path: Path) -> None:
    done = scheduled(tmp_path, Scheduled(row.make, "step"), restore_best=True).run()
    assert done.rates == row.expected("step")


def adamw(parameters: Any) -> Optimizer:
    return AdamW(parameters, lr=HEAD_LR)


def with_warm_up(name: str) -> Callable[[Optimizer], LRScheduler]:
    def make(optimizer: Optimizer) -> LRScheduler:
        import transformers

        steps = EPOCHS * BATCHES_PER_EPOCH
        total = {} if name == "get_inverse_sqrt_schedule" else {"num_training_steps": steps}
        return getattr(transformers, name)(optimizer, num_warmup_steps=steps // 3, **total)

    return make


def function_of(make: Callable[[Optimizer], LRScheduler]) -> Function:
    scheduler = make(adamw([nn.Parameter(torch.zeros(1))]))
    assert isinstance(scheduler, LambdaLR)
    return scheduler.lr_lambdas[0]


@pytest.mark.parametrize(
    "name",
    [
        "get_linear_schedule_with_warmup",
        "get_cosine_schedule_with_warmup",
        "get_cosine_with_hard_restarts_schedule_with_warmup",
        "get_polynomial_decay_schedule_with_warmup",
        "get_inverse_sqrt_schedule",
    ],
)
def test_a_layer_thawed_under_a_schedule_of_transformers_follows_it_like_the_head(name: str, tmp_path: Path) -> None:
    make = with_warm_up(name)
    done = scheduled(tmp_path, Scheduled(make, "step", adamw)).run()
    assert done.rates == Row(make, function_of(make)).expected("step")
    assert len({rates[1] for rates in done.rates[PHASE_1_EPOCH * BATCHES_PER_EPOCH :]}) > 5


def two_groups(parameters: Any) -> Optimizer:
    """The weight and the bias of the head apart; their module registers the head last."""
    *_, weight, bias = list(parameters)
    return SGD([{"params": [weight], "lr": HEAD_LR}, {"params": [bias], "lr": HEAD_LR}], lr=HEAD_LR)


@pytest.mark.parametrize(
    ("functions", "last"), [([one, factor], factor), ([factor, one], one)], ids=["the last varies", "the last is 1"]
)
@pytest.mark.parametrize("kind", [LambdaLR, MultiplicativeLR])
def test_of_several_lambdas_new_groups_follow_the_last(
    kind: type[LambdaLR] | type[MultiplicativeLR], functions: list[Function], last: Function, tmp_path: Path
) -> None:
    module = Scheduled(lambda optimizer: kind(optimizer, functions), "epoch", two_groups)
    done = scheduled(tmp_path, module).run()
    row = Row(module.make_scheduler, last, recursive=kind is MultiplicativeLR)
    assert seen_by_upper(done, 2) == [
        row.rate(UPPER_LR, PHASE_1_EPOCH, count, scaled=False) for count in range(PHASE_1_EPOCH, EPOCHS)
    ]


def seen_by_upper(done: Fit, group: int = 1) -> list[float | None]:
    """The learning rate of phase 1's group in each epoch since it entered."""
    return [rates[group] for rates in done.rates[PHASE_1_EPOCH * BATCHES_PER_EPOCH :: BATCHES_PER_EPOCH]]


@pytest.mark.parametrize("milestone", [1, 3], ids=["entered after the milestone", "entered before the milestone"])
def test_in_a_sequence_a_new_group_follows_the_lambda_of_the_part_at_work(milestone: int, tmp_path: Path) -> None:
    def make(optimizer: Optimizer) -> LRScheduler:
        parts = [ConstantLR(optimizer, factor=1.0, total_iters=1), LambdaLR(optimizer, factor)]
        return SequentialLR(optimizer, parts, milestones=[milestone])

    done = scheduled(tmp_path, Scheduled(make, "epoch")).run()
    assert seen_by_upper(done) == [
        UPPER_LR if count < milestone or count == PHASE_1_EPOCH else UPPER_LR * factor(count - milestone)
        for count in range(PHASE_1_EPOCH, EPOCHS)
    ]


class Splitting(Scheduled):
    no_decay = ("bias",)


def test_both_groups_of_a_phase_with_parameters_exempt_from_decay_follow_the_lambda(tmp_path: Path) -> None:
    module = Splitting(ROWS["LambdaLR"].make, "epoch", adamw)
    done = scheduled(tmp_path, module).run()
    last = done.rates[-1]
    assert last.count(LOWER_LR * factor(EPOCHS - 1)) == 2
    assert last.count(UPPER_LR * factor(EPOCHS - 1)) == 2


def test_the_lambda_goes_on_over_an_optimizer_that_a_phase_installs(tmp_path: Path) -> None:
    init = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.3}}
    schedule = phases(PHASE_1_EPOCH, PHASE_2_EPOCH, phase_1={"new_optimizer": {"optimizer_init": init}, "lr": UPPER_LR})
    row = ROWS["LambdaLR"]
    done = prepared(Scheduled(row.make, "epoch"), tmp_path, schedule, epochs=EPOCHS).run()
    assert done.rates == row.expected("epoch")
    assert isinstance(done.optimizer, AdamW)


@pytest.mark.parametrize("apply_lambdas", [False, True], ids=["enters at its rate", "enters scaled"])
@pytest.mark.parametrize("name", ["LambdaLR", "LambdaLR with a callable object", "MultiplicativeLR"])
def test_a_resumed_run_goes_on_with_the_lambda(name: str, apply_lambdas: bool, tmp_path: Path) -> None:
    def prepare() -> Fit:
        saving = ModelCheckpoint(tmp_path / "saved", save_top_k=-1, filename="{epoch}", monitor=None)
        options = {"enable_checkpointing": True}
        module = Scheduled(ROWS[name].make, "step")
        return scheduled(tmp_path, module, saving, apply_lambdas_new_pgs=apply_lambdas, trainer_options=options)

    whole, resumed = prepare().run(), prepare()
    shutil.copy(tmp_path / "saved" / f"epoch={PHASE_1_EPOCH}.ckpt", tmp_path / "resumed.ckpt")
    resumed.run(ckpt_path=tmp_path / "resumed.ckpt")
    assert resumed.rates == whole.rates[(PHASE_1_EPOCH + 1) * BATCHES_PER_EPOCH :]
    assert differing(resumed.recorder.weights[-1], whole.recorder.weights[-1]) == set()


def test_the_head_follows_its_lambda_as_in_plain_lightning(tmp_path: Path) -> None:
    plain = plain_fit(Scheduled(ROWS["LambdaLR"].make, "epoch"), tmp_path, EPOCHS)
    done = scheduled(tmp_path, Scheduled(ROWS["LambdaLR"].make, "epoch")).run()
    assert [rates[0] for rates in done.rates] == [rates[0] for rates in plain.rates]
