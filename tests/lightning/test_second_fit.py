"""A trainer that fits again, and arguments set after the callback was made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from tests.reference.recipe import simple_recipe
from tests.reference.toys import Session, Toy

pytestmark = pytest.mark.quick


def test_a_second_fit_goes_on_in_the_phase_of_the_first(tmp_path: Path) -> None:
    session = Session(simple_recipe(), tmp_path).fit()
    session.trainer.fit_loop.max_epochs = 8
    session.fit()
    assert [epoch.phase for epoch in session.history.epochs] == [0, 0, 1, 1, 2, 2, 2, 2]


def test_another_module_starts_in_phase_0_with_its_own_weights(tmp_path: Path) -> None:
    session = Session(simple_recipe(), tmp_path).fit()
    other = Toy(simple_recipe())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(0.5)
    session.trainer.fit_loop.max_epochs = 9
    session.trainer.fit(other)
    assert [epoch.phase for epoch in session.history.epochs[6:]] == [0, 1, 2]  # limits are past: an epoch each
    assert torch.equal(other.network.first.weight, torch.full_like(other.network.first.weight, 0.5))


@pytest.mark.parametrize("wrong", [{"max_depth": 0}, {"base_max_lr": -1.0}, {"strategy_adapter_cfg": {"x": 1}}])
def test_a_fit_that_was_refused_is_nothing_to_go_on_from(wrong: dict[str, Any], tmp_path: Path) -> None:
    session = Session(simple_recipe(), tmp_path)
    right = {name: getattr(session.scheduler, name) for name in wrong}
    session.trainer.fit_loop.max_epochs = 4
    session.fit()
    session.trainer.fit_loop.max_epochs = 6
    for name, value in wrong.items():
        setattr(session.scheduler, name, value)
    with pytest.raises(MisconfigurationException):
        session.fit()
    for name, value in right.items():
        setattr(session.scheduler, name, value)
    session.fit()
    assert [epoch.phase for epoch in session.history.epochs] == [0, 0, 1, 1, 2, 2]


def test_arguments_set_before_the_fit_count(tmp_path: Path) -> None:
    session = Session(simple_recipe(), tmp_path)
    session.scheduler.max_depth = 0
    session.scheduler.log_dir = tmp_path / "elsewhere"
    session.fit()
    assert session.scheduler.max_depth == session.scheduler.curr_depth == 0
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == {"Toy_ft_schedule.yaml", "fts_history.json"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_depth": "2"}, "expected `max_depth` to be -1 or a phase, got '2'"),
        ({"max_depth": True}, "expected `max_depth` to be -1 or a phase, got True"),
        ({"base_max_lr": "1e-5"}, "expected `base_max_lr` to be a number above 0, got '1e-5'"),
        ({"base_max_lr": float("inf")}, "expected `base_max_lr` to be a number above 0, got inf"),
        ({"enforce_phase0_params": "no"}, "expected `enforce_phase0_params` to be True or False, got 'no'"),
    ],
)
def test_arguments_of_the_wrong_type_are_named(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        Session(simple_recipe(), tmp_path, scheduler_options=options).fit()


def test_a_log_dir_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("taken")
    with pytest.raises(MisconfigurationException, match=r"Set `log_dir` to a directory that can be written to"):
        Session(simple_recipe(), tmp_path, scheduler_options={"log_dir": tmp_path / "file"}).fit()


def test_a_no_decay_that_is_no_list_is_named(tmp_path: Path) -> None:
    session = Session(simple_recipe(), tmp_path)
    session.module.no_decay = "bias"
    with pytest.raises(MisconfigurationException, match="`no_decay` to be a list of name fragments, got 'bias'"):
        session.fit()


def test_stochastic_weight_averaging_is_refused(tmp_path: Path) -> None:
    session = Session(simple_recipe(), tmp_path, extra_callbacks=(StochasticWeightAveraging(swa_lrs=0.1),))
    with pytest.raises(MisconfigurationException, match="StochasticWeightAveraging"):
        session.fit()


def test_there_is_no_step_beyond_the_last_phase(tmp_path: Path) -> None:
    session = Session(simple_recipe(), tmp_path, scheduler_options={"max_depth": 0}).fit()
    weights = {name: value.clone() for name, value in session.module.state_dict().items()}
    with pytest.raises(MisconfigurationException, match="Phase 0 is the last one"):
        session.scheduler.step()
    assert all(torch.equal(weights[name], value) for name, value in session.module.state_dict().items())
