"""What a phase thaws and no gradient reaches is named in one warning; what trains, however seldom, is not."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.checkpoint import checkpoint

from tests.core_programs.loops import BATCHES_PER_EPOCH, HEAD, LOWER, UPPER

from ..core_programs.hearing import Said, naming, the_only, warnings_in
from ..core_programs.quantised import QuantisedLinear
from .toys import Batches, Fit, Toy, fit, phases

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # reentrant checkpointing

SPARE = ("spare.weight", "spare.bias")


class SkippedByForward(Toy):
    def build(self) -> None:
        self.spare = nn.Linear(4, 4)


class UsedByValidationOnly(SkippedByForward):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x) if self.training else self.spare(self.trunk(x)))


class BehindDetach(SkippedByForward):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.trunk(x)
        return self.head(hidden + self.spare(hidden).detach())


class UnderNoGrad(SkippedByForward):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.trunk(x)
        with torch.no_grad():
            added = self.spare(hidden)
        return self.head(hidden + added)


class Checkpointed(SkippedByForward):
    """A checkpointed layer over an embedding."""

    reentrant = True

    def build(self) -> None:
        super().build()
        self.embedding = nn.Embedding(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        embedded = self.embedding((x > 0).long()).mean(dim=1)
        return self.head(self.trunk(x) + checkpoint(self.spare, embedded, use_reentrant=self.reentrant))


class CheckpointedWithoutReentry(Checkpointed):
    reentrant = False


class OverQuantisedWeight(Toy):
    def build(self) -> None:
        self.spare = QuantisedLinear(nn.Linear(4, 4), requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.spare(self.trunk(x)))


class Experts(Toy):
    """Batch ``i`` goes through expert ``routes[i]``."""

    count, routes = 4, (0, 1, 2, 3)

    def build(self) -> None:
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(self.count)])

    def loss(self, batch: Tensor, batch_index: int) -> Tensor:
        routed = self.experts[self.routes[batch_index % len(self.routes)]](self.trunk(batch))
        return nn.functional.mse_loss(self.head(routed), batch.sin().sum(dim=1, keepdim=True))


class ManyUnusedExperts(Experts):
    count = 24


class ThirdOfThreeExperts(Experts):
    count, routes = 3, (0, 1, 2, 0)


def expert(*numbers: int) -> tuple[str, ...]:
    return tuple(f"experts.{number}.{kind}" for number in numbers for kind in ("weight", "bias"))


# --- what is named ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A module, the parameters that a phase thaws, those of them that no gradient reaches, and a word of the cause."""

    module: type[Toy]
    thawed: tuple[str, ...]
    untrained: tuple[str, ...]
    cause: str


ROWS = {
    "a layer that forward skips": Row(SkippedByForward, SPARE, SPARE, "forward"),
    "a layer that only validation uses": Row(UsedByValidationOnly, SPARE, SPARE, "forward"),
    "a layer behind detach": Row(BehindDetach, SPARE, SPARE, "detach"),
    "a layer under no_grad": Row(UnderNoGrad, SPARE, SPARE, "detach|no_grad"),
    "reentrant checkpointing over a frozen embedding": Row(Checkpointed, SPARE, SPARE, "reentrant"),
    "a quantised weight that looks like float": Row(OverQuantisedWeight, SPARE, SPARE[:1], "quanti[sz]ed"),
    "unused experts among used ones": Row(ManyUnusedExperts, expert(*range(24)), expert(*range(4, 24)), "forward"),
}
PLACES = {"in phase 0": 0, "in phase 1": 1}


def schedule_with(thawed: tuple[str, ...], phase: int) -> Any:
    """The head trains from phase 0 on; the parameters in question are thawed in ``phase``, the first layer last."""
    if phase == 0:
        return phases(1, parameters=((*HEAD, *thawed), UPPER))
    return phases(1, 2, parameters=(HEAD, thawed, UPPER))


@pytest.mark.parametrize("phase", PLACES.values(), ids=PLACES.keys())
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_one_warning_names_what_no_gradient_reached(row: Row, phase: int, tmp_path: Path) -> None:
    done = fit(row.module(), tmp_path, schedule_with(row.thawed, phase), epochs=3)
    warning = the_only(warnings_in(done.said))
    assert naming([warning], row.untrained, done.module) == [warning], warning.text
    assert re.search(row.cause, warning.text, re.IGNORECASE), warning.text
    assert warning.level == logging.WARNING
    assert phase * BATCHES_PER_EPOCH < warning.step <= (phase + 1) * BATCHES_PER_EPOCH


def test_a_float_weight_that_forward_skips_is_not_called_quantised(tmp_path: Path) -> None:
    done = fit(SkippedByForward(), tmp_path, schedule_with(SPARE, 0), epochs=2)
    warning = the_only(warnings_in(done.said))
    assert not re.search("quanti[sz]ed", warning.text, re.IGNORECASE), warning.text


def test_what_was_not_trained_is_collapsed_to_patterns(tmp_path: Path) -> None:
    done = fit(ManyUnusedExperts(), tmp_path, schedule_with(expert(*range(24)), 0), epochs=2)
    warning = the_only(warnings_in(done.said))
    spelled_out = [name for name in expert(*range(4, 24)) if name in warning.text]
    assert len(spelled_out) <= 4, warning.text
    assert "40" in warning.text, f"expected the number of tensors: {warning.text}"


def test_a_parameter_is_named_once_in_a_run(tmp_path: Path) -> None:
    done = fit(SkippedByForward(), tmp_path, phases(2, 4, parameters=((*HEAD, *SPARE), UPPER, LOWER)), epochs=6)
    assert done.phases[-1] == 2
    assert len(naming(warnings_in(done.said), SPARE, done.module)) == 1


def test_each_phase_names_its_own(tmp_path: Path) -> None:
    class TwoSkipped(SkippedByForward):
        def build(self) -> None:
            super().build()
            self.other = nn.Linear(4, 4)

    other = ("other.weight", "other.bias")
    done = fit(TwoSkipped(), tmp_path, phases(2, 4, parameters=((*HEAD, *SPARE), UPPER, other)), epochs=6)
    assert [steps_of(naming(warnings_in(done.said), names, done.module)) for names in (SPARE, other)] == [[4], [20]]


def steps_of(said: list[Said]) -> list[int]:
    return [each.step for each in said]


class LongEpochs:
    """Makes an epoch of any toy longer than the hundred steps within which the warning is due."""

    def train_dataloader(self) -> Any:
        return Batches(130)

    def configure_optimizers(self: Any) -> Any:
        return SGD(self.parameters(), lr=0.001)


class LongSkipped(LongEpochs, SkippedByForward):
    """Its epochs are long."""


class LongThird(LongEpochs, ThirdOfThreeExperts):
    """Its epochs are long."""


@pytest.mark.parametrize(
    ("schedule", "start"),
    [
        (phases(parameters=((*HEAD, *SPARE),)), 0),
        ({0: {"params": list(HEAD), "max_transition_step": 20}, 1: {"params": list(SPARE)}}, 20),
    ],
    ids=["in phase 0", "in a phase that begins inside the epoch"],
)
def test_in_a_long_epoch_the_warning_comes_within_a_hundred_steps(schedule: Any, start: int, tmp_path: Path) -> None:
    done = fit(LongSkipped(), tmp_path, schedule, epochs=1)
    warning = the_only(naming(warnings_in(done.said), SPARE, done.module))
    assert start < warning.step <= start + 100


@pytest.mark.parametrize("steps", [1, 3])
def test_a_phase_that_ends_before_its_first_epoch_is_judged_all_the_same(steps: int, tmp_path: Path) -> None:
    schedule = {0: {"params": [*HEAD, *SPARE], "max_transition_step": steps}, 1: {"params": list(UPPER)}}
    done = fit(SkippedByForward(), tmp_path, schedule, epochs=1)
    warning = the_only(naming(warnings_in(done.said), SPARE, done.module))
    assert warning.step <= BATCHES_PER_EPOCH


def test_a_run_that_ends_inside_its_first_epoch_is_judged_all_the_same(tmp_path: Path) -> None:
    schedule = phases(parameters=((*HEAD, *SPARE),))
    done = fit(SkippedByForward(), tmp_path, schedule, epochs=1, trainer_options={"max_steps": 2})
    warning = the_only(naming(warnings_in(done.said), SPARE, done.module))
    assert warning.step == 2


class FreezesAgain(Callback):
    """User code that freezes a layer which the schedule has thawed."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.upper.requires_grad_(False)


def test_a_layer_that_other_code_has_frozen_again_is_named(tmp_path: Path) -> None:
    done = fit(Toy(), tmp_path, phases(1), epochs=3, callbacks=[FreezesAgain()])
    the_only(naming(warnings_in(done.said), UPPER, done.module))


# --- what is not ------------------------------------------------------------------------------------------------------


class KeepsZeroGradients(Toy):
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)


class StepsByHand(ThirdOfThreeExperts):
    """Manual optimization; no gradient is left when a batch ends."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        self.manual_backward(self.loss(batch, batch_idx))
        optimizer.step()
        optimizer.zero_grad()


class MeanTeacher(Toy):
    """A frozen copy of the head follows it without the optimizer."""

    def build(self) -> None:
        self.teacher = nn.Linear(4, 1).requires_grad_(False)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            for mean, present in zip(self.teacher.parameters(), self.head.parameters(), strict=True):
                mean.lerp_(present, 0.1)


class TiedToTheUpper(Toy):
    def build(self) -> None:
        self.again = nn.Linear(4, 4)
        self.again.weight = self.upper.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.trunk(x)))


EXPERTS = expert(0, 1, 2)
QUIET: dict[str, tuple[Callable[[], Toy], Any, dict[str, Any]]] = {
    "every layer trains": (Toy, phases(1, 2), {}),
    "an expert that the third batch uses": (ThirdOfThreeExperts, schedule_with(EXPERTS, 0), {}),
    "the same in phase 1": (ThirdOfThreeExperts, schedule_with(EXPERTS, 1), {}),
    "the same in a long epoch": (LongThird, schedule_with(EXPERTS, 0), {}),
    "the same, accumulated over the epoch": (
        ThirdOfThreeExperts,
        schedule_with(EXPERTS, 0),
        {"accumulate_grad_batches": BATCHES_PER_EPOCH},
    ),
    "the same, optimized by hand": (StepsByHand, schedule_with(EXPERTS, 0), {}),
    "checkpointing without reentry over a frozen embedding": (
        CheckpointedWithoutReentry,
        schedule_with(SPARE, 1),
        {},
    ),
    "reentrant checkpointing over a thawed embedding": (
        Checkpointed,
        phases(1, parameters=((*HEAD, "embedding.weight"), SPARE)),
        {},
    ),
    "gradients of zero in place of none": (KeepsZeroGradients, phases(1, 2), {}),
    "a frozen copy that moves without the optimizer": (MeanTeacher, phases(1, 2), {}),
    "tied weights": (TiedToTheUpper, phases(1, parameters=((*HEAD, "again.bias"), UPPER)), {}),
    "a frozen layer that forward skips": (SkippedByForward, phases(1, 2), {}),
    "clipped gradients": (Toy, phases(1, 2), {"gradient_clip_val": 0.1}),
}


@pytest.mark.parametrize(("module", "schedule", "options"), QUIET.values(), ids=QUIET.keys())
def test_no_warning_where_everything_thawed_is_trained(
    module: Callable[[], Toy], schedule: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    done = fit(module(), tmp_path, schedule, epochs=3, trainer_options=options)
    assert done.scheduler.curr_depth == len(schedule) - 1
    assert [each.text for each in warnings_in(done.said)] == []


# --- what is frozen and moves -----------------------------------------------------------------------------------------


class DecaysEverything(Optimizer):
    """Pulls all it holds towards zero, with or without gradients."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(1 - group["lr"])
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=group["lr"])
        return loss


class Decaying(Toy):
    def configure_optimizers(self) -> Any:
        return DecaysEverything(self.parameters(), lr=0.01)


class Descending(Toy):
    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.01)


def test_a_frozen_parameter_that_the_optimizer_moves_is_named_in_one_warning(tmp_path: Path) -> None:
    def run(module: Toy) -> Fit:
        return fit(module, tmp_path, phases(2), epochs=2, enforce_phase0_params=False)

    moving, resting = run(Decaying()), run(Descending())
    usual = {re.sub(r"\W", "", each.text) for each in warnings_in(resting.said)}
    warning = the_only(each for each in warnings_in(moving.said) if re.sub(r"\W", "", each.text) not in usual)
    assert naming([warning], (*UPPER, *LOWER), moving.module) == [warning], warning.text
    assert warning.step <= BATCHES_PER_EPOCH
    assert "frozen" in warning.text
