"""The model-parallel example: its commands as the page has them, and its runs beside those of one device."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from ruamel.yaml import YAML
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import finetuning_scheduler
from fts_examples.model_parallel.decoder import DecoderConfig
from fts_examples.model_parallel.mp_examples import CountingSequences, DecoderModule, ModelParallelCLI, main
from tests.reference import cases, harness

SOURCES = Path(finetuning_scheduler.__file__).parents[1]
EXAMPLE = SOURCES / "fts_examples" / "model_parallel"
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "examples" / "model_parallel.md"
COMMANDS = re.findall(r"^python (mp_examples.py .*)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
CONFIGS = sorted(path.stem for path in (EXAMPLE / "config").glob("*.yaml"))
TWO_BATCHES = ["--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"]

pytestmark = pytest.mark.distributed

yaml = YAML(typ="safe")
yaml.sort_base_mapping_type_on_output = False  # the order of a plan counts


# --- commands --------------------------------------------------------------------------------------------------------


def run_command(command: str, root: Path, *more: str) -> tuple[int, str]:
    """Run a command of the page as a user does; return its exit status and all that its processes print.

    Fails if a process outlives a command that succeeds, or ends long after one that fails.
    """
    paths = [str(SOURCES), str(ROOT), os.environ.get("PYTHONPATH")]
    process = subprocess.Popen(
        [sys.executable, *command.split(), *more, "--trainer.default_root_dir", str(root)],
        cwd=EXAMPLE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=280)
        status = process.returncode
        wait_for_the_others(process.pid, seconds=0 if status == 0 else 20)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return status, printed


def wait_for_the_others(group: int, seconds: float) -> None:
    """Fail if processes of a group live longer than so many seconds."""
    deadline = time.monotonic() + seconds
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.killpg(group, 0)
            assert time.monotonic() < deadline, "a process is left"
            time.sleep(0.1)


def test_the_page_has_a_command_for_each_configuration() -> None:
    assert CONFIGS == ["fts_fsdp_auto_plan", "fts_fsdp_profiling", "fts_tp_plan"]
    assert sorted(Path(command.split()[3]).stem for command in COMMANDS) == CONFIGS


def test_the_plan_on_the_page_is_the_one_of_the_configuration() -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    shown = yaml.load(block)["strategy_adapter_cfg"]
    for name in ("fts_fsdp_auto_plan", "fts_fsdp_profiling"):
        (scheduler, *_) = yaml.load(EXAMPLE / "config" / f"{name}.yaml")["trainer"]["callbacks"]
        assert list(scheduler["init_args"]["strategy_adapter_cfg"]["fsdp_plan"].items()) == list(
            shown["fsdp_plan"].items()
        )
        assert scheduler["init_args"]["strategy_adapter_cfg"] == shown


def test_the_names_on_the_page_are_those_of_the_model() -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    exec(block, names)  # the page is ours
    assert len(names["layer"]) > 3


@pytest.mark.slow
@pytest.mark.timeout(320)
@pytest.mark.parametrize("command", COMMANDS, ids=[Path(command.split()[3]).stem for command in COMMANDS])
def test_a_command_goes_through_all_phases_and_ends(command: str, tmp_path: Path) -> None:
    status, printed = run_command(command, tmp_path, *TWO_BATCHES)
    assert status == 0, printed
    assert re.findall(r"^Phase (\d) -> (\d) ", printed, flags=re.MULTILINE) == [("0", "1"), ("1", "2"), ("2", "3")]
    written = {path.name for path in (tmp_path / "lightning_logs" / "version_0").iterdir()}
    reports = {f"memory_fit_rank_{rank}{end}" for rank in (0, 1) for end in (".yaml", "_fsdp.txt")}
    expected = {"DecoderModule_ft_schedule.yaml", "checkpoints", "config.yaml", "fts_history.json", "metrics.csv"}
    assert written == expected | (reports if "profiling" in command else set())
    if "fsdp" in command:  # the page shows the lines of a run with more batches
        assert transitions_in(printed) == transitions_in(PAGE.read_text(encoding="utf-8"))
    if "profiling" in command:
        report = tmp_path / "lightning_logs" / "version_0" / "memory_fit_rank_0.yaml"
        for row in table_of(yaml.load(report)["snapshots"]):
            assert row in PAGE.read_text(encoding="utf-8")


def transitions_in(text: str) -> list[str]:
    """The lines of transitions, without their steps."""
    return [re.sub(r"step \d+", "step", line) for line in re.findall(r"^Phase \d -> .*", text, flags=re.MULTILINE)]


def table_of(snapshots: dict[str, Any]) -> list[str]:
    """The page's row of each phase, of the first step that is measured."""
    ends = [key for key in snapshots if key.endswith("iter_1.training_step.batch_end")]
    assert len(ends) == 4
    rows = []
    for phase, key in enumerate(ends):
        saved, tracked = snapshots[key]["saved_for_backward_bytes"], snapshots[key]["fsdp"]
        sizes = (saved, tracked["now_bytes"]["cpu"]["OptState"], tracked["peak_bytes"]["cpu"]["Total"])
        rows.append(f"| {phase} | {' | '.join(f'{size / 1024:.1f} KiB' for size in sizes)} |")
    return rows


@pytest.mark.slow
@pytest.mark.timeout(320)
def test_a_rank_that_fails_ends_the_run(tmp_path: Path) -> None:
    failing = ["--trainer.callbacks+=tests.examples.failing_rank.FailsOnOneRank", "--trainer.callbacks.rank=1"]
    status, printed = run_command(COMMANDS[0], tmp_path, *failing)
    assert status != 0
    assert "RuntimeError: this rank ends here" in printed


# --- equal to one device ---------------------------------------------------------------------------------------------


class SameOrder(CountingSequences):
    """The rows in the order in which Lightning shares them out among ranks."""

    def _loader(self, tokens: Tensor, *, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
        data = TensorDataset(tokens[:, :-1], tokens[:, 1:])
        sampler = DistributedSampler(data, num_replicas=1, rank=0, shuffle=shuffle, seed=42)
        return DataLoader(data, self.batch_size, sampler=sampler)


Change = Callable[[dict[str, Any]], None]


def config_file(root: Path, name: str, *changes: Change) -> Path:
    """Write one of the example's configurations with some changes."""
    content: dict[str, Any] = yaml.load(EXAMPLE / "config" / f"{name}.yaml")
    content["trainer"] |= {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    for change in changes:
        change(content)
    path = root / f"{name}-{len(list(root.iterdir()))}.yaml"
    yaml.dump(content, path)
    return path


def scheduler_arguments(content: dict[str, Any]) -> dict[str, Any]:
    arguments: dict[str, Any] = content["trainer"]["callbacks"][0]["init_args"]
    return arguments


def shorter(content: dict[str, Any]) -> None:
    """Train for four epochs, one a phase, on a few rows."""
    content["data"] = {"batch_size": 8, "train_rows": 64, "validation_rows": 32}
    content["trainer"]["max_epochs"] = 4
    for phase in (0, 1, 2):
        scheduler_arguments(content)["ft_schedule"][phase]["max_transition_epoch"] = phase + 1


def one_device(content: dict[str, Any], ranks_combined: int) -> None:
    """Train on one device, with the batches of several ranks combined."""
    content["trainer"] |= {"devices": 1, "strategy": "auto"}
    content["data"]["batch_size"] *= ranks_combined
    scheduler_arguments(content).pop("strategy_adapter_cfg", None)


def train(config: Path, data: type[CountingSequences] = CountingSequences) -> tuple[int, set[str], dict[str, Tensor]]:
    """Train; return the last phase, the names of tensors that are spread over the ranks, and all weights."""
    words = ["fit", "--config", str(config), "--trainer.default_root_dir", str(config.parent)]
    cli = ModelParallelCLI(DecoderModule, data, args=words, save_config_callback=None)
    spread = {name for name, parameter in cli.model.named_parameters() if isinstance(parameter, DTensor)}
    return cli.trainer.callbacks[0].curr_depth, spread, cases.whole_weights(cli.trainer.strategy.model)


def train_in_float64(config: Path, data: type[CountingSequences]) -> tuple[int, set[str], dict[str, Tensor]]:
    """The same in double precision: of gradients near zero AdamW makes steps that hang on float32's rounding."""
    torch.set_default_dtype(torch.float64)  # the process is the rank's own
    return train(config, data)


def tensor_plan(content: dict[str, Any]) -> None:
    content["model"]["tp_plan"] = "tensor"


EVERYTHING = {name for name, _ in DecoderModule(DecoderConfig()).named_parameters()}
MATRICES = {name for name in EVERYTHING if "norm" not in name and "embeddings" not in name}
# The configuration, its changes, the ranks that have rows of their own, and what is spread over the ranks.
RUNS: dict[str, tuple[str, list[Change], int, set[str]]] = {
    "fsdp2": ("fts_fsdp_auto_plan", [], 2, EVERYTHING),
    "sequence parallel": ("fts_tp_plan", [], 1, EVERYTHING),
    "tensor parallel": ("fts_tp_plan", [tensor_plan], 1, MATRICES),
}


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_train_what_one_device_does(name: str, tmp_path: Path) -> None:
    config, changes, ranks, spread = RUNS[name]
    alone = config_file(tmp_path, config, shorter, partial(one_device, ranks_combined=ranks))
    ((phase, nothing, expected),) = harness.run_ranks(train_in_float64, 1, alone, SameOrder, timeout=100)
    assert (phase, nothing) == (3, set())
    data = SameOrder if ranks == 1 else CountingSequences
    together = config_file(tmp_path, config, shorter, *changes)
    for phase, names, weights in harness.run_ranks(train_in_float64, 2, together, data, timeout=100):
        assert (phase, names) == (3, spread)
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-8)


# --- configurations as users have them -------------------------------------------------------------------------------

OUTPUT, NORM = {"model.output.weight"}, {"model.norm.weight"}
LAST_LAYERS = {name for name in EVERYTHING if name.startswith(("model.layers.2.", "model.layers.3."))}
FFN_NORMS = {f"model.layers.{layer}.ffn_norm.weight" for layer in range(4)}


def offloaded_units(content: dict[str, Any]) -> None:
    """Names in full and patterns, checkpointed activations and parameters kept on the CPU."""
    scheduler_arguments(content)["ft_schedule"] = {
        "0": {"params": ["model.output.weight"], "max_transition_epoch": 1},
        "1": {"params": [r"model.layers.[23].*"], "max_transition_epoch": 2, "lr": "1e-03"},
    }
    scheduler_arguments(content)["strategy_adapter_cfg"] = {
        "fsdp_default_kwargs": {"cpu_offload_policy": {"pin_memory": False}},
        "fsdp_plan": {
            r"model.layers.\d+": {"act_ckpt": "wrapped"},
            "model.(tok_embeddings|norm|output)": {"reshard_after_forward": True},
        },
    }


def generated_schedule(content: dict[str, Any]) -> None:
    """Two parameters a phase, from the last on."""
    arguments = scheduler_arguments(content)
    del arguments["ft_schedule"]
    arguments |= {"max_depth": 1, "base_max_lr": 1e-3, "epoch_transitions_only": False}
    content["trainer"]["callbacks"][1]["init_args"] |= {"patience": 1, "min_delta": 100.0}


def another_optimizer(content: dict[str, Any]) -> None:
    """Both re-initialised at a transition."""
    scheduler_arguments(content)["ft_schedule"] = {
        0: {"params": ["model.output.*"], "max_transition_epoch": 1},
        1: {
            "params": ["model.norm.weight", r"model.layers.\d+.ffn_norm.*"],
            "max_transition_epoch": 2,
            "lr": 1e-2,
            "new_optimizer": {"optimizer_init": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}},
            "new_lr_scheduler": {
                "lr_scheduler_init": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1}},
                "pl_lrs_cfg": {"interval": "epoch", "frequency": 1},
                "init_pg_lrs": [0.05],
            },
        },
    }


def two_dimensions(content: dict[str, Any]) -> None:
    """Tensor parallel by the module, sharded over the other dimension by a plan."""
    content["trainer"]["devices"] = 4
    content["trainer"]["strategy"]["init_args"] = {"data_parallel_size": 2, "tensor_parallel_size": 2}
    scheduler_arguments(content)["ft_schedule"] = {
        0: {"params": ["model.output.*", "model.norm.*"], "max_transition_epoch": 1},
        1: {"params": ["*"], "lr": 1e-3, "max_transition_epoch": 2},
    }
    scheduler_arguments(content)["strategy_adapter_cfg"] = {"fsdp_plan": {r"model.layers.\d+": None, "model": None}}


# The configuration, its changes, the number of ranks, and what the last phase has trained.
SHAPES: dict[str, tuple[str, Change, int, set[str]]] = {
    "off-loaded units": ("fts_fsdp_auto_plan", offloaded_units, 2, OUTPUT | LAST_LAYERS),
    "generated schedule": (
        "fts_tp_plan",
        generated_schedule,
        2,
        OUTPUT | NORM | {"model.layers.3.feed_forward.w3.weight", "model.layers.3.feed_forward.w2.weight"},
    ),
    "another optimizer": ("fts_tp_plan", another_optimizer, 2, OUTPUT | NORM | FFN_NORMS),
    "two dimensions": ("fts_tp_plan", two_dimensions, 4, EVERYTHING),
}


def two_batches(content: dict[str, Any]) -> None:
    content["trainer"] |= {"limit_train_batches": 2, "limit_val_batches": 1}
    content["data"] = {"batch_size": 4}


@pytest.mark.parametrize("name", SHAPES)
def test_configurations_as_users_have_them_run_as_they_are(name: str, tmp_path: Path) -> None:
    config, change, ranks, trained = SHAPES[name]
    seed_everything(42, verbose=False)
    before = DecoderModule(DecoderConfig()).state_dict()
    for phase, _, weights in harness.run_ranks(train, ranks, config_file(tmp_path, config, two_batches, change)):
        assert phase == 1
        assert {name for name, weight in weights.items() if not torch.equal(weight, before[name])} == trained


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(words: list[str]) -> tuple[Any, str]:
    """Run a command that is refused; return its exit status and its last words."""
    sys.argv = ["mp_examples.py"]  # or Lightning warns that the test's own words are left out
    with redirect_stderr(StringIO()) as said, pytest.raises(SystemExit) as end:
        main(words)
    return end.value.code, said.getvalue().splitlines()[-1]


@pytest.fixture
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's own use of jsonargparse
    monkeypatch.setattr(sys, "argv", [])  # `refused` changes it
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        (
            "fts_tp_plan",
            ["--trainer.accelerator", "gpu"],
            "expected 2 GPUs for trainer.accelerator=gpu, got 0. Fix: Use --trainer.accelerator cpu, or fewer devices.",
        ),
        (
            "fts_fsdp_auto_plan",
            ["--trainer.devices", "3"],
            "expected data_parallel_size=2 times tensor_parallel_size=1 to be the number of ranks, got 3. Fix: Change "
            "trainer.devices, or a size, as --trainer.strategy.init_args.data_parallel_size.",
        ),
        (
            "fts_tp_plan",
            ["--model.decoder.n_kv_heads", "3"],
            "expected n_kv_heads to divide n_heads=4, got n_kv_heads=3. Fix: Set n_kv_heads to a divisor of 4.",
        ),
    ],
)
def test_what_cannot_run_is_refused_before_ranks_start(name: str, words: list[str], message: str) -> None:
    assert refused(["fit", "--config", str(EXAMPLE / "config" / f"{name}.yaml"), *words]) == (2, f"error: {message}")


@pytest.mark.usefixtures("_quiet")
def test_fewer_gpus_than_devices_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    status, said = refused(["fit", "--config", str(EXAMPLE / "config" / "fts_tp_plan.yaml")])
    assert status == 2
    assert said == (
        "error: expected 2 GPUs for trainer.accelerator=auto, got 1. Fix: Use --trainer.accelerator cpu, or fewer "
        "devices."
    )


def three_devices(content: dict[str, Any]) -> None:
    content["trainer"]["devices"] = 3


def no_plan(content: dict[str, Any]) -> None:
    content["model"] = {}


def wrong_name(content: dict[str, Any]) -> None:
    plan = scheduler_arguments(content)["strategy_adapter_cfg"]["fsdp_plan"]
    scheduler_arguments(content)["strategy_adapter_cfg"]["fsdp_plan"] = {r"model.blocks.\d+": None} | plan


@pytest.mark.parametrize(
    ("name", "change", "ranks", "message"),
    [
        (
            "fts_tp_plan",
            three_devices,
            3,
            "expected sizes that 3 tensor-parallel ranks can share equally, got n_heads=4, n_kv_heads=2, "
            "hidden_dim=64, vocab_size=32. Fix: Use a tensor_parallel_size that divides 2, or change the sizes.",
        ),
        (
            "fts_tp_plan",
            no_plan,
            2,
            "expected a tp_plan, since the strategy has tensor_parallel_size=2, got none. Fix: Set model.tp_plan to "
            "'tensor' or 'sequence', or tensor_parallel_size to 1.",
        ),
        (
            "fts_fsdp_auto_plan",
            wrong_name,
            2,
            r"selector 'model.blocks.\d+': expected `fsdp_plan` to match a module, got no match. Fix: ",
        ),
    ],
)
def test_what_cannot_run_is_refused_before_the_first_batch(
    name: str, change: Change, ranks: int, message: str, tmp_path: Path
) -> None:
    config = config_file(tmp_path, name, change)
    words = ["fit", "--config", str(config), "--trainer.default_root_dir", str(tmp_path)]
    for status, said in harness.run_ranks(refused, ranks, words):
        assert status == 2
        assert said.startswith(f"error: {message}")
