"""Weights load as PyTorch loads them, with everybody's hooks, in time linear in how many there are."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetuning_scheduler.core.weights import ByName, load_weights, loading_linearly


class Renamed(nn.Module):
    """Reads files in which its layer had another name, and such in which it had none."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self._register_load_state_dict_pre_hook(self.rename)
        self.calls: list[tuple[str, ...]] = []
        self.register_load_state_dict_post_hook(lambda module, keys: module.calls.append(tuple(keys.missing_keys)))

    def rename(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        for key in [key for key in state_dict if key.startswith(f"{prefix}old.")]:
            state_dict[key.replace(f"{prefix}old.", f"{prefix}inner.")] = state_dict.pop(key)


class Own(nn.Linear):
    """Loads in a way of its own, has a state that is no tensor, and its version is in the file."""

    _version = 3

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.seen: list[tuple[int, bool]] = []
        self.extra = 0

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, strict: bool, *others: Any) -> None:
        self.seen.append((metadata.get("version"), strict))
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *others)

    def get_extra_state(self) -> int:
        return self.extra

    def set_extra_state(self, state: int) -> None:
        self.extra = state


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.second = self.first
        self.third = nn.Linear(2, 2)
        self.third.weight = self.first.weight
        self.register_buffer("scratch", torch.zeros(1), persistent=False)
        self.register_parameter("absent", None)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "layers": lambda: nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))),
    "hooks": lambda: nn.ModuleDict({"a": Renamed(), "b": Renamed()}),
    "methods": lambda: nn.ModuleList([Own(), nn.ModuleDict({"x.y".replace(".", "_"): Own()})]),
    "shared": Shared,
    "normed": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))),
    "attention": lambda: nn.TransformerEncoderLayer(4, 2, 8),
}


def old_name(state: dict[str, Any]) -> None:
    for key in [key for key in state if ".inner." in key]:
        state[key.replace("inner", "old")] = state.pop(key)


def one_less(state: dict[str, Any]) -> None:
    state.pop(next(iter(state)))


def one_more(state: dict[str, Any]) -> None:
    state["a.b.c"] = state["d"] = torch.ones(1)


def another_shape(state: dict[str, Any]) -> None:
    key = next(key for key, value in state.items() if isinstance(value, Tensor) and value.dim())
    state[key] = torch.ones(7, 7, 7)


def no_tensor(state: dict[str, Any]) -> None:
    state[next(key for key, value in state.items() if isinstance(value, Tensor))] = "text"


def without_versions(state: Any) -> None:
    del state._metadata


def nothing(state: dict[str, Any]) -> None:
    pass


CHANGES = (nothing, old_name, one_less, one_more, another_shape, no_tensor, without_versions)


def outcome(load: Callable[..., Any], module: nn.Module, state: Any, *, strict: bool) -> tuple[Any, ...]:
    """What a load has changed and said."""
    try:
        keys = load(module, state, strict)
        said: Any = (sorted(keys.missing_keys), sorted(keys.unexpected_keys))
    except RuntimeError as error:
        said = sorted(str(error).split("\n\t"))
    noticed = [vars(part).get(name) for part in module.modules() for name in ("calls", "seen", "extra")]
    return (
        said,
        noticed,
        {name: value.tolist() for name, value in [*module.named_parameters(), *module.named_buffers()]},
    )


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_it_is_what_pytorch_does(make: Callable[[], nn.Module], change: Callable[[Any], None], strict: bool) -> None:
    torch.manual_seed(0)
    mine = make()
    theirs, source = copy.deepcopy(mine), make()
    state = source.state_dict()
    change(state)
    before = list(state)
    actual = outcome(load_weights, mine, state, strict=strict)
    assert list(state) == before
    assert actual == outcome(nn.Module.load_state_dict, theirs, state, strict=strict)


def steps_of(layers: int) -> int:
    """How often a key is asked where it belongs."""
    asked = 0

    class Key(str):
        __slots__ = ()

        def startswith(self, *arguments: Any) -> bool:
            nonlocal asked
            asked += 1
            return super().startswith(*arguments)

    model = nn.ModuleList(nn.Linear(1, 1) for _ in range(layers))
    load_weights(model, {Key(key): value for key, value in model.state_dict().items()})
    return asked


def test_twice_as_many_layers_take_twice_as_long() -> None:
    assert steps_of(200) <= 2 * steps_of(100)


def test_a_module_loads_linearly_for_a_while_and_its_copies_load_into_themselves() -> None:
    model = nn.Linear(1, 1)
    with loading_linearly(model):
        model.load_state_dict({"weight": torch.ones(1, 1), "bias": torch.ones(1)})
        copied = copy.deepcopy(model)
        copied.load_state_dict({"weight": torch.zeros(1, 1), "bias": torch.zeros(1)})
        pickle.loads(pickle.dumps(model))
    assert (model.weight.item(), copied.weight.item()) == (1.0, 0.0)
    assert "load_state_dict" not in vars(model)


def test_a_method_of_the_modules_own_stays() -> None:
    class Counts(nn.Linear):
        calls = 0

        def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
            self.calls += 1
            return super().load_state_dict(*arguments, **options)

    model = Counts(1, 1)
    with loading_linearly(model):
        model.load_state_dict(model.state_dict())
    assert model.calls == 1


@pytest.mark.parametrize("name", MODELS)
def test_values_are_copied_by_name_only_where_nothing_else_takes_part(name: str) -> None:
    model = MODELS[name]()
    values = {key: value + 1 for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    by_name = ByName(model, values)
    targets = by_name.targets()
    if name in ("hooks", "methods"):
        assert targets is None
        return
    if targets is None:  # PyTorch's own hook, of files that were written before there were parametrisations
        assert name == "normed"
        return
    by_name.copy(targets)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in values.items())


@pytest.mark.parametrize(
    "values", [{"0.weight": torch.ones(5)}, {"9.weight": torch.ones(1)}, {"0.other": torch.ones(1)}, {"0.weight": "x"}]
)
def test_values_that_do_not_fit_are_not_copied(values: dict[str, Any]) -> None:
    assert ByName(nn.Sequential(nn.Linear(2, 2)), values).targets() is None
