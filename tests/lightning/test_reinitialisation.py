"""Optimizers and LR schedulers that phases install: which are in force, from which learning rates, and what is said."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LinearLR, LRScheduler, OneCycleLR, StepLR

from finetuning_scheduler.core import PhaseRunner, generate
from tests.reference.history import assert_continues, assert_same_run
from tests.reference.networks import BATCHES_PER_EPOCH, FIRST, HEAD, SECOND, THIRD, Wrapped, build_network, mlp
from tests.reference.recipe import PhaseSpec, Recipe, momentum_sgd, schedule_of
from tests.reference.toys import WHEN_SAVED, SaveAt, Session, Toy, ToyOverAll, ToyResumable, roll_back

if TYPE_CHECKING:
    from pathlib import Path

STEP_LR = "torch.optim.lr_scheduler.StepLR"
LINEAR_LR = "torch.optim.lr_scheduler.LinearLR"
PLATEAU = "torch.optim.lr_scheduler.ReduceLROnPlateau"
CYCLIC = "torch.optim.lr_scheduler.CyclicLR"
SUPPORTED = (
    "StepLR, MultiStepLR, CosineAnnealingWarmRestarts, ReduceLROnPlateau, LambdaLR, ConstantLR, LinearLR, "
    "ExponentialLR, CosineAnnealingLR, MultiplicativeLR, PolynomialLR, OneCycleLR, CyclicLR, SequentialLR, "
    "ChainedScheduler, SWALR"
)

# The best of each of the first three phases is not its last epoch.
SCORES = (5.0, 6.0, 4.0, 4.5, 3.0, 3.5, 3.25, 2.0)
RECIPE = Recipe(
    phases=(
        PhaseSpec(HEAD, max_epoch=2),
        PhaseSpec(THIRD, lr=0.05, max_epoch=4),
        PhaseSpec(SECOND, lr=0.02, max_epoch=6),
        PhaseSpec(FIRST, lr=0.01),
    ),
    epochs=8,
    optimizer=momentum_sgd,
    scheduler=lambda optimizer: StepLR(optimizer, step_size=1, gamma=0.5),
    scores=SCORES,
)


def optimizer_spec(name: str, **init_args: Any) -> dict[str, Any]:
    return {"optimizer_init": {"class_path": f"torch.optim.{name}", "init_args": init_args}}


def scheduler_spec(class_path: str, init_args: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {"lr_scheduler_init": {"class_path": class_path, "init_args": init_args}, **others}


ADAMW = optimizer_spec("AdamW", lr=0.03)
ADAM = optimizer_spec("Adam")
EACH_EPOCH = scheduler_spec(STEP_LR, {"step_size": 2, "gamma": 0.7}, use_current_optimizer_pg_lrs=True)
EACH_STEP = scheduler_spec(
    LINEAR_LR, {"start_factor": 0.5, "total_iters": 7}, pl_lrs_cfg={"interval": "step", "frequency": 2}
)


def with_keys(recipe: Recipe, keys: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The callback's options: the recipe's schedule with more keys in some phases."""
    phases = schedule_of(recipe)
    for number, more in keys.items():
        phases[number].update(more)
    return {"ft_schedule": phases}


# --- which objects are in force ---------------------------------------------------------------------------------------


class InForce(Callback):
    """Notes, in each epoch, what the trainer steps."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.objects: list[object] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step % BATCHES_PER_EPOCH == 0:
            (optimizer,) = trainer.optimizers
            (config,) = trainer.lr_scheduler_configs
            assert config.scheduler.optimizer is optimizer
            self.names.append(f"{type(optimizer).__name__} {type(config.scheduler).__name__} {config.interval}")
            self.objects.append((optimizer, config.scheduler))


IN_FORCE = {
    "both-then-scheduler-then-optimizer": (
        {
            1: {"new_optimizer": ADAMW, "new_lr_scheduler": EACH_EPOCH},
            2: {"new_lr_scheduler": EACH_STEP},
            3: {"new_optimizer": ADAM},
        },
        ["SGD StepLR epoch", "AdamW StepLR epoch", "AdamW LinearLR step", "Adam LinearLR step"],
    ),
    "optimizer-stays": (
        {1: {"new_optimizer": ADAMW}},
        ["SGD StepLR epoch", "AdamW StepLR epoch", "AdamW StepLR epoch", "AdamW StepLR epoch"],
    ),
    "scheduler-stays": (
        {2: {"new_lr_scheduler": EACH_STEP}},
        ["SGD StepLR epoch", "SGD StepLR epoch", "SGD LinearLR step", "SGD LinearLR step"],
    ),
}


@pytest.mark.parametrize(("keys", "names"), IN_FORCE.values(), ids=IN_FORCE.keys())
def test_what_a_phase_installs_stays_in_force_until_replaced(
    keys: dict[int, dict[str, Any]], names: list[str], tmp_path: Path
) -> None:
    seen = InForce()
    session = Session(RECIPE, tmp_path, extra_callbacks=(seen,), scheduler_options=with_keys(RECIPE, keys)).fit()
    assert [epoch.phase for epoch in session.history.epochs] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert seen.names == [name for name in names for _ in range(2)]
    for phase in set(range(1, 4)) - keys.keys():
        assert seen.objects[2 * phase] == seen.objects[2 * phase - 1]


def test_each_replacement_is_one_line_and_full_at_debug(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys, _ = IN_FORCE["both-then-scheduler-then-optimizer"]
    options = with_keys(RECIPE, keys) | {"logging_level": logging.DEBUG}
    with caplog.at_level(logging.DEBUG, logger="finetuning_scheduler"):
        Session(RECIPE, tmp_path, scheduler_options=options).fit()
    records = [record for record in caplog.records if record.name == "finetuning_scheduler"]
    lines = [r.getMessage() for r in records if r.levelno == logging.INFO and "replaces" in r.getMessage()]
    assert lines == [
        "Phase 1: optimizer AdamW replaces SGD",
        "Phase 1: LR scheduler StepLR replaces StepLR",
        "Phase 2: LR scheduler LinearLR replaces StepLR",
        "Phase 3: optimizer Adam replaces AdamW",
    ]
    details = [record.getMessage() for record in records if record.levelno == logging.DEBUG]
    assert len(details) == 4
    expected = [("AdamW", "weight_decay: 0.01"), ("StepLR", "0.7"), ("LinearLR", "total_iters"), ("Adam", "betas")]
    for text, words in zip(details, expected, strict=True):
        assert all(word in text for word in words)


def test_without_a_scheduler_before(messages: Callable[[], list[str]], tmp_path: Path) -> None:
    recipe = replace(RECIPE, scheduler=None)
    Session(recipe, tmp_path, scheduler_options=with_keys(recipe, {1: {"new_lr_scheduler": EACH_EPOCH}})).fit()
    assert "Phase 1: LR scheduler StepLR replaces none" in messages()


# --- pl_lrs_cfg -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stepping:
    """A scheduler of phase 1 and the factor on the first group's learning rate, in each step of phase 1."""

    spec: dict[str, Any]
    factors: list[float]


def halving(**settings: Any) -> dict[str, Any]:
    return scheduler_spec(STEP_LR, {"step_size": 1, "gamma": 0.5}, pl_lrs_cfg=settings)


def on_plateau(**settings: Any) -> dict[str, Any]:
    return scheduler_spec(PLATEAU, {"factor": 0.5, "patience": 0}, pl_lrs_cfg=settings)


STEPPING = {
    "default": Stepping(scheduler_spec(STEP_LR, {"step_size": 1, "gamma": 0.5}), [1.0] * 4 + [0.5] * 4 + [0.25] * 4),
    "epoch": Stepping(halving(interval="epoch", name="mine"), [1.0] * 4 + [0.5] * 4 + [0.25] * 4),
    # Lightning counts epochs from the session's start: the scheduler steps after epochs 3 and 5.
    "every-second-epoch": Stepping(halving(interval="epoch", frequency=2), [1.0] * 8 + [0.5] * 4),
    "step": Stepping(halving(interval="step"), [0.5**step for step in range(12)]),
    "every-second-step": Stepping(halving(interval="step", frequency=2), [0.5 ** (step // 2) for step in range(12)]),
    "plateau": Stepping(on_plateau(monitor="val_loss"), [1.0] * 4 + [1.0] * 4 + [0.5] * 4),
    "plateau-of-another-metric": Stepping(on_plateau(monitor="other"), [1.0] * 4 + [1.0] * 4 + [1.0] * 4),
    "plateau-not-strict": Stepping(on_plateau(monitor="missing", strict=False), [1.0] * 12),
}


class ToyWithMetric(Toy):
    """Logs a metric that always improves."""

    def validation_step(self, batch: Any) -> None:
        super().validation_step(batch)
        self.log("other", -float(self.current_epoch), batch_size=8)


@pytest.mark.filterwarnings("ignore:ReduceLROnPlateau conditioned on metric missing:RuntimeWarning")
@pytest.mark.parametrize("case", STEPPING.values(), ids=STEPPING.keys())
def test_pl_lrs_cfg_is_honoured(case: Stepping, tmp_path: Path) -> None:
    phases = (PhaseSpec(HEAD, max_epoch=1), PhaseSpec(THIRD, lr=0.05))
    recipe = replace(RECIPE, phases=phases, epochs=4, scheduler=None, scores=(5.0, 4.0, 4.5, 4.25))
    if case is STEPPING["every-second-epoch"]:
        recipe = replace(recipe, phases=(replace(phases[0], max_epoch=2), phases[1]), epochs=5, scores=(5.0,) * 5)
    options = with_keys(recipe, {1: {"new_lr_scheduler": case.spec}})
    history = Session(recipe, tmp_path, module=ToyWithMetric, scheduler_options=options).fit().history
    assert [step.lrs[0] for step in history.steps if step.phase == 1] == [0.1 * factor for factor in case.factors]


# --- precedence of learning rates -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Precedence:
    """Keys of phases 1 and 2, and the groups' ``lr`` and ``initial_lr`` when phase 2 has begun.

    The user's groups start at 0.1 and 0.4, and their StepLR has halved them before phase 1 and again before phase 2.
    """

    lrs: list[float]
    initial_lrs: list[float]
    phase_1: dict[str, Any] = field(default_factory=dict)
    phase_2: dict[str, Any] = field(default_factory=dict)


def step_lr(**others: Any) -> dict[str, Any]:
    return {"new_lr_scheduler": scheduler_spec(STEP_LR, {"step_size": 1, "gamma": 0.5}, **others)}


def sgd(**init_args: Any) -> dict[str, Any]:
    return {"new_optimizer": optimizer_spec("SGD", **init_args)}


PRECEDENCE = {
    "nothing": Precedence([0.025, 0.1, 0.5, 0.25], [0.1, 0.4, 1.0, 0.25]),
    "initial": Precedence([0.05, 0.2, 0.5, 0.25], [0.1, 0.4, 1.0, 0.25], step_lr()),
    "initial-in-phase-2": Precedence([0.1, 0.4, 1.0, 0.25], [0.1, 0.4, 1.0, 0.25], {}, step_lr()),
    "current": Precedence([0.025, 0.1, 0.5, 0.25], [0.05, 0.2, 1.0, 0.25], step_lr(use_current_optimizer_pg_lrs=True)),
    "init_pg_lrs": Precedence([0.15, 0.35, 0.5, 0.25], [0.3, 0.7, 1.0, 0.25], step_lr(init_pg_lrs=[0.3, 0.7])),
    "init_pg_lrs-before-current": Precedence(
        [0.15, 0.35, 0.5, 0.25],
        [0.3, 0.7, 1.0, 0.25],
        step_lr(init_pg_lrs=[0.3, 0.7], use_current_optimizer_pg_lrs=True),
    ),
    "optimizer-alone": Precedence([0.025, 0.1, 0.5, 0.25], [0.1, 0.4, 1.0, 0.25], sgd()),
    "optimizer-with-lr-alone": Precedence([0.025, 0.1, 0.5, 0.25], [0.8, 0.8, 1.0, 0.25], sgd(lr=0.8)),
    "both": Precedence([0.05, 0.2, 0.5, 0.25], [0.1, 0.4, 1.0, 0.25], {**sgd(), **step_lr()}),
    "both-with-lr": Precedence([0.4, 0.4, 0.5, 0.25], [0.8, 0.8, 1.0, 0.25], {**sgd(lr=0.8), **step_lr()}),
    "both-with-lr-but-current": Precedence(
        [0.025, 0.1, 0.5, 0.25],
        [0.05, 0.2, 1.0, 0.25],
        {**sgd(lr=0.8), **step_lr(use_current_optimizer_pg_lrs=True)},
    ),
    "both-with-lr-but-init_pg_lrs": Precedence(
        [0.15, 0.35, 0.5, 0.25], [0.3, 0.7, 1.0, 0.25], {**sgd(lr=0.8), **step_lr(init_pg_lrs=[0.3, 0.7])}
    ),
    "optimizer-then-scheduler": Precedence([0.8, 0.8, 1.0, 0.25], [0.8, 0.8, 1.0, 0.25], sgd(lr=0.8), step_lr()),
    "optimizer-of-phase-2": Precedence([0.025, 0.1, 0.5, 0.25], [0.8, 0.8, 1.0, 0.25], {}, sgd(lr=0.8)),
    "both-of-phase-2": Precedence([0.8, 0.8, 1.0, 0.25], [0.8, 0.8, 1.0, 0.25], {}, {**sgd(lr=0.8), **step_lr()}),
}


@pytest.mark.parametrize("case", PRECEDENCE.values(), ids=PRECEDENCE.keys())
def test_learning_rates_when_a_phase_installs_something(case: Precedence) -> None:
    model = Wrapped(build_network(mlp))
    bias, weight = (model.get_parameter(name) for name in HEAD)
    optimizer = SGD([{"params": [bias], "lr": 0.1}, {"params": [weight], "lr": 0.4}], lr=0.9)
    phases = {
        0: {"params": list(HEAD), "max_transition_epoch": 1},
        1: {"params": list(THIRD), "lr": 1.0, "max_transition_epoch": 2, **case.phase_1},
        2: {"params": list(SECOND), "lr": 0.25, **case.phase_2},
    }
    runner = PhaseRunner(model, optimizer, phases, lr_schedulers=[StepLR(optimizer, step_size=1, gamma=0.5)])
    for _ in range(2):
        runner.optimizer.step()
        runner.step()
        (scheduler,) = runner.lr_schedulers
        scheduler.step()
        runner.epoch_end()
    groups = runner.optimizer.param_groups
    assert [group["lr"] for group in groups] == case.lrs
    assert [group["initial_lr"] for group in groups] == case.initial_lrs


def test_the_momentum_that_a_replaced_scheduler_cycled_is_not_the_groups_own() -> None:
    """OneCycleLR writes momenta into the groups when it is made; a later phase's SGD has its own."""
    model = Wrapped(build_network(mlp))
    optimizer = SGD([model.get_parameter(name) for name in HEAD], lr=0.1, momentum=0.9)
    phases = {
        0: {"params": list(HEAD)},
        1: {"params": list(THIRD), "lr": 0.1, **sgd(lr=0.1, momentum=0.5), **step_lr()},
        2: {"params": list(SECOND), "lr": 0.1},
    }
    scheduler = OneCycleLR(optimizer, max_lr=0.5, total_steps=9)
    runner = PhaseRunner(model, optimizer, phases, lr_schedulers=[scheduler])
    runner.thaw_to(2)
    assert [group["momentum"] for group in runner.optimizer.param_groups] == [0.5, 0.5, 0.5]


# --- restore-best -----------------------------------------------------------------------------------------------------


class AtPhaseStart(Callback):
    """Notes weights, state and learning rates before the first batch of a phase."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.weights: dict[str, torch.Tensor] = {}
        self.state_size = -1

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}
            self.state_size = len(trainer.optimizers[0].state)


RESTORED = {
    "another-class": ({1: {"new_optimizer": ADAMW}}, 0, 1, "AdamW"),
    "another-class-with-scheduler": ({1: {"new_optimizer": ADAMW, "new_lr_scheduler": EACH_STEP}}, 0, 1, "AdamW"),
    "replaced-just-after-the-restore": ({2: {"new_optimizer": ADAMW}}, 0, 0, ""),
    "only-the-scheduler": ({1: {"new_lr_scheduler": EACH_STEP}}, 2, 0, ""),
}


@pytest.mark.parametrize(("keys", "state_size", "warnings", "name"), RESTORED.values(), ids=RESTORED.keys())
def test_restoring_the_best_of_a_phase_with_another_optimizer(
    keys: dict[int, dict[str, Any]],
    state_size: int,
    warnings: int,
    name: str,
    tmp_path: Path,
    messages: Callable[[], list[str]],
) -> None:
    """The best checkpoint of phase 0 is still the best when phase 2 begins."""
    recipe = replace(RECIPE, phases=RECIPE.phases[:3], scores=(5.0, 6.0, 6.5, 6.25, 4.0, 3.0), epochs=6)
    start = AtPhaseStart(4 * BATCHES_PER_EPOCH)
    session = Session(recipe, tmp_path, extra_callbacks=(start,), scheduler_options=with_keys(recipe, keys)).fit()
    best = session.history.epochs[0].weights
    assert [key for key, tensor in start.weights.items() if not torch.equal(tensor, best[key])] == []
    assert start.state_size == state_size
    text = f"The best state, of phase 0, belongs to another optimizer: {name} starts without state."
    assert [message for message in messages() if "belongs to another optimizer" in message] == [text] * warnings


@pytest.mark.parametrize("keys", [case[0] for case in RESTORED.values()], ids=RESTORED.keys())
def test_restoring_the_best_brings_no_older_learning_rate_back(keys: dict[int, dict[str, Any]], tmp_path: Path) -> None:
    recipe = replace(RECIPE, phases=RECIPE.phases[:3], scores=(5.0, 6.0, 6.5, 6.25, 4.0, 3.0), epochs=6)
    options = with_keys(recipe, keys)
    restoring = Session(recipe, tmp_path / "restoring", scheduler_options=options).fit()
    going_on = Session(replace(recipe, restore_best=False), tmp_path / "going-on", scheduler_options=options).fit()
    assert restoring.history.steps == going_on.history.steps


# --- resume -----------------------------------------------------------------------------------------------------------

RESUMED = {
    "each-phase-another": {
        1: {"new_optimizer": ADAMW, "new_lr_scheduler": EACH_EPOCH},
        2: {"new_lr_scheduler": EACH_STEP},
        3: {"new_optimizer": optimizer_spec("RMSprop", lr=0.01, momentum=0.5)},
    },
    "each-phase-both": {
        1: {"new_optimizer": ADAMW, "new_lr_scheduler": EACH_STEP},
        2: {"new_optimizer": ADAMW, "new_lr_scheduler": EACH_EPOCH},
        3: {"new_optimizer": optimizer_spec("SGD", lr=0.01, momentum=0.9), "new_lr_scheduler": EACH_STEP},
    },
    "lists": {
        1: {"new_lr_scheduler": scheduler_spec(STEP_LR, {"step_size": 1, "gamma": 0.7}, init_pg_lrs=[0.02])},
        3: {
            "new_lr_scheduler": scheduler_spec(
                "torch.optim.lr_scheduler.OneCycleLR",
                {"max_lr": [0.1, 0.05, 0.02, 0.03], "total_steps": 20},
                pl_lrs_cfg={"interval": "step"},
            )
        },
    },
    "warm-up": {
        0: {"lr_warmup_steps": 3},
        1: {"lr_warmup_steps": 12},
        2: {"lr_warmup_steps": 6, "new_optimizer": ADAMW},
    },
}


@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_validation_end", "on_train_batch_end"])
@pytest.mark.parametrize("keys", RESUMED.values(), ids=RESUMED.keys())
def test_a_resumed_run_ends_as_the_uninterrupted_one(
    keys: dict[int, dict[str, Any]], hook: str, tmp_path: Path
) -> None:
    saver = SaveAt(hook, tmp_path)
    options: dict[str, Any] = {
        "module": ToyResumable,
        "checkpoint": WHEN_SAVED[hook],
        "scheduler_options": with_keys(RECIPE, keys),
    }
    whole = Session(RECIPE, tmp_path, extra_callbacks=(saver,), **options).fit().history
    inside = hook == "on_train_batch_end"
    checkpoints = [path for path, steps in saver.steps.items() if steps < len(whole.steps)]
    checkpoints = [path for path in checkpoints if not inside or saver.steps[path] % 8 in (3, 6)]
    for checkpoint in checkpoints:
        roll_back(tmp_path, saver.files[checkpoint])
        resumed = Session(RECIPE, tmp_path, **options).fit(ckpt_path=checkpoint).history
        assert_continues(resumed, whole, saver.steps[checkpoint])


# --- implicit mode ----------------------------------------------------------------------------------------------------

PATIENCE = replace(
    RECIPE,
    phases=tuple(PhaseSpec(names) for names in (HEAD, THIRD, SECOND, FIRST)),
    patience=1,
    scheduler=lambda optimizer: LinearLR(optimizer, 0.5, 1.0, total_iters=3),
    scores=(5.0, 6.0, 4.0, 4.5, 3.0, 3.5, 2.0, 1.0),
)
IMPLICIT: dict[str, dict[str, Any]] = {
    "optimizer": {"reinit_optim_cfg": ADAMW},
    "scheduler": {"reinit_lr_cfg": EACH_EPOCH},
    "both": {"reinit_optim_cfg": ADAMW, "reinit_lr_cfg": EACH_STEP},
}


@pytest.mark.parametrize("configuration", IMPLICIT.values(), ids=IMPLICIT.keys())
def test_implicit_mode_is_a_generated_schedule_with_the_same_keys(
    configuration: dict[str, Any], tmp_path: Path
) -> None:
    phases = generate(Toy(PATIENCE)).to_dict()
    for number in range(1, len(phases)):
        if "reinit_optim_cfg" in configuration:
            phases[number]["new_optimizer"] = configuration["reinit_optim_cfg"]
        if "reinit_lr_cfg" in configuration:
            phases[number]["new_lr_scheduler"] = configuration["reinit_lr_cfg"]
    implicit = Session(PATIENCE, tmp_path / "implicit", explicit=False, scheduler_options=configuration).fit()
    explicit = Session(PATIENCE, tmp_path / "explicit", scheduler_options={"ft_schedule": phases}).fit()
    assert {epoch.phase for epoch in implicit.history.epochs} == {0, 1, 2, 3}
    assert_same_run(implicit.history, explicit.history)


def test_implicit_mode_replaces_at_every_transition(tmp_path: Path, messages: Callable[[], list[str]]) -> None:
    Session(PATIENCE, tmp_path, explicit=False, scheduler_options=IMPLICIT["both"]).fit()
    assert [message for message in messages() if " replaces " in message] == [
        "Phase 1: optimizer AdamW replaces SGD",
        "Phase 1: LR scheduler LinearLR replaces LinearLR",
        "Phase 2: optimizer AdamW replaces AdamW",
        "Phase 2: LR scheduler LinearLR replaces LinearLR",
        "Phase 3: optimizer AdamW replaces AdamW",
        "Phase 3: LR scheduler LinearLR replaces LinearLR",
    ]


def test_the_users_dictionaries_stay_as_they_are(tmp_path: Path) -> None:

    keys = RESUMED["each-phase-another"]
    options, configuration = with_keys(RECIPE, keys), copy.deepcopy(IMPLICIT["both"])
    before = copy.deepcopy(options)
    Session(RECIPE, tmp_path / "explicit", scheduler_options=options).fit()
    Session(PATIENCE, tmp_path / "implicit", explicit=False, scheduler_options=configuration).fit()
    assert options == before
    assert configuration == IMPLICIT["both"]


# --- refused before the first batch -----------------------------------------------------------------------------------


class PerGroup(LRScheduler):
    """Keeps a list of its own with an entry for each group, which nobody knows of."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.factors = [1.0 for _ in optimizer.param_groups]
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        return [lr * factor for lr, factor in zip(self.base_lrs, self.factors, strict=True)]


class Halving(LRScheduler):
    """Not known either, but keeps nothing for each group."""

    def get_lr(self) -> list[Any]:
        return [group["lr"] * 0.5 for group in self.optimizer.param_groups]


@dataclass(frozen=True)
class Refusal:
    message: str
    options: dict[str, Any] = field(default_factory=dict)
    explicit: bool = False
    scheduler: type[LRScheduler] | None = None


LISTS = "expected `reinit_lr_cfg` to suit any number of parameter groups, got"
REFUSALS = {
    "reinit_optim_cfg-with-schedule": Refusal(
        "expected `reinit_optim_cfg` without `ft_schedule` only, got both. "
        "Fix: Use `new_optimizer` and `new_lr_scheduler` in the schedule's phases.",
        {"reinit_optim_cfg": ADAMW},
        explicit=True,
    ),
    "reinit_lr_cfg-with-schedule": Refusal(
        "expected `reinit_lr_cfg` without `ft_schedule` only, got both. "
        "Fix: Use `new_optimizer` and `new_lr_scheduler` in the schedule's phases.",
        {"reinit_lr_cfg": EACH_EPOCH},
        explicit=True,
    ),
    "implicit-init_pg_lrs": Refusal(
        f"{LISTS} `init_pg_lrs`. Fix: Leave it out, or give it in the phases of an explicit schedule.",
        {"reinit_lr_cfg": scheduler_spec(STEP_LR, {"step_size": 1}, init_pg_lrs=[0.1])},
    ),
    "implicit-min_lr": Refusal(
        f"{LISTS} a list as `min_lr`. Fix: Give one value.",
        {"reinit_lr_cfg": scheduler_spec(PLATEAU, {"min_lr": [0.1]}, pl_lrs_cfg={"monitor": "val_loss"})},
    ),
    "implicit-base_lr-and-max_lr": Refusal(
        "2 problems found:\n"
        f"1. {LISTS} a list as `base_lr`. Fix: Give one value.\n"
        f"2. {LISTS} a list as `max_lr`. Fix: Give one value.",
        {"reinit_lr_cfg": scheduler_spec(CYCLIC, {"base_lr": [0.1, 0.2], "max_lr": (0.3, 0.4)})},
    ),
    "implicit-both-lists": Refusal(
        "2 problems found:\n"
        f"1. {LISTS} `init_pg_lrs`. Fix: Leave it out, or give it in the phases of an explicit schedule.\n"
        f"2. {LISTS} a list as `min_lr`. Fix: Give one value.",
        {
            "reinit_lr_cfg": scheduler_spec(
                PLATEAU, {"min_lr": [0.1]}, pl_lrs_cfg={"monitor": "val_loss"}, init_pg_lrs=[0.1]
            )
        },
    ),
    "wrong-length": Refusal(
        "phase 1: expected `init_pg_lrs` to have 1 values, one per existing group, got 2. Fix: Leave out the last one: "
        "the new group starts at the phase's own rate.",
        with_keys(RECIPE, {1: step_lr(init_pg_lrs=[0.1, 0.2])}),
    ),
    "unknown-class": Refusal(
        "phase 3: expected `new_optimizer` to name a class, got 'torch.optim.Sgd', which cannot be imported "
        "(module 'torch.optim' has no attribute 'Sgd'). Fix: Give the full import path of an installed class.",
        with_keys(RECIPE, {3: {"new_optimizer": optimizer_spec("Sgd")}}),
    ),
    "plateau-without-monitor": Refusal(
        "phase 2: expected torch.optim.lr_scheduler.ReduceLROnPlateau to have a metric to wait for, got no `monitor`. "
        "Fix: Name a logged metric as `monitor` in `pl_lrs_cfg`.",
        with_keys(RECIPE, {2: {"new_lr_scheduler": on_plateau()}}),
    ),
    "untested-scheduler": Refusal(
        f"expected a supported LR scheduler ({SUPPORTED}), got PerGroup. Fix: Set `allow_untested=True` to try it.",
        explicit=True,
        scheduler=PerGroup,
    ),
    "scheduler-that-cannot-follow": Refusal(
        "PerGroup cannot follow a new parameter group (ValueError: zip() argument 2 is shorter than argument 1). "
        "Fix: Use one of PyTorch's LR schedulers.",
        {"allow_untested": True},
        explicit=True,
        scheduler=PerGroup,
    ),
}


@pytest.mark.parametrize("case", REFUSALS.values(), ids=REFUSALS.keys())
def test_refused_before_the_first_batch(case: Refusal, tmp_path: Path) -> None:
    recipe = replace(RECIPE, scheduler=case.scheduler or RECIPE.scheduler)
    session = Session(recipe, tmp_path, explicit=case.explicit, scheduler_options=case.options)
    with pytest.raises(MisconfigurationException) as refusal:
        session.fit()
    assert str(refusal.value) == case.message
    assert session.history.steps == []


def test_an_untested_scheduler_that_can_follow_is_used_with_a_warning(
    tmp_path: Path, messages: Callable[[], list[str]]
) -> None:
    recipe = replace(RECIPE, scheduler=Halving)
    history = Session(recipe, tmp_path, scheduler_options={"allow_untested": True}).fit().history
    text = f"expected a supported LR scheduler ({SUPPORTED}), got Halving; going on since `allow_untested` is set."
    assert messages().count(text) == 1
    assert [epoch.lrs for epoch in history.epochs[2:5]] == [
        (0.1 * 0.5**4, 0.05 * 0.5),
        (0.1 * 0.5**5, 0.05 * 0.5**2),
        (0.1 * 0.5**6, 0.05 * 0.5**3, 0.02 * 0.5),
    ]


# --- groups with hyper-parameters of their own ------------------------------------------------------------------------

WEIGHTS = {"weight_decay": 0.3, "betas": (0.8, 0.9), "eps": 1e-6, "lr": 0.01}
BIASES = {"weight_decay": 0.0, "betas": (0.7, 0.95), "eps": 1e-7, "lr": 0.02}


def two_groups(parameters: Any) -> Optimizer:
    """Weights and biases differ in all they can."""
    parameters = list(parameters)
    weights = [parameter for parameter in parameters if parameter.dim() == 2]
    biases = [parameter for parameter in parameters if parameter.dim() == 1]
    return AdamW([{"params": weights, **WEIGHTS}, {"params": biases, **BIASES}], lr=0.5, weight_decay=0.1)


class OwnOptions(Callback):
    """Notes, when each epoch ends, each parameter's options in the optimizer."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, dict[str, Any]]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        (optimizer,) = trainer.optimizers
        name_of = {parameter: name for name, parameter in pl_module.named_parameters()}
        keys = [key for key in WEIGHTS if key in optimizer.param_groups[0]]
        self.epochs.append(
            {
                name_of[parameter]: {key: group[key] for key in keys}
                for group in optimizer.param_groups
                for parameter in group["params"]
            }
        )


@pytest.mark.parametrize("no_decay", [(), ("head", "second.weight")], ids=["plain", "no_decay"])
def test_parameters_join_with_the_options_of_the_group_they_came_from(
    no_decay: tuple[str, ...], tmp_path: Path
) -> None:
    recipe = replace(RECIPE, optimizer=two_groups, scheduler=None, no_decay=no_decay)
    seen = OwnOptions()
    Session(recipe, tmp_path, module=ToyOverAll, extra_callbacks=(seen,)).fit()
    for epoch, thawed in ((1, HEAD), (3, (*HEAD, *THIRD)), (5, (*HEAD, *THIRD, *SECOND))):
        assert seen.epochs[epoch].keys() == set(thawed)
        for name in thawed:
            expected = dict(WEIGHTS if name.endswith("weight") else BIASES)
            if name not in HEAD:
                expected["lr"] = 0.05 if name in THIRD else 0.02
                exempt = any(fragment in name for fragment in no_decay)
                expected["weight_decay"] = 0.0 if exempt else expected["weight_decay"]
            assert seen.epochs[epoch][name] == expected, f"{name} in epoch {epoch}"


def test_the_split_by_options_survives_a_new_optimizer(tmp_path: Path) -> None:
    recipe = replace(RECIPE, optimizer=two_groups, scheduler=None)
    options = with_keys(recipe, {2: {"new_optimizer": optimizer_spec("SGD", lr=0.03, weight_decay=0.2)}})
    session = Session(recipe, tmp_path, module=ToyOverAll, scheduler_options=options).fit()
    bias_of = [tuple(name for name in names if name.endswith("bias")) for names in (HEAD, THIRD, SECOND, FIRST)]
    weight_of = [tuple(name for name in names if name.endswith("weight")) for names in (HEAD, THIRD, SECOND, FIRST)]
    groups = session.history.epochs[-1].groups
    assert set(groups) == {*bias_of, *weight_of}


def test_a_run_with_groups_of_its_own_resumes_exactly(tmp_path: Path) -> None:
    recipe = replace(RECIPE, optimizer=two_groups)
    saver = SaveAt("on_train_epoch_end", tmp_path)
    whole = Session(recipe, tmp_path, extra_callbacks=(saver,)).fit().history
    for checkpoint in list(saver.files)[:-1]:
        roll_back(tmp_path, saver.files[checkpoint])
        resumed = Session(recipe, tmp_path).fit(ckpt_path=checkpoint).history
        assert_continues(resumed, whole, saver.steps[checkpoint])


# --- warm-up ----------------------------------------------------------------------------------------------------------

# By phase: its first step and its steps of warm-up. The ramps of phases 1 and 2 overlap.
RAMPS = {0: (0, 3), 1: (8, 12), 2: (16, 6)}
WARM = {phase: {"lr_warmup_steps": steps} for phase, (_, steps) in RAMPS.items()}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("scheduler", [StepLR, LinearLR])
def test_warm_up_scales_what_the_optimizer_sees(
    scheduler: type[LRScheduler], interval: str, accumulate: int, tmp_path: Path
) -> None:
    make = {
        StepLR: lambda optimizer: StepLR(optimizer, step_size=3, gamma=0.5),
        LinearLR: lambda optimizer: LinearLR(optimizer, 0.25, 1.0, total_iters=9),
    }
    recipe = replace(RECIPE, scheduler=make[scheduler], interval=interval, accumulate=accumulate)
    cold = Session(recipe, tmp_path / "cold").fit().history
    warm = Session(recipe, tmp_path / "warm", scheduler_options=with_keys(recipe, WARM)).fit().history
    assert [epoch.lrs for epoch in warm.epochs] == [epoch.lrs for epoch in cold.epochs]
    for number, (plain, scaled) in enumerate(zip(cold.steps, warm.steps, strict=True)):
        expected = list(plain.lrs)
        for phase, (entry, steps) in RAMPS.items():
            done = number - entry // accumulate
            if phase < len(expected) and done < steps:
                expected[phase] *= done / steps
        assert scaled.lrs == tuple(expected), f"step {number}"


class Failing(Callback):
    """The session dies inside an optimizer step, after its gradients were computed, and is saved."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_before_optimizer_step(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 11:
            raise ConnectionAbortedError("inside a step")

    def on_exception(self, trainer: Any, *_: Any) -> None:
        trainer.save_checkpoint(self.file)


def test_an_exception_inside_a_step_leaves_learning_rates_right_in_the_checkpoint(tmp_path: Path) -> None:
    recipe = replace(RECIPE, scheduler=None)
    options = with_keys(recipe, WARM)
    whole = Session(recipe, tmp_path / "whole", scheduler_options=options).fit().history
    failing = Failing(tmp_path / "saved.ckpt")
    session = Session(recipe, tmp_path / "killed", extra_callbacks=(failing,), scheduler_options=options)
    with pytest.raises(ConnectionAbortedError):
        session.fit()
    assert session.history.steps[-1].lrs == whole.steps[11].lrs == (0.1, 0.05 * (3 / 12))
    (state,) = torch.load(failing.file, weights_only=True)["optimizer_states"]
    assert [group["lr"] for group in state["param_groups"]] == [0.1, 0.05]


def test_a_group_in_warm_up_is_restored_with_its_full_learning_rate(tmp_path: Path) -> None:
    """The ramp goes on through a transition that restores the best checkpoint."""
    recipe = replace(RECIPE, scheduler=None, scores=(5.0, 6.0, 6.5, 6.25, 7.0, 7.5, 8.0, 8.5))
    history = Session(recipe, tmp_path, scheduler_options=with_keys(recipe, WARM)).fit().history
    assert [step.lrs[1] for step in history.steps[8:21]] == [0.05 * (done / 12) for done in range(12)] + [0.05]
