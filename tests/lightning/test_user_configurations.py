"""Configurations in the shapes in which users have them: YAML as it stands, through all phases.

Learning rates were worked out by hand from the schedule, the scores and the optimizer: AdamW at 0.1, whose LR scheduler
halves it after every epoch.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, StepLR

from finetuning_scheduler import FinetuningScheduler
from tests.reference.recipe import PhaseSpec, Recipe
from tests.reference.toys import Session, Toy


@dataclass(frozen=True)
class Epoch:
    """What is in force in an epoch's first step."""

    phase: int
    lrs: tuple[float, ...]
    optimizer: str = "AdamW"
    scheduler: str = "StepLR"
    decay: tuple[float, ...] | None = None  # of each group; None: not looked at


class AtStart(Callback):
    """Notes what is in force when each epoch's first batch begins."""

    def __init__(self) -> None:
        self.seen: list[Epoch] = []

    def on_train_batch_start(self, trainer: Any, _module: Any, _batch: Any, batch_idx: int) -> None:
        if batch_idx:
            return
        (scheduler,) = [callback for callback in trainer.callbacks if isinstance(callback, FinetuningScheduler)]
        groups = trainer.optimizers[0].param_groups
        (config,) = trainer.lr_scheduler_configs
        self.seen.append(
            Epoch(
                scheduler.curr_depth,
                tuple(group["lr"] for group in groups),
                type(trainer.optimizers[0]).__name__,
                type(config.scheduler).__name__,
                tuple(group["weight_decay"] for group in groups),
            )
        )


def assert_seen(seen: list[Epoch], expected: tuple[Epoch, ...]) -> None:
    assert [(e.phase, e.optimizer, e.scheduler) for e in seen] == [
        (e.phase, e.optimizer, e.scheduler) for e in expected
    ]
    for number, (mine, theirs) in enumerate(zip(seen, expected, strict=True)):
        assert mine.lrs == pytest.approx(theirs.lrs, rel=1e-12), f"learning rates in epoch {number}"
        assert theirs.decay is None or mine.decay == pytest.approx(theirs.decay), f"weight decay in epoch {number}"


class Halving(LambdaLR):
    """A user's own scheduler, found by its import path."""

    def __init__(self, optimizer: Optimizer, factor: float) -> None:
        super().__init__(optimizer, lambda epoch: factor**epoch)


def in_blocks() -> nn.Module:
    """Three numbered blocks and a head."""
    network = nn.Sequential()
    network.add_module("blocks", nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))))
    network.add_module("head", nn.Linear(4, 1))
    return network


def adamw(parameters: Any) -> Optimizer:
    return AdamW(parameters, lr=0.1, weight_decay=0.1)


def halving_each_epoch(optimizer: Optimizer) -> StepLR:
    return StepLR(optimizer, step_size=1, gamma=0.5)


RECIPE = Recipe((PhaseSpec(()),), epochs=0, optimizer=adamw, scheduler=halving_each_epoch, restore_best=False)
FALLING = (9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0)


@dataclass(frozen=True)
class Case:
    """A schedule's file, and what is in force in each epoch."""

    text: str
    epochs: tuple[Epoch, ...]
    scores: tuple[float, ...] = FALLING
    no_decay: tuple[str, ...] = ()
    network: Any = None


CASES = {
    "optimizer and LR scheduler, then an LR scheduler with init_pg_lrs": Case(
        """
0:
  params:
  - network.head.bias
  - network.head.weight
  max_transition_epoch: 2
1:
  params:
  - network.third.*
  max_transition_epoch: 4
  lr: 1e-02
  new_optimizer:
    optimizer_init:
      class_path: torch.optim.SGD
      init_args:
        lr: 2.0e-03
        momentum: 0.9
        weight_decay: 2.0e-06
  new_lr_scheduler:
    lr_scheduler_init:
      class_path: torch.optim.lr_scheduler.StepLR
      init_args:
        step_size: 1
        gamma: 0.7
    pl_lrs_cfg:
      interval: epoch
      frequency: 1
      name: Explicit_Reinit_LR_Scheduler
    use_current_optimizer_pg_lrs: true
2:
  params:
  - network.(first|second).*
  lr: 1e-06
  new_lr_scheduler:
    lr_scheduler_init:
      class_path: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts
      init_args:
        T_0: 2
        T_mult: 1
        eta_min: 0
    pl_lrs_cfg:
      interval: epoch
      frequency: 1
      name: Explicit_Reinit_LR_Scheduler
    init_pg_lrs: [2.0e-06, 4e-06]
""",
        (
            Epoch(0, (0.1,)),
            Epoch(0, (0.05,)),
            Epoch(1, (0.025, 0.01), "SGD"),
            Epoch(1, (0.025 * 0.7, 0.01 * 0.7), "SGD", decay=(2e-6, 2e-6)),
            Epoch(2, (2e-6, 4e-6, 1e-6), "SGD", "CosineAnnealingWarmRestarts"),
            Epoch(2, (1e-6, 2e-6, 5e-7), "SGD", "CosineAnnealingWarmRestarts"),
            Epoch(2, (2e-6, 4e-6, 1e-6), "SGD", "CosineAnnealingWarmRestarts"),
        ),
    ),
    "no_decay, keys as text, an anchor, an LR scheduler in two phases": Case(
        """
# A head, a layer, the rest.
"0":
  params: [network.head]
  max_transition_epoch: 1
"1":
  params: [network.third]        # two groups: its bias does not decay
  lr: 1e-02
  max_transition_epoch: "2"
  new_lr_scheduler:
    lr_scheduler_init: &halving
      class_path: torch.optim.lr_scheduler.StepLR
      init_args: {step_size: 1, gamma: 0.5}
    pl_lrs_cfg: {interval: epoch, frequency: 1, name: Halving}
    init_pg_lrs: [2e-02, 4.0e-02]
"2":
  params: ["*"]
  new_lr_scheduler:
    lr_scheduler_init: *halving
    init_pg_lrs: [2e-02, 1e-02, 1.0e-06, 1e-06]
""",
        (
            Epoch(0, (0.1, 0.1), decay=(0.1, 0.0)),
            Epoch(1, (0.02, 0.04, 0.01, 0.01), decay=(0.1, 0.0) * 2),
            Epoch(2, (0.02, 0.01, 1e-6, 1e-6, 1e-5, 1e-5), decay=(0.1, 0.0) * 3),
            Epoch(2, (0.01, 0.005, 5e-7, 5e-7, 5e-6, 5e-6), decay=(0.1, 0.0) * 3),
        ),
        no_decay=("bias",),
    ),
    "optimizers from present learning rates": Case(
        """
0: {params: ["network.head.*"], max_transition_epoch: 1}
1:
  params: ["network.third.*"]
  lr: 0.01
  max_transition_epoch: 2
  new_optimizer: {optimizer_init: {class_path: torch.optim.SGD, init_args: {lr: 3.0e-03, momentum: 0.9}}}
  new_lr_scheduler:
    lr_scheduler_init: {class_path: torch.optim.lr_scheduler.ExponentialLR, init_args: {gamma: 0.5}}
    use_current_optimizer_pg_lrs: true
2:
  params: ["network.(first|second).*"]
  new_optimizer:              # alone: learning rates and the scheduler's progress stay as they are
    optimizer_init: {class_path: torch.optim.NAdam, init_args: {lr: 4e-03}}
""",
        (
            Epoch(0, (0.1,)),
            Epoch(1, (0.05, 0.01), "SGD", "ExponentialLR"),
            Epoch(2, (0.025, 0.005, 1e-5), "NAdam", "ExponentialLR"),
            Epoch(2, (0.0125, 0.0025, 5e-6), "NAdam", "ExponentialLR"),
        ),
    ),
    "optimizer's own learning rate": Case(
        """
0: {params: ["network.head.*"], max_transition_epoch: 1}
1:
  params: ["network.third.*"]
  lr: 0.01
  new_optimizer: {optimizer_init: {class_path: torch.optim.SGD, init_args: {lr: 3.0e-03, momentum: 0.9}}}
  new_lr_scheduler:
    lr_scheduler_init: {class_path: torch.optim.lr_scheduler.ExponentialLR, init_args: {gamma: 0.5}}
""",
        (
            Epoch(0, (0.1,)),
            Epoch(1, (0.003, 0.01), "SGD", "ExponentialLR"),
            Epoch(1, (0.0015, 0.005), "SGD", "ExponentialLR"),
        ),
    ),
    "ReduceLROnPlateau": Case(
        """
0: {params: ["network.head.*"], max_transition_epoch: 1}
1:
  params: ["network.third.*"]
  lr: 1.0e-02
  new_lr_scheduler:
    lr_scheduler_init:
      class_path: torch.optim.lr_scheduler.ReduceLROnPlateau
      init_args: {mode: min, factor: 0.5, patience: 0, min_lr: 2e-03}
    pl_lrs_cfg: {interval: epoch, frequency: 1, monitor: val_loss, strict: true, name: Plateau}
""",
        (
            Epoch(0, (0.1,)),
            Epoch(1, (0.1, 0.01), scheduler="ReduceLROnPlateau"),
            Epoch(1, (0.1, 0.01), scheduler="ReduceLROnPlateau"),
            Epoch(1, (0.05, 0.005), scheduler="ReduceLROnPlateau"),
            Epoch(1, (0.025, 0.0025), scheduler="ReduceLROnPlateau"),
            Epoch(1, (0.0125, 0.002), scheduler="ReduceLROnPlateau"),
        ),
        scores=(5.0, 4.0, 4.5, 4.25, 4.1, 4.2),
    ),
    "a scheduler by step": Case(
        """
0: {params: ["network.head.*"], max_transition_epoch: 1}
1:
  params: ["network.third.*"]
  lr: 1.0e-02
  new_lr_scheduler:
    lr_scheduler_init:
      class_path: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts
      init_args: {T_0: 8}
    pl_lrs_cfg: {interval: step, frequency: 1}
""",
        (
            Epoch(0, (0.1,)),
            Epoch(1, (0.1, 0.01), scheduler="CosineAnnealingWarmRestarts"),
            Epoch(1, (0.05, 0.005), scheduler="CosineAnnealingWarmRestarts"),
            Epoch(1, (0.1, 0.01), scheduler="CosineAnnealingWarmRestarts"),
        ),
    ),
    "a LambdaLR of the user's by import path": Case(
        f"""
0: {{params: ["network.head.*"], max_transition_epoch: 1}}
1:
  params: ["network.third.*"]
  lr: 1.0e-02
  new_lr_scheduler:
    lr_scheduler_init: {{class_path: {__name__}.Halving, init_args: {{factor: 0.5}}}}
""",
        (
            Epoch(0, (0.1,)),
            Epoch(1, (0.1, 0.01), scheduler="Halving"),
            Epoch(1, (0.05, 0.005), scheduler="Halving"),
            Epoch(1, (0.025, 0.0025), scheduler="Halving"),
        ),
    ),
    "layer-wise learning rates": Case(
        """
0: {params: ["network.head.*"], max_transition_epoch: 1}
1:
  params: ["network.blocks.*"]
  lr: 8.0e-02
  lr_decay: 0.5
  lr_decay_min_scale: 3e-01
""",
        (
            Epoch(0, (0.1,)),
            Epoch(1, (0.05, 0.08, 0.04, 0.024)),  # blocks 2, 1 and 0, the last at the least scale
            Epoch(1, (0.025, 0.04, 0.02, 0.012)),
        ),
        network=in_blocks,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_schedule_as_users_have_it(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(case.text, encoding="utf-8")
    changes = {"epochs": len(case.epochs), "scores": case.scores, "no_decay": case.no_decay}
    network = {} if case.network is None else {"network": case.network}
    recipe = Recipe(**(vars(RECIPE) | changes | network))
    seen = AtStart()
    Session(recipe, tmp_path, extra_callbacks=(seen,), scheduler_options={"ft_schedule": str(path)}).fit()
    assert_seen(seen.seen, case.epochs)


def test_a_function_cannot_be_written_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        """
0: {params: ["network.head.*"], max_transition_epoch: 1}
1:
  params: ["network.third.*"]
  new_lr_scheduler:
    lr_scheduler_init: {class_path: torch.optim.lr_scheduler.LambdaLR, init_args: {lr_lambda: math.exp}}
""",
        encoding="utf-8",
    )
    recipe = Recipe(**(vars(RECIPE) | {"epochs": 1, "scores": FALLING}))
    session = Session(recipe, tmp_path, scheduler_options={"ft_schedule": path})
    with pytest.raises(
        MisconfigurationException, match=r"mine\.yaml:\d+, phase 1.*does not take `init_args`.*not callable"
    ):
        session.fit()


# --- LightningCLI -----------------------------------------------------------------------------------------------------


class CliToy(Toy):
    """A module whose constructor takes nothing."""

    def __init__(self) -> None:
        scores = (5.0, 6.0, 4.0, 4.5, 3.0, 3.5)  # each second epoch is worse
        super().__init__(Recipe(**(vars(RECIPE) | {"epochs": 6, "scores": scores})))


class CliToyWithoutDecay(CliToy):
    no_decay = ("bias",)


IMPLICIT = """
trainer:
  max_epochs: 6
  callbacks:
  - class_path: finetuning_scheduler.FinetuningScheduler
    init_args:
      max_depth: 2
      base_max_lr: 1e-04
      restore_best: false
      reinit_optim_cfg:
        optimizer_init:
          class_path: torch.optim.SGD
          init_args:
            lr: 2.0e-03
            momentum: 0.9
            weight_decay: 2.0e-06
      reinit_lr_cfg:
        lr_scheduler_init:
          class_path: torch.optim.lr_scheduler.StepLR
          init_args:
            step_size: 1
            gamma: 0.7
        pl_lrs_cfg:
          interval: epoch
          frequency: 1
          name: Implicit_Reinit_LR_Scheduler
        use_current_optimizer_pg_lrs: true
  - class_path: finetuning_scheduler.FTSEarlyStopping
    init_args: {monitor: val_loss, patience: 1, min_delta: 0.001, mode: min, check_on_train_epoch_end: null}
  - class_path: finetuning_scheduler.FTSCheckpoint
    init_args: {monitor: val_loss, mode: min, save_top_k: 5, save_last: true, verbose: true}
"""
IMPLICIT_EPOCHS = (
    Epoch(0, (0.1,)),
    Epoch(0, (0.05,)),
    Epoch(1, (0.025, 1e-4), "SGD", decay=(2e-6, 2e-6)),
    Epoch(1, (0.025 * 0.7, 1e-4 * 0.7), "SGD"),
    Epoch(2, (0.025 * 0.49, 1e-4 * 0.49, 1e-4), "SGD"),
    Epoch(2, (0.025 * 0.343, 1e-4 * 0.343, 1e-4 * 0.7), "SGD"),
)
EXPLICIT = """
trainer:
  max_epochs: 4
  callbacks:
  - class_path: finetuning_scheduler.FinetuningScheduler
    init_args:
      ft_schedule: SCHEDULE
      max_depth: 1
      epoch_transitions_only: true
      restore_best: true
  - class_path: lightning.pytorch.callbacks.ModelCheckpoint
    init_args: {monitor: val_loss, save_top_k: 1}
  - class_path: lightning.pytorch.callbacks.LearningRateMonitor
    init_args: {logging_interval: epoch}
  logger:
    class_path: lightning.pytorch.loggers.CSVLogger
    init_args: {save_dir: ROOT}
"""
EXPLICIT_SCHEDULE = """
0:
  params: [network.head.*]
  max_transition_epoch: 2
1:
  params:
  - network.third.*
  lr: 2e-03
  max_transition_epoch: 4
  new_lr_scheduler:
    lr_scheduler_init:
      class_path: torch.optim.lr_scheduler.CosineAnnealingLR
      init_args: {T_max: 2}
    pl_lrs_cfg: {name: Cosine}
    init_pg_lrs: [1.0e-03, 1.0e-03]
2:
  params: ["*"]
"""
EXPLICIT_EPOCHS = (
    Epoch(0, (0.1, 0.1), decay=(0.1, 0.0)),
    Epoch(0, (0.05, 0.05), decay=(0.1, 0.0)),
    Epoch(1, (1e-3, 1e-3, 2e-3, 2e-3), scheduler="CosineAnnealingLR", decay=(0.1, 0.0) * 2),
    Epoch(1, (5e-4, 5e-4, 1e-3, 1e-3), scheduler="CosineAnnealingLR"),  # half way down to 0
)


@pytest.mark.parametrize(
    ("text", "module", "expected"),
    [(IMPLICIT, CliToy, IMPLICIT_EPOCHS), (EXPLICIT, CliToyWithoutDecay, EXPLICIT_EPOCHS)],
    ids=["implicit", "explicit"],
)
def test_a_configuration_of_the_command_line(
    text: str, module: type[Toy], expected: tuple[Epoch, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    schedule, config = tmp_path / "schedule.yaml", tmp_path / "mine.yaml"
    schedule.write_text(EXPLICIT_SCHEDULE, encoding="utf-8")
    config.write_text(text.replace("SCHEDULE", str(schedule)).replace("ROOT", str(tmp_path)), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["program"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's own use of jsonargparse
    seen = AtStart()
    quiet = {
        "accelerator": "cpu",
        "default_root_dir": str(tmp_path),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    if "logger" not in text:
        quiet["logger"] = False
    words = ["fit", "--config", str(config)]
    torch.manual_seed(0)
    command = LightningCLI(
        module, args=words, seed_everything_default=False, trainer_defaults={**quiet, "callbacks": [seen]}
    )
    assert_seen(seen.seen, expected)
    assert command.trainer.current_epoch == len(expected)
