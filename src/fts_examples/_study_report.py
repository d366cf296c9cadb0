"""What a study came to: a CSV file with a row for each run, tables of means and spreads, and a picture."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

ACCURACIES = {
    "SST-2": "id_accuracy",
    "others, mean": "ood_accuracy",
    "Amazon": "amazon_accuracy",
    "NYT": "nyt_accuracy",
    "tweets": "tweets_accuracy",
}
CALIBRATION = {
    "ECE before": "ece",
    "ECE after": "ece_scaled",
    "NLL before": "nll",
    "NLL after": "nll_scaled",
}
EFFORT = {"epochs": "epochs", "processor seconds": "processor_seconds", "temperature": "temperature"}
DIGITS = {"epochs": 1, "processor_seconds": 0, "temperature": 2}
COMPARED = {
    "accuracy on SST-2": "id_accuracy",
    "accuracy on others": "ood_accuracy",
    "ECE after, on SST-2": "id_ece_scaled",
    "ECE after, on others": "ood_ece_scaled",
    "NLL after, on others": "ood_nll_scaled",
}
# Okabe and Ito's colours, told apart with any colour vision; shapes tell them apart without
MARKS = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"))


@dataclass(frozen=True)
class Run:
    """One way with one seed: what was trained when, and figures by name; accuracies and ECEs are shares."""

    way: str
    seed: int
    phases: str
    figures: dict[str, float]


def write_csv(runs: Sequence[Run], path: Path) -> None:
    """Write a row for each run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["way", "seed", "phases", *runs[0].figures])
        for run in runs:
            writer.writerow([run.way, run.seed, run.phases, *run.figures.values()])


def read_csv(path: Path) -> list[Run]:
    """Read what `write_csv` wrote."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Run(row.pop("way"), int(row.pop("seed")), row.pop("phases"), {key: float(row[key]) for key in row})
            for row in csv.DictReader(file)
        ]


def tables(runs: Sequence[Run]) -> str:
    """Markdown tables of the mean of each figure over seeds, and its least and greatest value in parentheses.

    The last table compares each way with the first. "apart": the values of the two, over all seeds, do not overlap.
    """
    seeds = len({run.seed for run in runs})
    note = f"Mean (least to greatest) of {seeds} seed{'s' if seeds > 1 else ''}."
    parts = [
        _table("Accuracy (%)", runs, ACCURACIES),
        _table("Calibration on SST-2 (ECE in %)", runs, {title: f"id_{key}" for title, key in CALIBRATION.items()}),
        _table(
            "Calibration on the others (ECE in %)", runs, {title: f"ood_{key}" for title, key in CALIBRATION.items()}
        ),
        _table("Effort", runs, EFFORT),
        *_differences(runs),
    ]
    return "\n\n".join([note, *parts])


def _table(title: str, runs: Sequence[Run], columns: dict[str, str]) -> str:
    rows = [
        [way, *(_summary([run.figures[key] for run in of_way], key) for key in columns.values())]
        for way, of_way in _by_way(runs)
    ]
    return _markdown(title, list(columns), rows)


def _differences(runs: Sequence[Run]) -> Iterator[str]:
    """Compare each way with the first one, seed by seed, and say in which figures its values do not overlap with it."""
    (first, of_first), *others = _by_way(runs)
    rows, apart = [], []
    for way, of_way in others:
        row = [way]
        for heading, key in COMPARED.items():
            ours, theirs = ([run.figures[key] for run in part] for part in (of_way, of_first))
            differences = [one - other for one, other in zip(ours, theirs, strict=False)]
            is_apart = len(ours) > 1 and (min(ours) > max(theirs) or max(ours) < min(theirs))
            row.append(_summary(differences, key, sign="+") + (", apart" if is_apart else ""))
            apart += [f"{way} in {heading}"] if is_apart else []
        rows.append(row)
    yield _markdown(f"Difference from {first}, seed by seed (accuracy and ECE in points)", list(COMPARED), rows)
    if len(of_first) > 1:
        yield f"Apart from {first}: {'; '.join(apart) or 'none'}. All other differences are within the seeds' spread."


def _markdown(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [["way", *headings], ["---", *("---:" for _ in headings)], *rows]
    return "\n".join([f"{title}:", "", *(f"| {' | '.join(cells)} |" for cells in lines)])


def _by_way(runs: Iterable[Run]) -> Iterator[tuple[str, list[Run]]]:
    runs = list(runs)
    for way in dict.fromkeys(run.way for run in runs):
        yield way, [run for run in runs if run.way == way]


def _summary(values: Sequence[float], key: str, sign: str = "") -> str:
    share = "accuracy" in key or "ece" in key
    factor, digits = (100, 1) if share else (1, DIGITS.get(key, 3))
    mean, least, greatest = (
        f"{factor * value:{sign}.{digits}f}" for value in (fmean(values), min(values), max(values))
    )
    return f"{mean} ({least} to {greatest})"


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draw accuracy out of the training distribution over that in it: each run small, each way's mean large.

    Needs matplotlib (extra ``plot``). The file's ending says its format.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "fts", "font.size": 10}):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained", facecolor="white")
        axes = figure.subplots()
        for (way, of_way), (colour, shape) in zip(_by_way(runs), MARKS, strict=False):
            x = [100 * run.figures["id_accuracy"] for run in of_way]
            y = [100 * run.figures["ood_accuracy"] for run in of_way]
            axes.scatter(x, y, s=22, c=colour, marker=shape, alpha=0.6, linewidths=0)
            axes.scatter([fmean(x)], [fmean(y)], s=110, c=colour, marker=shape, edgecolors="black", label=way)
        axes.set_xlabel("accuracy on SST-2 (%)")
        axes.set_ylabel("accuracy on the other texts, mean (%)")
        figure.legend(loc="outside right upper", title="large: mean", frameon=False)
        axes.grid(alpha=0.3)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
