import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast
from typer.testing import CliRunner, Result

from fts_examples._text_data import DataError, TextData, read_rows
from fts_examples.text_classification import app
from tests.examples.study_pages import arguments_of

WORDS = ("a", "dull", "fine", "film", "long", "story")
ROWS = [{"sentence": f"a {word} film", "label": label} for word in ("dull", "fine") for label in (0, 1)]
PAIRS = [{"premise": "a fine film", "hypothesis": f"a {word} story", "label": word} for word in ("dull", "long")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT with as many layers as MiniLM, and a tokenizer of a few words."""
    folder = tmp_path_factory.mktemp("model")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizerFast(vocab={word: index for index, word in enumerate(vocabulary)}).save_pretrained(folder)
    config = BertConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=8,
        num_hidden_layers=6,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=32,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """A writer of data folders: the same lines for training and validation, unless told otherwise."""

    def write_lines(train: list[object], validation: list[object] | None = None) -> Path:
        for part, rows in (("train", train), ("validation", train if validation is None else validation)):
            lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
            (tmp_path / f"{part}.jsonl").write_text("\n".join(lines))
        return tmp_path

    return write_lines


def run(data: Path, model: Path, *arguments: str) -> Result:
    options = ["--data", str(data), "--model", str(model), "--accelerator", "cpu", "--max-length", "16"]
    return CliRunner().invoke(app, [*options, *arguments], env={"COLUMNS": "120"})


def test_all_ways_are_compared(model: Path, write: Callable[..., Path]) -> None:
    result = run(write(ROWS), model, "--max-epochs", "3", "--batch-size", "2")
    assert result.exit_code == 0, result.output
    for way in ("no schedule", "generated schedule", "explicit schedule"):
        assert re.search(rf"{way} +│ +\d+\.\d% +│ +[123] +│", result.output), result.output
    assert re.search(r"explicit schedule +│ 1 +│ [12] to 2 ", result.output), result.output


def test_the_command_of_the_study_runs(model: Path, write: Callable[..., Path]) -> None:
    folder = str(write(ROWS))
    arguments = [
        folder if word == "DIR" else word for word in arguments_of("sst2.md", "fts_examples.text_classification")
    ]
    result = CliRunner().invoke(app, [*arguments, "--model", str(model), "--max-epochs", "1"], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    assert len(re.findall("schedule +│", result.output)) == 6  # three ways in two tables


def test_pairs_of_texts_with_named_labels_are_read(model: Path, write: Callable[..., Path]) -> None:
    result = run(write(PAIRS), model, "--way", "none", "--max-epochs", "1")
    assert result.exit_code == 0, result.output
    assert "Fine-tuned on 2 rows, 2 rows for validation" in result.output


def test_only_the_first_rows_are_used_where_asked(model: Path, write: Callable[..., Path]) -> None:
    data = write([*ROWS, "not JSON"])
    result = run(data, model, "--way", "none", "--max-epochs", "1", "--train-rows", "3", "--validation-rows", "2")
    assert "Fine-tuned on 3 rows, 2 rows for validation" in result.output, result.output


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "expected a JSON object, got invalid JSON: "),
        ("[1]", "expected a JSON object, got list"),
        (
            {"text": "a film", "label": 1},
            "expected the keys 'label' and 'sentence', or 'label', 'premise' and 'hypothesis'; got 'text', 'label'",
        ),
        ({"sentence": 3, "label": 1}, "expected 'sentence' to be a string, got 3"),
        ({"sentence": "a film", "label": 0.5}, "expected 'label' to be a string or an integer, got 0.5"),
    ],
)
def test_a_bad_line_is_named(line: object, message: str, model: Path, write: Callable[..., Path]) -> None:
    data = write([ROWS[0], "", line])
    result = run(data, model)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {data / 'train.jsonl'}:3: {message}")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_a_label_that_only_validation_has_is_named(model: Path, write: Callable[..., Path]) -> None:
    data = write(ROWS, [*ROWS, {"sentence": "a film", "label": 7}])
    result = run(data, model)
    assert result.exit_code == 2
    assert result.stderr == f"error: {data / 'validation.jsonl'}:5: expected a label of the training rows, got 7\n"


def test_a_single_label_is_refused(model: Path, write: Callable[..., Path]) -> None:
    data = write(ROWS)
    result = run(data, model, "--train-rows", "1", "--validation-rows", "1")
    assert result.exit_code == 2
    path = data / "train.jsonl"
    assert result.stderr == f"error: {path}: expected training rows of at least two labels, got 0 only\n"


def test_a_missing_file_is_named(tmp_path: Path, model: Path) -> None:
    result = run(tmp_path, model)
    assert result.exit_code == 2
    path = tmp_path / "train.jsonl"
    assert result.stderr == f"error: {path}: expected a readable UTF-8 file, got: No such file or directory\n"


def test_a_missing_model_is_named(tmp_path: Path, write: Callable[..., Path]) -> None:
    result = run(write(ROWS), tmp_path / "nowhere")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {tmp_path / 'nowhere'}: expected a folder or hub id of a transformer, got")


def test_a_schedule_that_does_not_fit_is_named(tmp_path: Path, model: Path, write: Callable[..., Path]) -> None:
    schedule = tmp_path / "schedule.yaml"
    schedule.write_text("0:\n  params:\n  - model.clasifier.*\n")
    result = run(write(ROWS), model, "--way", "explicit", "--schedule", str(schedule))
    assert result.exit_code == 2
    assert f"{schedule}:3" in result.stderr
    assert "model.clasifier.*" in result.stderr


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.touch()
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}: expected at least one row, got none$"):
        read_rows(path)


def test_a_file_of_windows_is_read(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"sentence": "a film", "label": 1}\r\n\r\n{"sentence": "a cat", "label": 0}\r\n')
    assert [(row.texts, row.label) for row in read_rows(path)] == [(("a film",), 1), (("a cat",), 0)]


def test_a_batch_is_padded_to_its_longest_text(model: Path, write: Callable[..., Path]) -> None:
    data = TextData.from_folder(write(PAIRS), BertTokenizerFast.from_pretrained(model), max_length=16)
    tokens, labels = next(iter(data.val_dataloader()))
    assert tokens["input_ids"].shape == (2, 9)  # [CLS] three words [SEP] three words [SEP]
    assert labels.tolist() == [0, 1]
