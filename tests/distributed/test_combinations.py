"""Each way to train with each feature, as the support matrix lists them, compared with one device."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from tests.reference import harness
from tests.reference.combinations import FEATURES, WAYS, WITHOUT, fit_each
from tests.reference.history import Epoch, assert_same_epochs
from tests.reference.loop import train
from tests.reference.recipe import phases_of
from tests.support import matrix

Outcomes = dict[str, "list[Epoch] | str"]

# What the reference loop knows; other features on one device are compared with `PhaseRunner` in a plain loop.
KNOWN_TO_THE_REFERENCE = (
    "nothing",
    "restored best",
    "resumed",
    "no_decay",
    "LR scheduler by epoch",
    "LR scheduler by step",
    "ReduceLROnPlateau",
    "accumulation",
    "clipping by norm",
    "clipping by value",
    "torch.compile",
    "slim checkpoints",
)


class Runs:
    """What each way has trained: all its features that were asked for, in one start of its processes."""

    def __init__(self, directory: pytest.TempPathFactory, wanted: set[tuple[str, str]]) -> None:
        self.directory = directory
        self.wanted = wanted
        self.done: dict[str, list[Outcomes]] = {}

    def of(self, way: str, feature: str) -> list[list[Epoch] | str]:
        """What each rank has observed, or the traceback of its failure."""
        if way not in self.done:
            names = tuple(name for name in FEATURES if (way, name) in self.wanted)
            root = self.directory.mktemp("ranks")
            self.done[way] = harness.run_ranks(fit_each, WAYS[way].ranks, root, way, names, timeout=240.0)
        return [outcomes[feature] for outcomes in self.done[way]]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    specs = [getattr(item, "callspec", None) for item in request.session.items if item.module is request.module]
    asked = [spec.params for spec in specs if spec is not None]
    pairs = {(each["way"], each["feature"]) for each in asked if "way" in each}
    alone = {(way, each["feature"]) for each in asked for way in (matrix.ALONE, matrix.RUNNER)}
    return Runs(tmp_path_factory, pairs | alone)


def epochs_of(outcome: list[Epoch] | str) -> list[Epoch]:
    assert not isinstance(outcome, str), outcome
    return outcome


def expected_of(way: str, feature: str, runs: Runs) -> list[Epoch]:
    """What one device trains; on one device, what a plain loop does."""
    if way not in (matrix.ALONE, matrix.RUNNER):
        return epochs_of(runs.of(matrix.ALONE, feature)[0])
    if feature in KNOWN_TO_THE_REFERENCE:
        asked = FEATURES[feature]
        assert asked.schedule is not None
        return train(replace(asked.recipe, phases=phases_of(asked.schedule))).epochs
    return epochs_of(runs.of(matrix.RUNNER if way == matrix.ALONE else matrix.ALONE, feature)[0])


@pytest.mark.parametrize(("way", "feature"), matrix.to_combine(refused=False))
def test_it_trains_what_one_device_would(way: str, feature: str, runs: Runs) -> None:
    expected = expected_of(way, feature, runs)
    assert len({epoch.phase for epoch in expected}) > 1
    for outcome in runs.of(way, feature):
        assert_same_epochs(epochs_of(outcome), expected, tolerance=FEATURES[feature].tolerance)


@pytest.mark.parametrize(("way", "feature"), matrix.to_combine(refused=True))
def test_it_is_refused(way: str, feature: str, runs: Runs) -> None:
    for outcome in runs.of(way, feature):
        assert isinstance(outcome, str)
        *_, message = outcome.strip().rsplit("\n", maxsplit=1)
        assert message.startswith("lightning.fabric.utilities.exceptions.MisconfigurationException: ")
        assert matrix.MESSAGES[matrix.REFUSED[way, feature]] in message


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    run = partial(fit_each, without=True)
    return harness.run_ranks(run, 1, tmp_path_factory.mktemp("without"), matrix.ALONE, tuple(WITHOUT))[0]


@pytest.mark.parametrize("feature", WITHOUT)
def test_a_feature_changes_what_is_trained(feature: str, runs: Runs, without: Outcomes) -> None:
    """By more than what the comparison of ranks lets pass; rounding to bfloat16 is seen in the module's output."""
    other = epochs_of(without[feature])[-1].weights
    mine = epochs_of(runs.of(matrix.ALONE, feature)[0])[-1].weights
    least = 0.0 if feature == "bf16-mixed" else 10 * FEATURES[feature].tolerance
    assert max(float((mine[name] - other[name]).abs().max()) for name in mine if name in other) > least


def test_the_matrix_has_every_way_and_every_feature() -> None:
    assert set(matrix.WAYS) == set(WAYS)
    assert set(matrix.FEATURES) - {"schedule", "sharded checkpoints"} == set(FEATURES) - {"nothing"}
