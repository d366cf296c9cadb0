"""Every optimizer of `torch.optim`: supported and resumed exactly, or refused before training with the reason."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from tests.reference.history import assert_same_epochs
from tests.reference.networks import BATCHES_PER_EPOCH, HEAD, SECOND, THIRD, mlp
from tests.reference.recipe import PhaseSpec, Recipe, momentum_sgd, schedule_of, simple_recipe
from tests.reference.toys import SaveAt, Session

if TYPE_CHECKING:
    from pathlib import Path

MATRICES = tuple(f"network.{layer}.weight" for layer in ("head", "third", "second"))
EMBEDDINGS = tuple(f"network.{name}.weight" for name in ("last", "middle", "first"))


class Embeddings(nn.Module):
    """Three tables with sparse gradients, looked up at places that the inputs' signs decide."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = (nn.Embedding(16, 1, sparse=True) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        place = ((x > 0) * torch.tensor([8, 4, 2, 1])).sum(dim=1)
        return self.first(place) + self.middle(15 - place).tanh() + self.last(place).sin()


@dataclass(frozen=True)
class Supported:
    """Trains three phases; ``networks`` gives the model and each phase's parameters where any would not do."""

    arguments: dict[str, Any] = field(default_factory=dict)
    network: Any = mlp
    phases: tuple[tuple[str, ...], ...] = (HEAD, THIRD, SECOND)

    def recipe(self, optimizer: Any = None) -> Recipe:
        first, second, third = self.phases
        phases = (PhaseSpec(first, max_epoch=2), PhaseSpec(second, lr=0.01, max_epoch=4), PhaseSpec(third, lr=0.005))
        chosen = momentum_sgd if optimizer is None else optimizer
        return replace(simple_recipe(), phases=phases, network=self.network, optimizer=chosen, epochs=5)


@dataclass(frozen=True)
class Refused:
    message: str


ROWS: dict[str, Supported | Refused] = {
    "ASGD": Supported({"lr": 0.01, "t0": 2}),
    "Adadelta": Supported({"lr": 0.5}),
    "Adafactor": Supported({"lr": 0.02}),
    "Adagrad": Supported({"lr": 0.02, "initial_accumulator_value": 0.1}),
    "Adam": Supported({"lr": 0.01, "amsgrad": True}),
    "AdamW": Supported({"lr": 0.01}),
    "Adamax": Supported({"lr": 0.01}),
    "LBFGS": Refused("LBFGS has one parameter group only, but each phase adds one. Fix: Choose another optimizer."),
    "Muon": Supported({"lr": 0.01}, phases=tuple((name,) for name in MATRICES)),
    "NAdam": Supported({"lr": 0.01}),
    "RAdam": Supported({"lr": 0.01}),
    "RMSprop": Supported({"lr": 0.01, "momentum": 0.5, "centered": True}),
    "Rprop": Supported({"lr": 0.01}),
    "SGD": Supported({"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "SparseAdam": Supported({"lr": 0.01}, network=Embeddings, phases=tuple((name,) for name in EMBEDDINGS)),
}
SUPPORTED = {name: row for name, row in ROWS.items() if isinstance(row, Supported)}


def factory(name: str, arguments: dict[str, Any]) -> Any:
    """Make the user's optimizer over what it can hold: matrices for Muon."""

    def make(parameters: Iterable[nn.Parameter]) -> Optimizer:
        held = [p for p in parameters if p.dim() == 2] if name == "Muon" else list(parameters)
        return getattr(torch.optim, name)(held, **arguments)

    return make


def reinitialised(recipe: Recipe, class_path: str, arguments: dict[str, Any]) -> dict[int, dict[str, Any]]:
    phases = schedule_of(recipe)
    phases[1]["new_optimizer"] = {"optimizer_init": {"class_path": class_path, "init_args": arguments}}
    return phases


def plain_sgd(parameters: Any) -> Optimizer:
    """Takes sparse gradients too."""
    return SGD(parameters, lr=0.05)


def assert_resumes_exactly(recipe: Recipe, root: Path, options: dict[str, Any], optimizer: type[Optimizer]) -> None:
    """One checkpoint of each phase, at the end of an epoch, continues as the uninterrupted run did."""
    saver = SaveAt("on_train_epoch_end", root)
    whole = Session(recipe, root, extra_callbacks=(saver,), scheduler_options=options, checkpoint={"save_top_k": -1})
    uninterrupted = whole.fit().history
    assert type(whole.trainer.optimizers[0]) is optimizer
    assert [epoch.phase for epoch in uninterrupted.epochs] == [0, 0, 1, 1, 2]
    checkpoints = list(saver.files)
    for epoch in (0, 1, 2, 3):
        resumed = Session(recipe, root, scheduler_options=options, checkpoint={"save_top_k": -1})
        history = resumed.fit(ckpt_path=checkpoints[epoch]).history
        assert history.steps == uninterrupted.steps[(epoch + 1) * BATCHES_PER_EPOCH :]
        assert_same_epochs(history.epochs, uninterrupted.since(epoch + 1))


def changed_each_phase(recipe: Recipe, root: Path, options: dict[str, Any]) -> list[set[str]]:
    """Names of the parameters that differ from one phase's last epoch to the next one's."""
    history = Session(recipe, root, scheduler_options=options).fit().history
    ends = [history.epochs[index].weights for index in (1, 3, 4)]
    starts = [Session(recipe, root / "untrained").module.state_dict(), *ends[:-1]]
    return [
        {name for name, tensor in end.items() if not torch.equal(tensor, start[name])}
        for start, end in zip(starts, ends, strict=True)
    ]


def test_every_optimizer_has_a_row() -> None:
    exported = [value for value in vars(torch.optim).values() if isinstance(value, type)]
    names = {kind.__name__ for kind in exported if issubclass(kind, Optimizer) and kind is not Optimizer}
    assert ROWS.keys() == names


@pytest.mark.parametrize(("name", "row"), SUPPORTED.items(), ids=SUPPORTED.keys())
def test_as_the_users_optimizer(name: str, row: Supported, tmp_path: Path) -> None:
    recipe = row.recipe(factory(name, row.arguments))
    assert_resumes_exactly(recipe, tmp_path, {}, getattr(torch.optim, name))


@pytest.mark.parametrize(("name", "row"), SUPPORTED.items(), ids=SUPPORTED.keys())
def test_as_a_phases_optimizer(name: str, row: Supported, tmp_path: Path) -> None:
    recipe = row.recipe(plain_sgd)
    options = {"ft_schedule": reinitialised(recipe, f"torch.optim.{name}", row.arguments)}
    assert_resumes_exactly(recipe, tmp_path, options, getattr(torch.optim, name))


@pytest.mark.parametrize(("name", "row"), SUPPORTED.items(), ids=SUPPORTED.keys())
def test_each_phase_trains_all_that_was_thawed(name: str, row: Supported, tmp_path: Path) -> None:
    recipe = row.recipe(plain_sgd)
    options = {"ft_schedule": reinitialised(recipe, f"torch.optim.{name}", row.arguments), "restore_best": False}
    first, second, third = (set(names) for names in row.phases)
    expected = [first, first | second, first | second | third]
    assert changed_each_phase(recipe, tmp_path, options) == expected


def message_of(recipe: Recipe, root: Path, schedule: dict[int, dict[str, Any]] | None = None) -> str:
    """The refusal, which comes before the first batch."""
    options = {} if schedule is None else {"ft_schedule": schedule}
    session = Session(recipe, root, scheduler_options={"logging_level": logging.ERROR, **options})
    with pytest.raises(MisconfigurationException) as refusal:
        session.fit()
    assert session.history.steps == []
    return str(refusal.value)


def test_lbfgs_is_refused(tmp_path: Path) -> None:
    row = ROWS["LBFGS"]
    assert isinstance(row, Refused)
    recipe = simple_recipe(phases=simple_recipe().phases[:2])
    assert message_of(replace(recipe, optimizer=torch.optim.LBFGS), tmp_path) == f"phase 1: {row.message}"
    schedule = reinitialised(recipe, "torch.optim.LBFGS", {})
    assert message_of(recipe, tmp_path, schedule) == f"phase 1: {row.message}"


def test_sparse_adam_is_refused_for_dense_parameters(tmp_path: Path) -> None:
    recipe = Supported().recipe(momentum_sgd)
    assert message_of(recipe, tmp_path, reinitialised(recipe, "torch.optim.SparseAdam", {})) == (
        "2 problems found:\n"
        "1. phase 1: SparseAdam needs sparse gradients, but this phase gives it the dense network.head.bias, "
        "network.head.weight, network.third.bias and 1 more. "
        "Fix: Use Adam, or thaw embeddings with sparse=True only.\n"
        "2. phase 2: SparseAdam needs sparse gradients, but this phase gives it the dense network.second.bias, "
        "network.second.weight. Fix: Use Adam, or thaw embeddings with sparse=True only."
    )


def test_muon_is_refused_for_parameters_that_are_not_matrices(tmp_path: Path) -> None:
    recipe = Supported().recipe(momentum_sgd)
    assert message_of(recipe, tmp_path, reinitialised(recipe, "torch.optim.Muon", {})) == (
        "2 problems found:\n"
        "1. phase 1: Muon optimizes matrices only, but this phase gives it network.head.bias, network.third.bias. "
        "Fix: Thaw these with another optimizer.\n"
        "2. phase 2: Muon optimizes matrices only, but this phase gives it network.second.bias. "
        "Fix: Thaw these with another optimizer."
    )


# PyTorch's own distributed optimizers use what it has deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
def test_zero_redundancy_is_refused_as_a_phases_optimizer(tmp_path: Path) -> None:
    recipe = Supported().recipe(momentum_sgd)
    schedule = reinitialised(recipe, "torch.distributed.optim.ZeroRedundancyOptimizer", {"lr": 0.1})
    assert message_of(recipe, tmp_path, schedule) == (
        "phase 1: ZeroRedundancyOptimizer spreads its state over ranks when it is made and cannot take over groups. "
        "Fix: Choose another optimizer."
    )
