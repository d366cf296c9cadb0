import re
from importlib import resources

import pytest
import torch
from lightning.pytorch import seed_everything
from typer.testing import CliRunner, Result

from finetuning_scheduler.core.prepare import resolve
from fts_examples.digits import NEW, OLD, DigitClassifier, Digits, app


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "120"})


@pytest.mark.quick
def test_the_three_ways_and_their_phases_are_printed() -> None:
    result = run("--max-epochs", "2", "--train-rows", "40")
    assert result.exit_code == 0, result.output
    for way in ("no schedule", "generated schedule", "explicit schedule"):
        assert re.search(rf"{way} +│ +\d+\.\d% +│ +[12] +│ +\d+\.\d", result.output), result.output
        assert re.search(rf"{way} +│ 0 +│ 0 to [01] ", result.output), result.output


def test_a_seed_gives_the_same_result_twice() -> None:
    arguments = ("--max-epochs", "1", "--train-rows", "40", "--seed", "3")
    accuracies = [re.findall(r"\d+\.\d%", run(*arguments).output) for _ in range(2)]
    assert accuracies[0] == accuracies[1]
    assert len(accuracies[0]) == 4


@pytest.mark.parametrize("digits", [OLD, NEW], ids=["old", "new"])
def test_every_row_is_in_one_part_only(digits: range) -> None:
    data = Digits(digits, train_rows=100, validation_rows=200, seed=0)
    rows = torch.cat(data.rows)
    assert rows.sort().values.equal(torch.arange(len(data.labels)))
    assert [len(part) for part in data.rows[:2]] == [100, 200]
    assert data.labels.unique().tolist() == list(range(5))


def test_the_explicit_schedule_thaws_the_head_first_and_everything_in_the_end() -> None:
    seed_everything(0, verbose=False)
    module = DigitClassifier()
    with resources.as_file(resources.files("fts_examples") / "digits_schedule.yaml") as path:
        schedule = resolve(path, module).schedule
    names = [name for phase in schedule.phases for name in phase.params]
    assert set(schedule.phases[0].params) == {"head.weight", "head.bias"}
    assert sorted(names) == sorted(name for name, _ in module.named_parameters())
