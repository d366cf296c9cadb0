"""LR schedulers that the module steps itself, in ``lr_scheduler_step``, with arguments that Lightning does not give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LRScheduler, StepLR

from tests.core_programs.loops import BATCHES_PER_EPOCH, UPPER_LR, momentum_sgd

from ..core_programs.hearing import warnings_in
from .toys import LearningRates, Toy, phases, plain_fit, prepared

EPOCHS = 5
PHASE_1_EPOCH = 2


class LikeTimm:
    """The interface of timm's schedulers: no subclass of PyTorch's, stepped by epoch or by update.

    The rates it starts from are kept in a list with an entry for each group.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.base_values = [group["initial_lr"] for group in optimizer.param_groups]
        self.metric: float | None = None

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "optimizer"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def step(self, epoch: int, metric: float | None = None) -> None:
        self.metric = metric
        self.update([value * 0.5**epoch for value in self.base_values])

    def step_update(self, num_updates: int, metric: float | None = None) -> None:
        self.metric = metric
        self.update([value * 0.9**num_updates for value in self.base_values])

    def update(self, values: list[float]) -> None:
        for group, value in zip(self.optimizer.param_groups, values, strict=False):
            group["lr"] = value


class NeedsEpoch(StepLR):
    """A subclass of a supported scheduler whose step takes an argument that nobody but the module gives."""

    def __init__(self, optimizer: Optimizer, step_size: int, gamma: float) -> None:
        self.begun = False  # the constructor makes a step of its own
        super().__init__(optimizer, step_size, gamma)
        self.begun = True

    def step(self, epoch: int | None = None) -> None:
        if self.begun and epoch is None:
            raise TypeError("expected the number of the epoch")
        super().step()


class NeedsMetricByName(ExponentialLR):
    """Its step takes nothing but a keyword."""

    def __init__(self, optimizer: Optimizer, gamma: float) -> None:
        self.begun = False
        super().__init__(optimizer, gamma)
        self.begun = True

    def step(self, *arguments: Any, loss: float | None = None) -> None:
        if self.begun and (arguments or loss is None):
            raise TypeError("expected the loss as a keyword")
        super().step()


class Driven(Toy):
    """Makes its scheduler's steps itself."""

    interval = "epoch"
    make_scheduler: Callable[[Optimizer], Any]

    def configure_optimizers(self) -> Any:
        optimizer = momentum_sgd(self.parameters())
        scheduler = type(self).make_scheduler(optimizer)
        return [optimizer], [{"scheduler": scheduler, "interval": self.interval}]

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        raise NotImplementedError


class ByEpoch(Driven):
    make_scheduler = LikeTimm

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step(epoch=self.current_epoch)


class ByUpdate(Driven):
    interval = "step"
    make_scheduler = LikeTimm

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(num_updates=self.global_step)


class ByEpochAndLoss(Driven):
    """Needs what exists only once a batch has been trained."""

    make_scheduler = LikeTimm

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.last_loss = super().training_step(batch, batch_idx)
        return self.last_loss

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step(self.current_epoch, float(self.last_loss.detach()))


class SubclassByEpoch(Driven):
    @staticmethod
    def make_scheduler(optimizer: Optimizer) -> LRScheduler:
        return NeedsEpoch(optimizer, step_size=1, gamma=0.5)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step(epoch=self.current_epoch)


class SubclassByKeyword(Driven):
    interval = "step"

    @staticmethod
    def make_scheduler(optimizer: Optimizer) -> LRScheduler:
        return NeedsMetricByName(optimizer, gamma=0.9)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step(loss=1.0)


class OrdinaryByHand(Driven):
    """The module makes the step that Lightning would make."""

    @staticmethod
    def make_scheduler(optimizer: Optimizer) -> LRScheduler:
        return StepLR(optimizer, step_size=1, gamma=0.5)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step()


FOREIGN = {
    "timm's by epoch": ByEpoch,
    "timm's by update": ByUpdate,
    "timm's by epoch and loss": ByEpochAndLoss,
}
OF_PYTORCH = {
    "a subclass that needs the epoch": SubclassByEpoch,
    "a subclass that needs a keyword": SubclassByKeyword,
    "an ordinary one": OrdinaryByHand,
}


@dataclass(frozen=True)
class Outcome:
    rates: list[LearningRates]
    warnings: list[str]
    depth: int


def outcome_of(module: Driven, root: Path, **options: Any) -> Outcome:
    done = prepared(module, root, phases(PHASE_1_EPOCH), epochs=EPOCHS, **options).run()
    return Outcome(done.rates, [each.text for each in warnings_in(done.said)], done.scheduler.curr_depth)


def assert_the_head_follows(outcome: Outcome, module: Driven, root: Path) -> None:
    plain = plain_fit(module, root, EPOCHS)
    first = PHASE_1_EPOCH * BATCHES_PER_EPOCH
    assert outcome.depth == 1
    assert [rates[0] for rates in outcome.rates] == [rates[0] for rates in plain.rates]
    assert {len(rates) for rates in outcome.rates[:first]} == {1}
    assert outcome.rates[first][1] == UPPER_LR
    assert len({rates[0] for rates in outcome.rates}) >= EPOCHS - 1


@pytest.mark.parametrize("kind", FOREIGN.values(), ids=FOREIGN.keys())
def test_with_allow_untested_the_module_drives_a_scheduler_that_is_not_pytorchs(
    kind: type[Driven], tmp_path: Path
) -> None:
    outcome = outcome_of(kind(), tmp_path, allow_untested=True)
    assert_the_head_follows(outcome, kind(), tmp_path / "plain")
    assert sum("LikeTimm" in text for text in outcome.warnings) == 1, outcome.warnings


@pytest.mark.parametrize("kind", FOREIGN.values(), ids=FOREIGN.keys())
def test_without_it_such_a_scheduler_is_an_error_that_names_the_argument(kind: type[Driven], tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"(?s)LikeTimm.*allow_untested"):
        outcome_of(kind(), tmp_path)


@pytest.mark.parametrize("allow_untested", [False, True])
@pytest.mark.parametrize("kind", OF_PYTORCH.values(), ids=OF_PYTORCH.keys())
def test_a_subclass_of_a_supported_scheduler_is_tried_out_as_the_module_drives_it(
    kind: type[Driven], allow_untested: bool, tmp_path: Path
) -> None:
    outcome = outcome_of(kind(), tmp_path, allow_untested=allow_untested)
    assert_the_head_follows(outcome, kind(), tmp_path / "plain")
    later = [rates[1] for rates in outcome.rates if len(rates) == 2]
    assert later[-1] is not None
    assert later[-1] < UPPER_LR, "the new group follows the scheduler"


class FailsWithTwoGroups(StepLR):
    """Cannot follow a new group, whoever makes its steps."""

    def step(self, epoch: Any = 0) -> None:
        if len(self.optimizer.param_groups) > 1:
            raise IndexError("one group only")
        super().step()


class DrivesWhatFails(Driven):
    @staticmethod
    def make_scheduler(optimizer: Optimizer) -> LRScheduler:
        return FailsWithTwoGroups(optimizer, step_size=1)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step(epoch=self.current_epoch)


def test_a_scheduler_that_fails_when_groups_are_added_is_still_found_before_training(tmp_path: Path) -> None:
    module = DrivesWhatFails()
    seen: list[int] = []
    module.on_train_batch_start = lambda batch, batch_idx: seen.append(batch_idx)  # type: ignore[method-assign]
    with pytest.raises(MisconfigurationException, match="FailsWithTwoGroups"):
        outcome_of(module, tmp_path)
    assert seen == []


def test_trying_out_leaves_the_module_and_its_scheduler_as_they_were(tmp_path: Path) -> None:
    """What the module drives is tried on copies: the first real step is the scheduler's first."""
    steps: list[int] = []

    class Counts(SubclassByEpoch):
        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            if scheduler is self.trainer.lr_scheduler_configs[0].scheduler:
                steps.append(scheduler.last_epoch)
            super().lr_scheduler_step(scheduler, metric)

    outcome_of(Counts(), tmp_path)
    assert steps == list(range(EPOCHS))
