"""Tiny models, rows and archives of the test's own: the command, its five ways, its snippets and its calibration."""

from __future__ import annotations

import io
import json
import math
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig, BertModel, BertTokenizerFast
from typer.testing import CliRunner, Result

from finetuning_scheduler.core.prepare import resolve
from fts_examples._calibration import fit_temperature, scores
from fts_examples._comparison import Settings
from fts_examples._snippets import fetch, read_snippets
from fts_examples._study_report import ACCURACIES, CALIBRATION, COMPARED, EFFORT, Run, read_csv, tables, write_csv
from fts_examples._text_data import DataError, Row, TextData
from fts_examples._text_model import TextClassifier
from fts_examples.lp_ft import MeanPooledClassifier, Rates, Way, app, by_length, run_way, schedule_of, spread_out
from tests.examples.study_pages import STUDIES, arguments_of

WORDS = ("a", "dull", "fine", "film", "long", "story")
ROWS = [{"sentence": f"a {word} film", "label": label} for word, label in (("dull", 0), ("fine", 1))] * 20
SNIPPETS = {
    "amazonReviewSnippets": b"1_1\t-2.5\ta dull story\r\n1_2\t0.9\ta long story\r\n1_3\t1\ta fine story\r\n",
    "nytEditorialSnippets": b"1_1\t-1\ta long story\r\n1_2\t1.5\ta fine film\r\n",
    "tweets": "1\t3.25\tfine \u2014 fine\r\n2\t-1.75\tdull".encode(),
    "movieReviewSnippets": b"no rows, never read",
}
RATES = Rates(head=0.01, everything=0.001, decay=0.5)
BODY = "model.body."
PARAMETERS = 2 * 8 + 2  # of the head


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of two layers and a tokenizer of a few words."""
    folder = tmp_path_factory.mktemp("model")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizerFast(vocab={word: index for index, word in enumerate(vocabulary)}).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def pack(path: Path, files: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def make_archive(folder: Path, snippets: Mapping[str, bytes] = SNIPPETS) -> Path:
    """An archive in an archive, as in the source distribution."""
    names = {f"hutto_ICWSM_2014/{name}_GroundTruth.txt": content for name, content in snippets.items()}
    inner = pack(folder / "inner.tar.gz", names).read_bytes()
    return pack(folder / "sdist.tar.gz", {"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": inner})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_rows(tmp_path, ROWS)
    return tmp_path


def write_rows(folder: Path, train: list[dict], validation: list[dict] = ROWS[:8]) -> None:
    for part, rows in (("train", train), ("validation", validation)):
        (folder / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def run(data: Path, model: Path | str, archive: Path, *arguments: str) -> Result:
    options = ["--data", str(data), "--model", str(model), "--snippets", str(archive), "--seeds", "1"]
    return CliRunner().invoke(app, [*options, *arguments], env={"COLUMNS": "120"})


# --- the five ways


def classifier(model: Path) -> TextClassifier:
    return TextClassifier(MeanPooledClassifier(str(model), 2), lr=RATES.everything, head_lr=RATES.head)


HEAD = {"model.classifier.weight", "model.classifier.bias"}


@pytest.mark.parametrize("way", [way for way in Way if way is not Way.FULL])
def test_a_schedule_trains_what_its_way_says(way: Way, model: Path) -> None:
    module = classifier(model)
    everything = {name for name, _ in module.named_parameters()}
    schedule = schedule_of(way, module, RATES)
    phases = [set(phase.params) for phase in resolve(schedule, module).schedule.phases]
    layers = [{name for name in everything if f"{BODY}encoder.layer.{number}." in name} for number in (1, 0)]
    rest = everything - HEAD - layers[0] - layers[1]
    expected = {
        Way.HEAD: [HEAD],
        Way.LP_FT: [HEAD, everything - HEAD],
        Way.GRADUAL: [HEAD, *layers, rest],
        Way.LAYER_WISE: [HEAD, everything - HEAD],
    }
    assert phases == expected[way]


def test_full_fine_tuning_has_no_schedule(model: Path) -> None:
    assert schedule_of(Way.FULL, classifier(model), RATES) is None


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[dict[float, int]]:
    """Of each optimizer step, how many values have a gradient at which learning rates."""
    taken = []

    def note(module: TextClassifier, optimizer: torch.optim.Optimizer) -> None:
        sizes: dict[float, int] = {}
        for group in optimizer.param_groups:
            rate = round(group["lr"], 9)
            count = sum(parameter.numel() for parameter in group["params"] if parameter.grad is not None)
            sizes[rate] = sizes.get(rate, 0) + count
        taken.append(sizes)

    monkeypatch.setattr(TextClassifier, "on_before_optimizer_step", note)
    return taken


def train_way(way: Way, model: Path, folder: Path, max_epochs: int) -> Run:
    """Rows held out have the other label: the better a phase learns, the sooner it stops."""
    rows = [Row((row["sentence"],), row["label"], "a row") for row in ROWS]
    held_out = [Row(row.texts, 1 - row.label, row.where) for row in rows[:4]]
    study = TextData(rows[4:], held_out, BertTokenizerFast.from_pretrained(model), batch_size=9)
    settings = Settings(max_epochs, patience=1, seed=0, output=folder)
    return run_way(way, str(model), study, {"id": rows[:4], "amazon": rows[:2]}, settings, RATES)


def sizes_of(model: Path) -> dict[str, int]:
    names = {"head": "classifier", "top": "encoder.layer.1.", "bottom": "encoder.layer.0.", "embeddings": "embeddings."}
    parameters = list(classifier(model).named_parameters())
    return {key: sum(value.numel() for name, value in parameters if part in name) for key, part in names.items()}


def test_full_fine_tuning_trains_everything_at_one_rate(
    model: Path, tmp_path: Path, steps: list[dict[float, int]]
) -> None:
    train_way(Way.FULL, model, tmp_path, 1)
    assert steps == [{0.001: sum(sizes_of(model).values())}] * 4


def test_head_only_trains_the_head_to_its_end(model: Path, tmp_path: Path, steps: list[dict[float, int]]) -> None:
    outcome = train_way(Way.HEAD, model, tmp_path, 3)
    assert steps == [{0.01: PARAMETERS}] * 4 * int(outcome.figures["epochs"])
    assert re.fullmatch(rf"phase 0: epochs 0-\d, {PARAMETERS} trainable", outcome.phases)


@pytest.mark.parametrize(("way", "in_train_mode"), [(Way.FULL, True), (Way.HEAD, False)])
def test_a_frozen_body_has_no_dropout(
    way: Way, in_train_mode: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []
    monkeypatch.setattr(
        TextClassifier, "on_before_optimizer_step", lambda module, _: modes.append(module.model.body.training)
    )
    train_way(way, model, tmp_path, 1)
    assert modes == [in_train_mode] * 4


def test_lp_ft_trains_the_head_until_it_stops_and_then_everything_at_the_lower_rate(
    model: Path, tmp_path: Path, steps: list[dict[float, int]]
) -> None:
    outcome = train_way(Way.LP_FT, model, tmp_path, 60)
    total = sum(sizes_of(model).values())
    first = steps.index({0.001: total})
    assert steps == [{0.01: PARAMETERS}] * first + [{0.001: total}] * (len(steps) - first)
    assert re.fullmatch(
        rf"phase 0: epochs 0-{first // 4 - 1}, {PARAMETERS} trainable; "
        rf"phase 1: epochs {first // 4}-\d+, {total} trainable",
        outcome.phases,
    )


def test_layer_wise_rates_fall_from_the_head_to_the_embeddings(
    model: Path, tmp_path: Path, steps: list[dict[float, int]]
) -> None:
    train_way(Way.LAYER_WISE, model, tmp_path, 1)
    sizes = sizes_of(model)
    later = {0.001: sizes["head"] + sizes["top"], 0.0005: sizes["bottom"], 0.00025: sizes["embeddings"]}
    assert steps == [{0.001: sizes["head"]}, later, later, later]


def test_gradual_thawing_adds_a_block_a_phase(model: Path, tmp_path: Path, steps: list[dict[float, int]]) -> None:
    train_way(Way.GRADUAL, model, tmp_path, 60)
    sizes = sizes_of(model)
    trained = list(dict.fromkeys(tuple(step.items()) for step in steps))
    head, top, bottom, embeddings = (sizes[key] for key in ("head", "top", "bottom", "embeddings"))
    totals = [head + top, head + top + bottom, head + top + bottom + embeddings]
    assert trained == [((0.01, head),), *(((0.001, total),) for total in totals)]


def test_the_head_reads_the_mean_over_the_text_without_its_padding(model: Path) -> None:
    torch.manual_seed(0)
    network = MeanPooledClassifier(str(model), 2).eval()
    tokens = torch.tensor([[2, 5, 7, 3, 0, 0]])
    padded = network(attention_mask=(tokens > 0).long(), input_ids=tokens).logits
    states = network.body(input_ids=tokens[:, :4]).last_hidden_state
    torch.testing.assert_close(padded, network.classifier(states.mean(dim=1)))


# --- rows


def test_a_sample_is_spread_over_the_rows_and_never_more_than_there_are() -> None:
    rows = [Row((letter,), 0, "") for letter in "abcdefg"]
    assert "".join(row.texts[0] for row in spread_out(rows, 3)) == "ace"
    assert spread_out(rows, None) == spread_out(rows, 9) == rows


def test_rows_are_sorted_by_length() -> None:
    rows = [Row((text,), 0, "") for text in ("ccc", "a", "bb")]
    assert [row.texts[0] for row in by_length(rows)] == ["a", "bb", "ccc"]


# --- snippets


def test_snippets_that_are_clearly_rated_are_read_and_movies_are_not(tmp_path: Path) -> None:
    read = read_snippets(make_archive(tmp_path))
    assert {source: [(row.texts, row.label) for row in rows] for source, rows in read.items()} == {
        "amazon": [(("a dull story",), 0), (("a fine story",), 1)],
        "nyt": [(("a long story",), 0), (("a fine film",), 1)],
        "tweets": [(("fine \u2014 fine",), 1), (("dull",), 0)],
    }


@pytest.mark.parametrize(
    ("tweets", "message"),
    [
        (b"1\t2\tfine\n2\tfine\n", ":2: expected identifier, rating and text separated by tabs, got 2 columns"),
        (b"1\tgood\tfine\n", ":1: expected a number as rating, got 'good'"),
        (b"1\tnan\tfine\n", ":1: expected a number as rating, got 'nan'"),
        (b"1\t2\tfine\n2\t2\t\xff\n", ":2: expected UTF-8, got: "),
        (b"1\t0.5\tfine\n", ": expected at least one snippet rated 1 or more from 0, got none"),
        (b"", ": expected at least one snippet rated 1 or more from 0, got none"),
    ],
)
def test_a_bad_line_of_snippets_is_named(tweets: bytes, message: str, tmp_path: Path) -> None:
    archive = make_archive(tmp_path, {**SNIPPETS, "tweets": tweets})
    with pytest.raises(DataError, match=f"^{re.escape(f'{archive}:tweets_GroundTruth.txt{message}')}"):
        read_snippets(archive)


def test_a_missing_file_of_snippets_is_named(tmp_path: Path) -> None:
    archive = make_archive(tmp_path, {name: SNIPPETS[name] for name in SNIPPETS if name != "tweets"})
    with pytest.raises(
        DataError, match=f"^{re.escape(str(archive))}: expected the file .*tweets_GroundTruth.txt in it"
    ):
        read_snippets(archive)


def test_an_archive_of_something_else_is_named(tmp_path: Path) -> None:
    archive = pack(tmp_path / "other.tar.gz", {"other/README": b"hello"})
    with pytest.raises(
        DataError, match=f"^{re.escape(str(archive))}: expected the file .*hutto_ICWSM_2014.tar.gz in it"
    ):
        read_snippets(archive)


@pytest.mark.parametrize("content", [b"", b"text", b"\x1f\x8b\x08\x00broken"], ids=["empty", "text", "broken"])
def test_what_is_no_archive_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "snippets.tar.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}: expected the source distribution of [^\\n]+$"):
        read_snippets(path)


def test_a_truncated_archive_is_named(tmp_path: Path) -> None:
    path = make_archive(tmp_path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}: expected "):
        read_snippets(path)


PIP = """
import pathlib, shutil, sys
arguments = sys.argv[1:]
requirement = pathlib.Path(arguments[arguments.index("--requirement") + 1]).read_text()
assert requirement.startswith("vaderSentiment==3.3.2 --hash=sha256:"), requirement
assert arguments[:4] == ["download", "--no-deps", "--no-binary", ":all:"], arguments
shutil.copy({archive!r}, arguments[arguments.index("--dest") + 1])
"""


def test_pip_is_asked_for_one_version_of_the_source_distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").touch()
    (tmp_path / "pip" / "__main__.py").write_text(PIP.format(archive=str(make_archive(tmp_path))))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (folder := tmp_path / "fetched").mkdir()
    assert read_snippets(fetch(folder)).keys() == {"amazon", "nyt", "tweets"}


def test_what_pip_fails_with_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(
        DataError, match=r"^expected pip to download vaderSentiment==3\.3\.2, or --snippets ARCHIVE; pip "
    ):
        fetch(tmp_path)


# --- calibration


def logits_of(*confidences: float) -> torch.Tensor:
    """Logits of two classes with these probabilities of class 1."""
    return torch.tensor([[0.0, math.log(p / (1 - p))] for p in confidences], dtype=torch.float64)


@pytest.mark.parametrize(
    ("confidences", "labels", "ece", "accuracy"),
    [
        ((0.9,), (1,), 0.1, 1.0),
        ((0.9,), (0,), 0.9, 0.0),
        ((0.9, 0.9, 0.9, 0.9), (1, 1, 1, 0), 0.15, 0.75),  # one bin: |0.9 - 0.75|
        ((0.9, 0.7), (1, 0), 0.4, 0.5),  # two bins: (0.1 + 0.7) / 2
        ((0.1, 0.7), (0, 1), 0.2, 1.0),  # the confidence in class 0 counts, too: (0.1 + 0.3) / 2
        ((0.69, 0.71), (1, 0), 0.2, 0.5),  # one bin, 10/15 to 11/15, whose errors cancel: |0.7 - 0.5|
        ((0.72, 0.74), (1, 0), 0.51, 0.5),  # bins of 1/15: 11/15 lies between them, (0.28 + 0.74) / 2
    ],
)
def test_calibration_error(confidences: tuple, labels: tuple, ece: float, accuracy: float) -> None:
    measured = scores(logits_of(*confidences), torch.tensor(labels))
    assert measured.ece == pytest.approx(ece, abs=1e-6)
    assert measured.accuracy == accuracy
    likelihoods = [p if label else 1 - p for p, label in zip(confidences, labels, strict=True)]
    assert measured.nll == pytest.approx(-sum(map(math.log, likelihoods)) / len(labels))


def test_a_temperature_divides_the_logits() -> None:
    measured = scores(logits_of(0.9), torch.tensor([1]), temperature=2.0)
    assert measured.nll == pytest.approx(math.log(1 + math.exp(-math.log(9) / 2)))
    assert measured.ece == pytest.approx(1 - 3 / 4)  # odds of 9 to 1 become 3 to 1
    assert measured.accuracy == 1.0


@given(right=st.integers(1, 50), wrong=st.integers(1, 50), logit=st.floats(0.2, 20))
def test_rows_of_one_confidence_get_the_temperature_at_which_it_is_the_accuracy(
    right: int, wrong: int, logit: float
) -> None:
    logits = torch.tensor([[0.0, logit]]).repeat(right + wrong, 1)
    labels = torch.tensor([1] * right + [0] * wrong)
    odds = math.log(right / wrong)
    expected = logit / odds if odds > 0 else math.inf
    assert fit_temperature(logits, labels) == pytest.approx(min(max(expected, 0.01), 100.0), rel=1e-4)


@given(seed=st.integers(0, 1000), temperature=st.floats(0.2, 5))
def test_no_other_temperature_is_likelier(seed: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(40, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (40,), generator=generator)
    best = fit_temperature(logits, labels)
    assert scores(logits, labels, best).nll <= scores(logits, labels, temperature).nll + 1e-9


@pytest.mark.parametrize(("labels", "bound"), [([1, 1], 0.01), ([0, 0], 100.0)], ids=["all right", "all wrong"])
def test_a_temperature_that_would_have_no_bound_gets_one(labels: list[int], bound: float) -> None:
    assert fit_temperature(logits_of(0.9, 0.8), torch.tensor(labels)) == pytest.approx(bound, rel=1e-6)


# --- the command


@pytest.mark.quick
def test_the_command_compares_five_ways(data: Path, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = run(data, model, make_archive(tmp_path), "--max-epochs", "3", "--seeds", "2", "--output", str(output))
    assert result.exit_code == 0, result.output
    assert "Rows: 38 to train on, 2 held out; tests: id 8, amazon 2, nyt 2, tweets 2\n" in result.stdout
    runs = read_csv(output / "lp_ft.csv")
    assert [(run.way, run.seed) for run in runs] == [(way.value, seed) for seed in (0, 1) for way in Way]
    assert tables(runs) in result.stdout
    for each in runs:
        others = [each.figures[f"{source}_accuracy"] for source in ("amazon", "nyt", "tweets")]
        assert each.figures["ood_accuracy"] == pytest.approx(sum(others) / 3, abs=1e-5)  # rounded
    picture = (output / "lp_ft.svg").read_text()
    assert picture.startswith("<?xml")
    assert len(re.findall(r"<use ", picture)) > 3 * len(Way)


def test_a_seed_gives_the_same_figures_twice(data: Path, model: Path, tmp_path: Path) -> None:
    archive = make_archive(tmp_path)
    for name in ("first", "second"):
        result = run(data, model, archive, "--max-epochs", "2", "--output", str(tmp_path / name))
        assert result.exit_code == 0, result.output
    first, second = (read_csv(tmp_path / name / "lp_ft.csv") for name in ("first", "second"))
    for one, other in zip(first, second, strict=True):
        one.figures.pop("processor_seconds")
        other.figures.pop("processor_seconds")
    assert first == second


def test_only_the_rows_asked_for_are_used(data: Path, model: Path, tmp_path: Path) -> None:
    limits = ("--train-rows", "6", "--test-rows", "1", "--max-epochs", "1")
    result = run(data, model, make_archive(tmp_path), *limits)
    assert "Rows: 6 to train on, 2 held out; tests: id 1, amazon 1, nyt 1, tweets 1\n" in result.stdout, result.output


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    runs = [Run("full", 0, "phase 0: epochs 0-1, 8 trainable", {"epochs": 2.0, "id_ece": 0.125})]
    write_csv(runs, tmp_path / "runs.csv")
    assert read_csv(tmp_path / "runs.csv") == runs


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        (ROWS[:5], ROWS, "expected at least 20 rows, got 5"),
        ([{**row, "label": str(row["label"])} for row in ROWS], ROWS, "expected the labels 0 (negative) and 1"),
        (ROWS, [*ROWS[:2], {"sentence": "a film", "label": 7}], "expected a label of the training rows, got 7"),
    ],
    ids=["few rows", "other labels", "a label of its own"],
)
def test_rows_that_do_not_suit_are_refused(
    train: list[dict], validation: list[dict], message: str, model: Path, tmp_path: Path
) -> None:
    write_rows(tmp_path, train, validation)
    result = run(tmp_path, model, make_archive(tmp_path))
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {tmp_path}")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_missing_folder_archive_or_model_is_named(data: Path, model: Path, tmp_path: Path) -> None:
    archive, nowhere = make_archive(tmp_path), tmp_path / "nowhere"
    for result in (run(nowhere, model, archive), run(data, model, nowhere), run(data, nowhere, archive)):
        assert result.exit_code == 2
        assert result.stderr.startswith(f"error: {nowhere}")
        assert result.stdout == ""


@pytest.mark.parametrize("arguments", [("--seeds", "0"), ("--train-rows", "0"), ("--patience", "0")])
def test_numbers_below_one_are_refused(arguments: tuple[str, str], data: Path, model: Path, tmp_path: Path) -> None:
    result = run(data, model, tmp_path / "unread", *arguments)
    assert result.exit_code == 2
    assert arguments[0] in result.stderr


# --- the page


def test_the_command_of_the_page_runs(data: Path, model: Path, tmp_path: Path) -> None:
    places = {"DIR": str(data), "OUTPUT": str(tmp_path / "out")}
    arguments = [places.get(word, word) for word in arguments_of("lp_ft.md", "fts_examples.lp_ft")]
    tiny = ["--model", str(model), "--snippets", str(make_archive(tmp_path)), "--seeds", "1", "--max-epochs", "1"]
    result = CliRunner().invoke(app, [*arguments, *tiny], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"lp_ft.csv", "lp_ft.svg"}


def test_the_page_shows_the_tables_of_the_figures_beside_it() -> None:
    assert tables(read_csv(STUDIES / "lp_ft.csv")) in (STUDIES / "lp_ft.md").read_text(encoding="utf-8")


def test_a_way_is_apart_from_the_first_if_no_values_overlap() -> None:
    accuracies = {"full": (0.5, 0.6), "LP-FT": (0.6, 0.7), "gradual": (0.61, 0.7)}
    calibration = [f"{prefix}_{key}" for prefix in ("id", "ood") for key in CALIBRATION.values()]
    runs = [
        Run(
            way,
            seed,
            "",
            dict.fromkeys([*ACCURACIES.values(), *EFFORT.values(), *COMPARED.values(), *calibration], value),
        )
        for way, values in accuracies.items()
        for seed, value in enumerate(values)
    ]
    table = tables(runs).split("Difference from full")[1]
    assert "| LP-FT | +10.0 (+10.0 to +10.0) | " in table
    assert "| gradual | +10.5 (+10.0 to +11.0), apart | " in table
    assert f"Apart from full: {'; '.join(f'gradual in {heading}' for heading in COMPARED)}. All other" in table
