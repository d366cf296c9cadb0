"""Tensors in the optimizer that are not the module's, such as the weights of a loss object, go on training there."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from tests.core_programs.loops import BATCHES_PER_EPOCH, copied, differing

from ..core_programs.hearing import Said, the_only
from .toys import Fit, Toy, by_hand, fit, phases, prepared

Weights = list[nn.Parameter]


# --- who holds them ---------------------------------------------------------------------------------------------------


class LossObject:
    """Not a module: PyTorch does not register what it holds."""

    def __init__(self) -> None:
        self.scale, self.shift = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    def weights(self) -> Weights:
        return [self.scale, self.shift]

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        return nn.functional.mse_loss(prediction * self.scale + self.shift, target)


class LossModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.margin = nn.Linear(1, 1)
        nn.init.ones_(self.margin.weight)
        nn.init.zeros_(self.margin.bias)

    def weights(self) -> Weights:
        return list(self.parameters())

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.margin(prediction), target)


class WithLossWeights(Toy):
    """The loss is kept in a list, so that a loss that is a module is no submodule."""

    def __init__(
        self,
        layout: Callable[[Any, Weights], Optimizer],
        make_loss: Callable[[], Any] = LossObject,
        scores: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__(scores)
        self.losses = [make_loss()]
        self.layout = layout

    @property
    def foreign(self) -> Weights:
        return self.losses[0].weights()

    def loss(self, batch: Tensor, batch_index: int) -> Tensor:
        return self.losses[0](self(batch), batch.sin().sum(dim=1, keepdim=True))

    def configure_optimizers(self) -> Any:
        return self.layout(self.named_parameters(), self.foreign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["foreign"] = [weight.detach().clone() for weight in self.foreign]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        with torch.no_grad():
            for weight, saved in zip(self.foreign, checkpoint["foreign"], strict=True):
                weight.copy_(saved)


# --- where the optimizer has them -------------------------------------------------------------------------------------


def in_one_group(named: Any, foreign: Weights) -> Optimizer:
    return SGD([*(parameter for _, parameter in named), *foreign], lr=0.05, momentum=0.9)


def before_the_others(named: Any, foreign: Weights) -> Optimizer:
    return SGD([*foreign, *(parameter for _, parameter in named)], lr=0.05, momentum=0.9)


def in_a_group_of_their_own(named: Any, foreign: Weights) -> Optimizer:
    groups = [{"params": [parameter for _, parameter in named]}, {"params": foreign, "lr": 0.01, "momentum": 0.5}]
    return SGD(groups, lr=0.05, momentum=0.9)


def in_a_group_in_front(named: Any, foreign: Weights) -> Optimizer:
    groups = [{"params": foreign, "lr": 0.01, "momentum": 0.5}, {"params": [parameter for _, parameter in named]}]
    return SGD(groups, lr=0.05, momentum=0.9)


def with_names(named: Any, foreign: Weights) -> Optimizer:
    pairs = [*named, *((f"loss.{index}", weight) for index, weight in enumerate(foreign))]
    return SGD(pairs, lr=0.05, momentum=0.9)


def under_adamw(named: Any, foreign: Weights) -> Optimizer:
    return AdamW([*(parameter for _, parameter in named), *foreign], lr=0.05)


LAYOUTS = {
    layout.__name__.replace("_", " "): layout
    for layout in (
        in_one_group,
        before_the_others,
        in_a_group_of_their_own,
        in_a_group_in_front,
        with_names,
        under_adamw,
    )
}
HOLDERS = {"an object": LossObject, "a module that is no submodule": LossModule}


def expected(module: WithLossWeights, schedule: Any, epochs: int = 6) -> WithLossWeights:
    """Train by hand."""

    def optimizer_over(parameters: list[nn.Parameter]) -> Optimizer:
        return module.layout([(f"p{index}", each) for index, each in enumerate(parameters)], module.foreign)

    if module.layout is with_names:
        module.layout = in_one_group  # the same optimizer; a group that is added by hand has no names
    by_hand(module, optimizer_over, schedule, epochs=epochs)
    return module


def values(module: Any) -> dict[str, Tensor]:
    """All that trains."""
    return copied(module) | {f"foreign {index}": weight.detach() for index, weight in enumerate(module.foreign)}


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_loss", HOLDERS.values(), ids=HOLDERS.keys())
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_tensors_that_are_not_the_modules_train_in_every_phase_as_by_hand(
    layout: Callable[..., Optimizer], make_loss: Callable[[], Any], tmp_path: Path
) -> None:
    done = fit(WithLossWeights(layout, make_loss), tmp_path, phases(2, 4))
    assert differing(values(done.module), values(expected(WithLossWeights(layout, make_loss), phases(2, 4)))) == set()


@pytest.mark.parametrize("layout", [in_one_group, in_a_group_of_their_own])
def test_they_train_where_phase_0_is_not_enforced(layout: Callable[..., Optimizer], tmp_path: Path) -> None:
    single = phases()
    done = fit(WithLossWeights(layout), tmp_path, single, epochs=2, enforce_phase0_params=False)
    assert differing(values(done.module), values(expected(WithLossWeights(layout), single, epochs=2))) == set()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_each_group_of_theirs_stays_with_its_options(layout: Callable[..., Optimizer], tmp_path: Path) -> None:
    module = WithLossWeights(layout)
    done = fit(module, tmp_path, phases(2, 4))
    before = layout(Toy().named_parameters(), module.foreign)
    rates = {id(weight): group["lr"] for group in before.param_groups for weight in group["params"]}
    after = {id(weight): group["lr"] for group in done.optimizer.param_groups for weight in group["params"]}
    assert [after.get(id(weight)) for weight in module.foreign] == [rates[id(weight)] for weight in module.foreign]


def only_the_modules(named: Any, foreign: Weights) -> Optimizer:
    return in_one_group(named, [])


def test_one_notice_tells_how_many_there_are(tmp_path: Path) -> None:
    def said(layout: Callable[..., Optimizer], root: Path) -> list[Said]:
        done = fit(WithLossWeights(layout), root, phases(2, 4))
        return [Said(each.level, re.sub(r"\S*/\S*", "PATH", each.text), each.step) for each in done.said]

    usual = said(only_the_modules, tmp_path / "usual")
    notice = the_only(each for each in said(in_one_group, tmp_path / "foreign") if each not in usual)
    assert notice.step == 0
    assert re.search(r"\b2\b", notice.text), notice.text
    assert "optimizer" in notice.text


def kept_by(module: WithLossWeights) -> list[float]:
    """A list that gets the value of one of the tensors after each epoch."""
    kept: list[float] = []
    module.on_train_epoch_end = lambda: kept.append(float(module.foreign[0].detach()))  # type: ignore[method-assign]
    return kept


def test_an_optimizer_that_a_phase_installs_takes_them_over(tmp_path: Path) -> None:
    init = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}
    schedule = phases(2, phase_1={"new_optimizer": {"optimizer_init": init}})
    module = WithLossWeights(in_a_group_of_their_own)
    kept = kept_by(module)
    done = fit(module, tmp_path, schedule, epochs=4)
    assert isinstance(done.optimizer, AdamW)
    held = {id(weight) for group in done.optimizer.param_groups for weight in group["params"]}
    assert {id(weight) for weight in module.foreign} <= held
    assert len(set(kept)) == 4, "they train in every epoch"


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_they_train_on_after_the_best_checkpoint_is_restored(layout: Callable[..., Optimizer], tmp_path: Path) -> None:
    module = WithLossWeights(layout, scores=(1.0, 2.0, 3.0, 0.5, 0.6, 0.7))
    kept = kept_by(module)
    done = fit(module, tmp_path, phases(2, 4), restore_best=True)
    assert done.scheduler.curr_depth == 2
    assert len(set(kept)) == 6


@pytest.mark.parametrize("epoch", [0, 2, 4], ids=["in phase 0", "in phase 1", "in phase 2"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(
    layout: Callable[..., Optimizer], epoch: int, tmp_path: Path
) -> None:
    def prepare() -> Fit:
        saving = ModelCheckpoint(tmp_path / "saved", save_top_k=-1, filename="{epoch}", monitor=None)
        options = {"enable_checkpointing": True}
        return prepared(WithLossWeights(layout), tmp_path, phases(2, 4), callbacks=[saving], trainer_options=options)

    whole, resumed = prepare().run(), prepare()
    shutil.copy(tmp_path / "saved" / f"epoch={epoch}.ckpt", tmp_path / "resumed.ckpt")
    resumed.run(ckpt_path=tmp_path / "resumed.ckpt")
    assert len(resumed.rates) == (5 - epoch) * BATCHES_PER_EPOCH
    assert differing(values(resumed.module), values(whole.module)) == set()
    assert {"foreign 0", "foreign 1"} <= differing(values(whole.module), values(WithLossWeights(layout)))
