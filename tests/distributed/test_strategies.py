"""Every strategy: a scheduled run on several ranks equals the run on one device, and goes on after a resume."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import nn

from tests.reference import cases, harness
from tests.reference.cases import SCHEDULE, Classifier, Recorder
from tests.reference.history import Epoch
from tests.reference.networks import SECOND, THIRD
from tests.reference.recipe import adamw, momentum_sgd

ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003, "weight_decay": 0.1}}
HALVING = {"class_path": "torch.optim.lr_scheduler.ExponentialLR", "init_args": {"gamma": 0.5}}
PLATEAU = {  # a minimum for each group, the phase's own included; every epoch is worse than the one before
    "class_path": "torch.optim.lr_scheduler.ReduceLROnPlateau",
    "init_args": {"factor": 0.25, "patience": 0, "min_lr": [0.002, 0.004, 0.006]},
}
NEW_OPTIMIZER: dict[int, dict[str, Any]] = {
    0: SCHEDULE[0],
    1: SCHEDULE[1] | {"new_optimizer": {"optimizer_init": ADAMW}, "new_lr_scheduler": {"lr_scheduler_init": HALVING}},
    2: SCHEDULE[2] | {"new_lr_scheduler": {"lr_scheduler_init": PLATEAU, "pl_lrs_cfg": {"monitor": "val_loss"}}},
}


def zero(parameters: Any) -> torch.optim.Optimizer:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(parameters, optimizer_class=torch.optim.AdamW, lr=0.01, weight_decay=0.1)


@dataclass(frozen=True)
class Case:
    """A way to train on several ranks.

    Args:
        strategy: Makes Lightning's strategy.
        optimizer: Makes the optimizer; with momentum small learning rates keep rounding of another order of summation
            small too.
        module: The LightningModule.
        adapter: Arguments of the strategy adapter.
        ranks: Number of processes.
        alone: The optimizer on one device, if it is another.
        variant: Of a strategy that another case has already; it is run with restoring only.
        schedule: The phases.
    """

    strategy: Callable[[], Any]
    optimizer: Callable[[Any], Any] = adamw
    module: Callable[[Any], Classifier] = Classifier
    adapter: dict[str, Any] = field(default_factory=dict)
    ranks: int = 2
    alone: Callable[[Any], Any] | None = None
    variant: bool = False
    schedule: dict[int, dict[str, Any]] = field(default_factory=lambda: SCHEDULE)


LAYERS = "network.(first|norm|second|third|head)"
FLAT = partial(cases.fsdp, use_orig_params=False, state_dict_type="sharded")
STRATEGIES = {
    "ddp sgd": Case(cases.ddp, momentum_sgd, variant=True),
    "ddp adamw": Case(cases.ddp),
    "ddp find_unused_parameters": Case(partial(cases.ddp, find_unused_parameters=True), variant=True),
    "ddp static_graph": Case(partial(cases.ddp, static_graph=True), variant=True),
    "ddp zero": Case(cases.ddp, zero, alone=adamw),
    "fsdp": Case(cases.fsdp),
    "fsdp sgd, sharded checkpoints": Case(partial(cases.fsdp, state_dict_type="sharded"), momentum_sgd, variant=True),
    "fsdp one unit": Case(partial(cases.fsdp, auto_wrap_policy=None), variant=True),
    "fsdp activation checkpointing": Case(
        partial(cases.fsdp, activation_checkpointing_policy={nn.Linear}), variant=True
    ),
    "fsdp cpu offload": Case(cases.fsdp_cpu_offload, variant=True),
    "fsdp wrapped by the module": Case(cases.FSDPOnCPU, module=cases.WrappedByItself, variant=True),
    "fsdp layers wrapped by the module": Case(
        partial(cases.FSDPOnCPU, use_orig_params=True, state_dict_type="sharded"),
        module=cases.LayersWrapped,
        variant=True,
    ),
    "fsdp use_orig_params=False": Case(FLAT),
    "fsdp use_orig_params=False, awp_overrides": Case(
        partial(FLAT, auto_wrap_policy=None),
        adapter={"awp_overrides": ["network.norm", "network.(first|second|third)"]},
        variant=True,
    ),
    "fsdp use_orig_params=False, activation checkpointing": Case(
        partial(FLAT, activation_checkpointing_policy={nn.Linear}), variant=True
    ),
    "fsdp use_orig_params=False, wrapped by the module": Case(
        partial(cases.FSDPOnCPU, use_orig_params=False, state_dict_type="sharded"),
        module=partial(cases.WrappedByItself, use_orig_params=False),
        variant=True,
    ),
    "fsdp2 sgd": Case(cases.fsdp2, momentum_sgd, cases.Sharded, variant=True),
    "fsdp2 adamw": Case(cases.fsdp2, module=cases.Sharded),
    "fsdp2 adamw, full checkpoints": Case(
        partial(cases.fsdp2, save_distributed_checkpoint=False), module=cases.Sharded, variant=True
    ),
    "fsdp2 one unit": Case(cases.fsdp2, module=cases.RootSharded, variant=True),
    "fsdp2 plan": Case(cases.fsdp2, adapter={"fsdp_plan": {LAYERS: None, "network": {"reshard_after_forward": False}}}),
    "fsdp2 plan beside configure_model": Case(
        cases.fsdp2, module=cases.HalfSharded, adapter={"fsdp_plan": {LAYERS: {}, "network": {}}}, variant=True
    ),
    "fsdp2 plan, composable checkpointing": Case(
        partial(cases.fsdp2, save_distributed_checkpoint=False),
        adapter={"fsdp_plan": {"network.(first|second)": {"act_ckpt": "composable"}, "network": {}}},
        variant=True,
    ),
    "fsdp2 plan, wrapped checkpointing": Case(
        cases.fsdp2,
        adapter={"fsdp_plan": {"network.(first|second)": {"act_ckpt": "wrapped"}, "network": {}}},
        variant=True,
    ),
    "fsdp2 plan, wrapped_offload checkpointing": Case(
        cases.fsdp2,
        adapter={"fsdp_plan": {"network.(first|second)": {"act_ckpt": "wrapped_offload"}, "network": {}}},
        variant=True,
    ),
    "fsdp2 plan, cpu offload": Case(
        cases.fsdp2,
        adapter={
            "fsdp_plan": {LAYERS: None, "network": None},
            "fsdp_default_kwargs": {"cpu_offload_policy": {"pin_memory": False}},
        },
        variant=True,
    ),
    "tensor parallel": Case(cases.tensor_parallel, momentum_sgd, cases.TensorParallel),
    "2-d mesh": Case(cases.mesh_2d, module=cases.TensorParallel, ranks=4),
}


class Keep(Checkpoint):
    """Saves at the end of some epochs, beside a copy of the best checkpoints as they were then."""

    def __init__(self, root: Path, epochs: Sequence[int]) -> None:
        self.root = root
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch not in self.epochs:
            return
        trainer.save_checkpoint(self.root / f"{trainer.current_epoch}.ckpt")
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            shutil.copytree(self.root / "best", self.root / f"best-{trainer.current_epoch}", dirs_exist_ok=True)
        trainer.strategy.barrier()


ALONE = Case(partial(str, "auto"))  # one device; it has to be picklable


def fit(
    root: Path,
    ranks: int,
    case: Case,
    restore_best: bool,
    keep: Sequence[int] = (),
    resume_from: Path | None = None,
) -> list[Epoch]:
    from finetuning_scheduler import FinetuningScheduler, FTSCheckpoint

    scheduler = FinetuningScheduler(case.schedule, restore_best=restore_best, strategy_adapter_cfg=case.adapter)
    recorder = Recorder(lambda: scheduler.curr_depth)
    best = FTSCheckpoint(dirpath=root / "best", monitor="val_loss")
    trainer = cases.make_trainer(
        root,
        ranks,
        case.strategy(),
        callbacks=[scheduler, recorder, best, Keep(root, keep)],
        enable_checkpointing=True,
        max_epochs=20,
    )
    trainer.fit(case.module(case.optimizer), ckpt_path=resume_from)
    return recorder.epochs


def resume(root: Path, ranks: int, case: Case, restore_best: bool, kept: Sequence[int]) -> dict[int, list[Epoch]]:
    """Resume from the checkpoint of each kept epoch, one after the other, in ranks that have trained nothing before."""
    resumed = {}
    for epoch in kept:
        roll_back(root, epoch)
        resumed[epoch] = fit(root, ranks, case, restore_best, resume_from=root / f"{epoch}.ckpt")
    return resumed


def roll_back(root: Path, epoch: int) -> None:
    """Put the best checkpoints back to what they were at the end of an epoch, once no rank needs the present ones."""
    meet()
    if harness.rank() == 0:
        shutil.rmtree(root / "best")
        shutil.copytree(root / f"best-{epoch}", root / "best")
    meet()


def meet() -> None:
    """Wait for the other ranks, if they know each other yet."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


IN_EACH_PHASE = (0, 2, 4)  # an epoch of each phase of `SCHEDULE`


@pytest.mark.parametrize(
    ("name", "restore_best"),
    [(name, True) for name in STRATEGIES] + [(name, False) for name, case in STRATEGIES.items() if not case.variant],
)
def test_ranks_together_equal_one_device_and_resume_in_each_phase(
    name: str, restore_best: bool, tmp_path: Path
) -> None:
    case = STRATEGIES[name]
    expected = cases.on_one_device(case.schedule, optimizer=case.alone or case.optimizer, restore_best=restore_best)
    root = tmp_path / "many"
    assert {epoch.phase for epoch in expected} == {0, 1, 2}
    for epochs in harness.run_ranks(fit, case.ranks, root, case.ranks, case, restore_best, IN_EACH_PHASE):
        cases.assert_same_epochs(epochs, expected)
    for resumed in harness.run_ranks(resume, case.ranks, root, case.ranks, case, restore_best, IN_EACH_PHASE):
        for epoch in IN_EACH_PHASE:
            cases.assert_same_epochs(resumed[epoch], expected[epoch + 1 :])


REINITIALISED = {
    "ddp": Case(cases.ddp, module=cases.Worsening),
    "fsdp": Case(cases.fsdp, module=cases.Worsening),
    "fsdp use_orig_params=False": Case(FLAT, module=cases.Worsening),
    "fsdp2": Case(cases.fsdp2, module=cases.WorseningSharded),
    "fsdp2, full checkpoints": Case(
        partial(cases.fsdp2, save_distributed_checkpoint=False), module=cases.WorseningSharded
    ),
    "tensor parallel": Case(cases.tensor_parallel, module=cases.WorseningTensorParallel),
}


@pytest.mark.parametrize("name", REINITIALISED)
def test_the_best_checkpoint_of_another_optimizer_is_restored(name: str, tmp_path: Path) -> None:
    """Phase 1 installs AdamW; before phase 2 the weights of phase 0 come back, which SGD had trained."""
    case = replace(REINITIALISED[name], optimizer=momentum_sgd, schedule=NEW_OPTIMIZER)
    expected = reinitialised_on_one_device()
    # AdamW's own rate is the first one of phase 0's group; then each goes down to its own minimum.
    assert [epoch.lrs for epoch in expected[3:]] == [(0.003, 0.05, 0.02), (0.003, 0.05, 0.02), (0.002, 0.0125, 0.006)]
    kept = (2, 4)
    for epochs in harness.run_ranks(fit, 2, tmp_path, 2, case, True, kept):
        cases.assert_same_epochs(epochs, expected)
    for resumed in harness.run_ranks(resume, 2, tmp_path, 2, case, True, kept):
        for epoch in kept:
            cases.assert_same_epochs(resumed[epoch], expected[epoch + 1 :])


@cache
def reinitialised_on_one_device() -> list[Epoch]:
    """With the package, since the reference loop installs nothing."""
    case = replace(ALONE, optimizer=momentum_sgd, module=cases.Worsening, schedule=NEW_OPTIMIZER)
    with TemporaryDirectory() as root:
        (epochs,) = harness.run_ranks(fit, 1, Path(root), 1, case, True)
    return epochs


WITHIN_AN_EPOCH = {**cases.AN_EPOCH_EACH, 1: {"params": [*THIRD, *SECOND], "lr": 0.01, "max_transition_step": 5}}
PLAN = STRATEGIES["fsdp2 plan"].adapter


@pytest.mark.parametrize(
    ("strategy", "module", "adapter"),
    [
        (cases.ddp, Classifier, None),
        (cases.fsdp, Classifier, None),
        (FLAT, Classifier, None),
        (cases.fsdp2, Classifier, PLAN),
        (cases.tensor_parallel, cases.TensorParallel, None),
    ],
    ids=["ddp", "fsdp", "fsdp use_orig_params=False", "fsdp2", "tensor parallel"],
)
def test_gradients_can_be_accumulated(strategy: Any, module: type[Classifier], adapter: Any, tmp_path: Path) -> None:
    expected = cases.on_one_device(WITHIN_AN_EPOCH, accumulate=2)
    run = partial(cases.fit, schedule=WITHIN_AN_EPOCH, accumulate_grad_batches=2, module=module, adapter=adapter)
    for epochs in harness.run_ranks(run, 2, tmp_path, 2, strategy):
        cases.assert_same_epochs(epochs, expected)


@pytest.mark.parametrize(("strategy", "adapter"), [(cases.ddp, None), (cases.fsdp2, PLAN)], ids=["ddp", "fsdp2"])
def test_layers_can_be_compiled(strategy: Any, adapter: Any, tmp_path: Path) -> None:
    expected = cases.on_one_device()
    run = partial(cases.fit, module=cases.Compiled, adapter=adapter)
    for epochs in harness.run_ranks(run, 2, tmp_path, 2, strategy):
        cases.assert_same_epochs(epochs, expected)


ACROSS_WORLD_SIZES = {
    "ddp": {1: ALONE, 2: STRATEGIES["ddp adamw"]},
    "fsdp2": {ranks: Case(partial(cases.fsdp2, ranks), module=cases.Sharded) for ranks in (1, 2)},
    "fsdp2 plan": {ranks: replace(STRATEGIES["fsdp2 plan"], strategy=partial(cases.fsdp2, ranks)) for ranks in (1, 2)},
}


@pytest.mark.parametrize("strategy", ACROSS_WORLD_SIZES)
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_checkpoint_of_one_rank_resumes_on_two_and_back(
    before: int, after: int, strategy: str, tmp_path: Path
) -> None:
    in_world = ACROSS_WORLD_SIZES[strategy]
    saved = harness.run_ranks(fit, before, tmp_path, before, in_world[before], True, IN_EACH_PHASE)
    for resumed in harness.run_ranks(resume, after, tmp_path, after, in_world[after], True, IN_EACH_PHASE):
        for epoch in IN_EACH_PHASE:
            cases.assert_same_epochs(resumed[epoch], saved[0][epoch + 1 :])
