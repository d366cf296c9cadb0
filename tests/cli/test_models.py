"""MODEL: files and folders of each kind, code, and what is said of those that are broken."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from finetuning_scheduler.cli.models import ModelOutline, read_model
from finetuning_scheduler.core import generate
from tests.cli.files import bert_shapes, fts, safetensors, written

SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, num_labels=3, **SMALL))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_layer=3, n_embd=16, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config)


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=32, patch_size=8, **SMALL))


def as_folder(model: nn.Module, path: Path) -> Path:
    model.save_pretrained(path)  # type: ignore[operator]  # of transformers
    return path


def as_shards(model: nn.Module, path: Path) -> Path:
    model.save_pretrained(path, max_shard_size="20KB")  # type: ignore[operator]  # of transformers
    (path / "config.json").unlink()
    return path


def as_header(model: nn.Module, path: Path) -> Path:
    return safetensors(path.with_suffix(".safetensors"), dict(sorted(expected(model).items())))


def as_state(model: nn.Module, path: Path) -> Path:
    torch.save(model.state_dict(), path.with_suffix(".pt"))
    return path.with_suffix(".pt")


def as_old_state(model: nn.Module, path: Path) -> Path:
    torch.save(model.state_dict(), path.with_suffix(".pth"), _use_new_zipfile_serialization=False)
    return path.with_suffix(".pth")


def as_lightning(model: nn.Module, path: Path) -> Path:
    content = {"state_dict": model.state_dict(), "epoch": 3, "hyper_parameters": {"width": 16}, "loops": Path("x")}
    torch.save(content, path.with_suffix(".ckpt"))
    return path.with_suffix(".ckpt")


def expected(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def found(outline: ModelOutline) -> dict[str, tuple[int, ...]]:
    return {name: facts.shape for name, facts in outline.parameters.items()}


UNORDERED = (as_header, as_shards)


@pytest.mark.parametrize(
    ("make", "save"),
    [
        *((make, save) for make in (bert, gpt2, vit) for save in (as_folder, as_header, as_state, as_lightning)),
        *((make, as_shards) for make in (bert, gpt2)),  # transformers renames what it saves of a ViT
    ],
)
def test_each_kind_of_file_has_the_parameters_of_the_model(
    make: Callable[[], nn.Module], save: Callable[[nn.Module, Path], Path], here: Path
) -> None:
    model = make()
    outline = read_model(str(save(model, here / "saved")))
    assert found(outline) == expected(model)
    if save not in UNORDERED:
        assert list(outline.parameters) == list(expected(model))
        tied = len(list(model.named_parameters(remove_duplicate=False))) - len(outline.parameters)
        assert len(outline.tied) == tied
    assert outline.module is None or {tensor.device.type for tensor in outline.module.parameters()} == {"meta"}


def test_a_file_of_the_format_before_zip_archives_is_read(here: Path) -> None:
    model = vit()
    assert found(read_model(str(as_old_state(model, here / "old")))) == expected(model)


@pytest.mark.parametrize("make", [bert, gpt2, vit])
def test_the_order_is_guessed_such_that_blocks_come_as_in_the_model(make: Callable[[], nn.Module], here: Path) -> None:
    model = make()
    outline = read_model(str(as_header(model, here / "saved")))
    by_names = [{*phase.params} for phase in generate(outline.structure, "blocks").phases]
    assert by_names == [{*phase.params} for phase in generate(model, "blocks").phases]


def test_a_file_beside_a_configuration_says_that_names_can_differ(here: Path) -> None:
    folder = as_folder(vit(), here / "saved")
    by_file, by_folder = read_model(str(folder / "model.safetensors")), read_model(str(folder))
    assert found(by_folder) == expected(vit())
    assert found(by_file) != found(by_folder)
    assert "the folder as MODEL tells" in by_file.notes[-1]
    assert by_folder.notes == ()


def test_a_folder_without_a_known_configuration_gives_the_names_of_its_files(here: Path) -> None:
    folder = as_folder(bert(), here / "saved")
    written(folder / "config.json", '{"model_type": "of-tomorrow"}')
    outline = read_model(str(folder))
    assert found(outline) == expected(bert())
    assert "does not know it" in outline.notes[-1]


SHOP = """
import torch
from torch import nn

print("imported")


class Net(nn.Module):
    def __init__(self, width: int, depth: int = 2, sizes: tuple = ()) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])
        self.extra = nn.ModuleList([nn.Linear(1, size) for size in sizes])


class Looks(Net):
    def __init__(self) -> None:
        super().__init__(2)
        self.rates = [rate.item() for rate in torch.linspace(0, 1, 2)]


def broken():
    raise RuntimeError("no weights\\nhere")


def leaves():
    raise SystemExit(3)


def number():
    return 3


value = 3
"""


@pytest.fixture
def shop(here: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the folder, under a name that no other test has imported."""
    name = f"shop_{abs(hash(request.node.nodeid))}"
    written(here / f"{name}.py", SHOP)
    monkeypatch.syspath_prepend(here)
    return name


def test_a_class_is_made_without_weights_with_the_arguments_that_are_given(shop: str) -> None:
    answer = fts("params", f"{shop}:Net", "--init", "width=4", "--init", "sizes=[2, 3]", "--json")
    content = json.loads(answer.out)
    assert content["model"]["parameters"] == 2 * 20 + 2 * 2 + 2 * 3
    assert "imported" in answer.err


def test_a_class_that_looks_at_values_is_made_with_them(shop: str) -> None:
    outline = read_model(f"{shop}:Looks")
    assert outline.total == 12


@pytest.mark.parametrize(
    ("what", "init", "said"),
    [
        ("Net", [], "expected a value for 'width', got none Fix: Add --init width=VALUE"),
        ("Net", ["width=4", "dept=3"], "got 'dept' Fix: Did you mean `depth`?"),
        ("Net", ["width"], "expected --init key=value, got 'width'"),
        ("Net", ["width=[1"], "expected a value of YAML after width=, got '[1'"),
        ("Net", ["width=wide"], "expected a model, got an error: TypeError"),
        ("Nett", [], "got 'Nett', which it does not have Fix: Did you mean `Net`?"),
        ("broken", [], "expected a model, got an error: RuntimeError: no weights here"),
        ("leaves", [], "expected a model, got an error: SystemExit: 3"),
        ("number", [], "expected a torch.nn.Module, got int"),
        ("value", [], "expected a class or function that makes a model, got int"),
    ],
)
def test_code_that_makes_no_model_is_said_in_short(shop: str, what: str, init: list[str], said: str) -> None:
    answer = fts("params", f"{shop}:{what}", *(part for pair in init for part in ("--init", pair)))
    assert (answer.status, answer.out) == (2, "")
    assert said in " ".join(answer.err.split())
    assert "Traceback" not in answer.err


def test_a_module_that_fails_or_is_missing_is_said_in_short(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(here)
    written(here / "fails_on_import.py", "import not_there_at_all\n")
    assert "ModuleNotFoundError: No module named 'not_there_at_all'" in " ".join(
        fts("params", "fails_on_import:Net").err.split()
    )
    assert "expected a module that can be imported, got 'nowhere.at_all'" in " ".join(
        fts("params", "nowhere.at_all:Net").err.split()
    )


def cut_off(path: Path) -> None:
    path.write_bytes(safetensors(path, bert_shapes()).read_bytes()[:60])


def empty_zip(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04 and no archive")


def only_numbers(path: Path) -> None:
    torch.save({"epoch": 3}, path)


def index_without_shards(path: Path) -> None:
    path.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}), encoding="utf-8")


BROKEN: list[tuple[str, Callable[[Path], object], str]] = [
    ("none.safetensors", lambda path: None, "but there is none of that name"),
    ("cut.safetensors", cut_off, "the file is cut off"),
    ("tiny.safetensors", lambda path: path.write_bytes(b"abc"), "got a file of 3 bytes"),
    ("huge.safetensors", lambda path: path.write_bytes(struct.pack("<Q", 2**60) + b"{}"), "bytes of it"),
    ("text.safetensors", lambda path: path.write_bytes(struct.pack("<Q", 4) + b"{{{{"), "something that is no JSON"),
    ("list.safetensors", lambda path: path.write_bytes(struct.pack("<Q", 4) + b"[  ]"), "JSON that is no object"),
    (
        "odd.safetensors",
        lambda path: path.write_bytes(struct.pack("<Q", 10) + b'{"a": {}} '),
        "a tensor without type or shape",
    ),
    ("none_inside.safetensors", lambda path: safetensors(path, {}), "got one without parameters"),
    (
        "pointer.safetensors",
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
        "got a pointer of Git LFS",
    ),
    ("bad.pt", empty_zip, "but it cannot be read"),
    ("numbers.ckpt", only_numbers, "got a file without tensors by name"),
    ("notes.txt", lambda path: path.write_text("hello"), "got something else"),
    ("model.safetensors.index.json", index_without_shards, "these are not there: model-00001-of-00002.safetensors"),
    ("other.index.json", lambda path: path.write_text("[]"), "got an index without a `weight_map`"),
    ("folder", lambda path: path.mkdir(), "got a folder without any"),
]


@pytest.mark.parametrize(("name", "make", "said"), BROKEN, ids=[row[0] for row in BROKEN])
def test_a_broken_file_is_said_in_short(here: Path, name: str, make: Callable[[Path], object], said: str) -> None:
    make(here / name)
    answer = fts("params", name)
    assert (answer.status, answer.out) == (2, "")
    text = " ".join(answer.err.split())
    assert text.startswith(f"error: {name}: expected ")
    assert said in text
    assert " Fix: " in text
    assert fts("params", name, "--json").json()["problems"]


def test_a_checkpoint_runs_nothing(here: Path) -> None:
    class Opens:
        def __reduce__(self) -> tuple[object, ...]:
            return open, (str(here / "made"), "w")

    torch.save({"state_dict": {"weight": torch.ones(2)}, "extra": Opens()}, here / "bad.ckpt")
    assert fts("params", "bad.ckpt").status == 0
    assert not (here / "made").exists()


def test_a_folder_with_several_checkpoints_asks_for_one(here: Path) -> None:
    for name in ("a.ckpt", "b.ckpt"):
        torch.save({"weight": torch.ones(2)}, here / name)
    assert "name one of them" in " ".join(fts("params", ".").err.lower().split())


def test_a_name_that_is_nearly_right_is_told(bert_file: str) -> None:
    assert "Did you mean `bert.safetensors`?" in fts("params", "bert.safetensor").err


@pytest.fixture
def bert_file(here: Path) -> str:
    return safetensors(here / "bert.safetensors", bert_shapes()).name
