"""The SuperGLUE example's configurations, and configurations as users have them, through every phase on two ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.examples import superglue
from tests.examples.superglue import CONFIGURATIONS, RTE, Phase
from tests.reference import harness

# Parameter tensors of a DeBERTa: two of each of seven layers in a block and two norms, five around the blocks, a head.
AROUND, HEAD, BLOCK = 6, 4, 16
DEEP, SHALLOW = 12, 1
WHOLE = AROUND + HEAD + DEEP * BLOCK  # of 12 layers
EXPLICIT = [HEAD, HEAD + 6 * BLOCK, WHOLE]
ON_CPU = ["--trainer.strategy.class_path=tests.reference.cases.FSDPOnCPU"]  # Lightning's own wants GPUs

SHIPPED = sorted(
    str(path.relative_to(CONFIGURATIONS))
    for path in CONFIGURATIONS.rglob("*.yaml")
    if "_ft_schedule_" not in path.name and path.name != "fts_defaults.yaml"
)
ADAM = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0e-05, "eps": 1.0e-07, "weight_decay": 1.0e-05}}
COSINE = {
    "class_path": "torch.optim.lr_scheduler.CosineAnnealingWarmRestarts",
    "init_args": {"T_0": 1, "T_mult": 2, "eta_min": 0},
}
STEP = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1, "gamma": 0.7}}
LINEAR = {"class_path": "torch.optim.lr_scheduler.LinearLR", "init_args": {"start_factor": 0.5, "total_iters": 4}}
SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 2.0e-03, "momentum": 0.9, "weight_decay": 2.0e-06}}
PHASES: dict[int, dict[str, Any]] = {
    0: {"params": ["model.classifier.bias", "model.classifier.weight", "model.pooler.dense.*"]},
    1: {"params": [r"model.deberta.encoder.layer.(6|7|8|9|10|11)\.(output|attention|intermediate).*"]},
    2: {
        "params": [
            r"model.deberta.encoder.layer.[0-5]\.(output|attention|intermediate).*",
            "model.deberta.encoder.LayerNorm.bias",
            "model.deberta.encoder.LayerNorm.weight",
            "model.deberta.encoder.rel_embeddings.weight",
            "model.deberta.embeddings.*",
        ],
    },
}


def with_keys(**of_phases: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The phases with further keys, given as ``phase_1={...}``."""
    return {number: phase | of_phases.get(f"phase_{number}", {}) for number, phase in PHASES.items()}


def new_scheduler(init: dict[str, Any], **further: Any) -> dict[str, Any]:
    cfg = {"interval": "epoch", "frequency": 1, "name": "Explicit_Reinit_LR_Scheduler"}
    return {"new_lr_scheduler": {"lr_scheduler_init": init, "pl_lrs_cfg": cfg, **further}}


def of_users(tag: str, scheduler: dict[str, Any], no_decay: list[str] | None = None, **trainer: Any) -> dict[str, Any]:
    """A configuration that writes out what others inherit: optimizer, LR scheduler, data, and all four callbacks."""
    model = {
        "experiment_tag": tag,
        "task_name": "rte",
        "optimizer_init": ADAM,
        "lr_scheduler_init": COSINE,
        "pl_lrs_cfg": {"interval": "epoch", "frequency": 1, "name": "CosineAnnealingWarmRestarts"},
        **({"no_decay": no_decay} if no_decay else {}),
    }
    stopping = {"monitor": "val_loss", "min_delta": 0.001, "patience": 2, "verbose": False, "mode": "min"}
    callbacks = {
        "finetuning_scheduler.FinetuningScheduler": {"logging_level": 20} | scheduler,
        "finetuning_scheduler.FTSCheckpoint": {
            "dirpath": None,
            "save_top_k": 1,
            "monitor": "val_loss",
            "verbose": True,
        },
        "finetuning_scheduler.FTSEarlyStopping": stopping,
        "lightning.pytorch.callbacks.LearningRateMonitor": {"logging_interval": "epoch"},
    }
    data = {"task_name": "rte", "max_seq_length": 128, "train_batch_size": 16, "num_workers": 0}
    return {
        "seed_everything": 42,
        "model": {"class_path": "fts_examples.fts_superglue.RteBoolqModule", "init_args": model},
        "data": {"class_path": "fts_examples.fts_superglue.RteBoolqDataModule", "init_args": data},
        "trainer": {
            "max_epochs": 60,
            "callbacks": [{"class_path": path, "init_args": arguments} for path, arguments in callbacks.items()],
            **trainer,
        },
    }


IMPLICIT = {"reinit_optim_cfg": {"optimizer_init": SGD}, "reinit_lr_cfg": new_scheduler(STEP)["new_lr_scheduler"]}
DDP = {"strategy": {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {"static_graph": False}}}
FSDP = {
    "strategy": {
        "class_path": "lightning.pytorch.strategies.FSDPStrategy",
        "init_args": {"cpu_offload": False, "state_dict_type": "sharded"},
        "dict_kwargs": {"use_orig_params": False},
    }
}
UNITS = ["model.classifier", "model.pooler", r"model.deberta.encoder.layer.\d+"]
# Each with the schedule that its file of phases has, if it has one.
USERS: dict[str, tuple[dict[str, Any], dict[int, dict[str, Any]] | None]] = {
    "explicit": (of_users("explicit", {"max_depth": 2}, **DDP), PHASES),
    "explicit, not to the end": (of_users("explicit_depth", {"max_depth": 1}), PHASES),
    "re-initialised LR scheduler": (
        of_users("reinit_lr", {}),
        with_keys(
            phase_1=new_scheduler(STEP, init_pg_lrs=[2.0e-06]),
            phase_2={"lr": 1.0e-06, **new_scheduler(LINEAR, init_pg_lrs=[1.0e-06, 2.0e-06])},
        ),
    ),
    "re-initialised LR scheduler, no_decay": (
        of_users("reinit_lr_no_decay", {}, ["bias", "LayerNorm.weight"]),
        with_keys(
            phase_1=new_scheduler(STEP, init_pg_lrs=[2.0e-06, 3.0e-06]),
            phase_2=new_scheduler(LINEAR, init_pg_lrs=[1.0e-06, 2.0e-06, 3.0e-06, 4.0e-06]),
        ),
    ),
    "re-initialised optimizer and LR scheduler": (
        of_users("reinit_optim_lr", {}, **DDP),
        with_keys(
            phase_1={"new_optimizer": {"optimizer_init": SGD}, **new_scheduler(STEP)},
            phase_2=new_scheduler(LINEAR, use_current_optimizer_pg_lrs=True),
        ),
    ),
    "implicit": (of_users("implicit", IMPLICIT), None),
    "awp_overrides": (of_users("awp_overrides", {"strategy_adapter_cfg": {"awp_overrides": UNITS}}, **FSDP), PHASES),
}

# The learning rates of all groups at the first step of each phase, where they do not follow from those before.
LEARNING_RATES: dict[str, dict[int, list[float]]] = {
    "advanced/reinit_lr/fts_explicit_reinit_lr.yaml": {1: [2e-6, 1e-5], 2: [1e-6, 2e-6, 2e-6]},
    "advanced/reinit_lr/fts_implicit_reinit_lr.yaml": {1: [1e-5] * 2, 2: [1e-5] * 3, 3: [1e-5] * 4},
    "advanced/reinit_optim_lr/fts_explicit_reinit_optim_lr.yaml": {1: [2e-3, 1e-5], 2: [1e-3, 2e-5, 1e-5]},
    "advanced/reinit_optim_lr/fts_implicit_reinit_optim_lr.yaml": {1: [2e-3, 1e-5], 2: [2e-3, 1e-5, 1e-5]},
    # A cosine that has come half way from 1e-5 to 1e-7 first, then 0.7 of it.
    "advanced/reinit_optim_lr/fts_implicit_reinit_optim_lr_use_curr.yaml": {
        1: [5.05e-6, 1e-5],
        2: [3.535e-6, 7e-6, 1e-5],
    },
    "re-initialised LR scheduler": {1: [2e-6, 1e-5], 2: [5e-7, 1e-6, 1e-6]},
    "re-initialised LR scheduler, no_decay": {1: [2e-6, 3e-6, 1e-5, 1e-5], 2: [5e-7, 1e-6, 1.5e-6, 2e-6, 1e-5, 1e-5]},
}
KINDS: dict[str, list[tuple[str, str]]] = {  # optimizer and LR scheduler of the first phases
    "reinit_lr/fts_explicit": [("AdamW", "CosineAnnealingWarmRestarts"), ("AdamW", "StepLR")],
    "reinit_lr/fts_implicit": [("AdamW", "CosineAnnealingWarmRestarts"), ("AdamW", "StepLR")],
    "reinit_optim_lr/": [("AdamW", "CosineAnnealingWarmRestarts"), ("SGD", "StepLR")],
}


def arguments(root: Path, configuration: Path, *, shallow: bool, fsdp: bool) -> list[str]:
    model = root / str(SHALLOW if shallow else DEEP)
    short = superglue.overrides(model, root / "SuperGLUE", root / "logs")
    return ["--config", str(configuration), *short, "--trainer.devices=2", *(ON_CPU if fsdp else [])]


def counts_of(name: str) -> list[int] | None:
    """How many parameter tensors train in each phase; unknown where FSDP flattens them."""
    if "awp_overrides" in name:
        return None
    if "nofts" in name:
        return [WHOLE]
    if "implicit" in name:
        tensors = AROUND + HEAD + SHALLOW * BLOCK
        return [min(2 * (phase + 1), tensors) for phase in range(math.ceil(tensors / 2))]
    return EXPLICIT[:2] if name == "explicit, not to the end" else EXPLICIT


def wrong_with(name: str, one: dict[int, Phase] | str, other: dict[int, Phase] | str) -> str | None:
    """What is not as it should be with a run's phases on two ranks."""
    if isinstance(one, str) or isinstance(other, str):
        return f"raised on a rank:\n{one}\n{other}"
    if one != other or list(one) != list(range(len(one))):
        return f"other phases, or phases of the ranks differ:\n{one}\n{other}"
    # Flat tensors: of the classifier and the pooler; of six layers more; of the other six and of the rest.
    expected: dict[str, Any] = {"trained": counts_of(name) or [2, 8, 15], "lrs": LEARNING_RATES.get(name, {})}
    found: dict[str, Any] = {
        "trained": [len(phase.trained) for phase in one.values()],
        "lrs": {phase: pytest.approx(one[phase].lrs, rel=1e-9) for phase in expected["lrs"]},
    }
    for part, kinds in KINDS.items():
        if part in name:
            expected["kinds"] = kinds
            found["kinds"] = [(phase.optimizer, phase.scheduler) for phase in one.values()][: len(kinds)]
    if any(phase.batches < 2 for phase in one.values()):
        return "a phase of less than two batches"
    return None if found == expected else f"expected {expected}, got {found}"


def prepared(root: Path, names: list[str]) -> dict[str, list[str]]:
    """Write models, rows and the users' files; return the arguments of each run."""
    for layers in (SHALLOW, DEEP):
        superglue.write_model(root / str(layers), layers)
    superglue.write_rows(root / "SuperGLUE" / "RTE", RTE)
    runs = {}
    for name in names:
        path = CONFIGURATIONS / name
        if name in USERS:
            configuration, schedule = USERS[name]
            path = root / f"{configuration['model']['init_args']['experiment_tag']}.yaml"
            if schedule is not None:
                YAML(typ="safe").dump(schedule, path.with_suffix(".schedule.yaml"))
                arguments_of_scheduler = configuration["trainer"]["callbacks"][0]["init_args"]
                arguments_of_scheduler["ft_schedule"] = str(path.with_suffix(".schedule.yaml"))
            YAML(typ="safe").dump(configuration, path)
        runs[name] = arguments(root, path, shallow="implicit" in name, fsdp="fts_fsdp" in name or "awp" in name)
    return runs


GROUPS = {"shipped": SHIPPED, "of users": list(USERS)}


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("group", GROUPS)
def test_every_phase_is_trained(group: str, tmp_path: Path) -> None:
    """One pair of processes trains a group of configurations: importing takes longer than a run."""
    runs = prepared(tmp_path, GROUPS[group])
    one, other = harness.run_ranks(superglue.run_several, 2, runs, timeout=220)
    wrong = {name: problem for name in runs if (problem := wrong_with(name, one[name], other[name]))}
    assert not wrong, "\n\n".join(f"{name}: {problem}" for name, problem in wrong.items())


def test_every_advanced_configuration_is_there() -> None:
    advanced = {str(Path(name).relative_to("advanced")) for name in SHIPPED if name.startswith("advanced")}
    assert {Path(name).parent.name for name in advanced} == {"reinit_lr", "reinit_optim_lr", "fsdp"}
    assert len(advanced) == 9
