"""A model's parameters by the names they have without wrappers, each alone or merged with others into one tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.optim import SGD

from finetuning_scheduler.core import PhaseRunner, Schedule
from finetuning_scheduler.core.schedule.generate import generate, phase_comments
from finetuning_scheduler.core.view import ModelView, plain_name, sparse_parameters

BATCHES = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(1)).unbind()
PHASES = {0: {"params": ["head.*"], "max_transition_epoch": 1}, 1: {"params": ["blocks.*"], "lr": 0.05}}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(2)])
        self.head = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def build() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Net()


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": compiled,
    "checkpointed": checkpoint_wrapper,
    "off-loaded": lambda module: offload_wrapper(checkpoint_wrapper(module)),
}


@pytest.fixture(params=WRAPPERS)
def wrapped(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    model = build()
    model.blocks[1] = WRAPPERS[request.param](model.blocks[1])
    yield model
    torch.compiler.reset()


def test_names_leave_wrappers_out() -> None:
    assert plain_name("_fsdp_wrapped_module.net._fsdp_wrapped_module.0._checkpoint_wrapped_module.bias") == "net.0.bias"
    assert plain_name("_orig_mod.net.0.bias") == "net.0.bias"
    assert plain_name("net.0.bias") == "net.0.bias"


def test_a_model_without_wrappers_is_its_own_structure() -> None:
    model = build()
    assert ModelView.of(model).plain is model
    assert ModelView.of(model).tensors == dict(model.named_parameters())


def test_wrapped_modules_keep_names_order_kinds_and_sizes(wrapped: nn.Module) -> None:
    view, model = ModelView.of(wrapped), build()
    assert list(view.tensors) == [name for name, _ in model.named_parameters()]
    assert view.sizes == {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert all(any(tensor is p for p in wrapped.parameters()) for tensor in view.tensors.values())
    assert type(view.plain).__name__ == "Net"
    assert not any(parameter.device.type != "meta" for parameter in view.plain.parameters())
    for heuristic in ("pairs", "blocks"):
        schedule = generate(model, heuristic)
        assert generate(view.plain, heuristic) == schedule
        assert phase_comments(schedule, view.plain) == phase_comments(schedule, model)


def test_a_whole_compiled_model_is_seen_through() -> None:
    view = ModelView.of(compiled(build()))
    assert type(view.plain).__name__ == "Net"
    assert list(view.tensors) == [name for name, _ in build().named_parameters()]


def test_other_names_of_tied_parameters_stay_known(wrapped: nn.Module) -> None:
    wrapped.twin = wrapped.head
    wrapped.again = nn.Linear(3, 1)
    wrapped.again.weight = wrapped.head.weight
    expected = [name for name, _ in wrapped.named_parameters(remove_duplicate=False)]
    plain = ModelView.of(wrapped).plain
    assert [n for n, _ in plain.named_parameters(remove_duplicate=False)] == [plain_name(name) for name in expected]
    assert plain.again.weight is plain.head.weight is plain.twin.weight


class Counter(nn.Module):
    """Needs what its constructor sets, even to be hashed, as torchmetrics' metrics do."""

    def __init__(self) -> None:
        super().__init__()
        self.state = {"count": 0}

    def __hash__(self) -> int:
        return hash(tuple(self.state))


class Delegating(nn.Module):
    """Looks up in another module what it does not have."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)


def test_modules_that_need_their_constructor_are_copied_too(wrapped: nn.Module) -> None:
    wrapped.counter = Counter()
    wrapped.outer = Delegating(nn.Linear(2, 2))
    wrapped.sparse = nn.Embedding(3, 2, sparse=True)
    view = ModelView.of(wrapped)
    assert "outer.inner.weight" in view.tensors
    assert view.sizes["sparse.weight"] == 6
    assert sparse_parameters(view.plain) == {"sparse.weight"}


def train(model: nn.Module | ModelView, module: nn.Module, schedule: object = PHASES) -> PhaseRunner:
    optimizer = SGD(module.parameters(), lr=0.1, momentum=0.9)
    runner = PhaseRunner(model, optimizer, schedule)
    for epoch in range(3):
        for batch in BATCHES:
            optimizer.zero_grad()
            module(batch).square().mean().backward()
            optimizer.step()
            runner.step()
        runner.epoch_end(metric=[1.0, 2.0, 3.0][epoch])
    return runner


# The compiler looks at the gradient of what it is given.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_wrapped_model_trains_and_is_restored_like_any_other(wrapped: nn.Module) -> None:
    model = build()
    train(model, model)
    runner = train(wrapped, wrapped)
    assert runner.phase == 1
    for name, tensor in runner.parameters.items():
        assert torch.equal(tensor, model.get_parameter(name)), name


class Flat(nn.Module):
    """`Net` with each block's weight and bias in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        net = build()
        self.flats = nn.ParameterList([nn.utils.parameters_to_vector(block.parameters()) for block in net.blocks])
        self.head = net.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for flat in self.flats:
            x = torch.tanh(nn.functional.linear(x, flat[:9].view(3, 3), flat[9:]))
        return self.head(x)

    def view(self) -> ModelView:
        tensors = {
            f"blocks.{index}.0.{name}": flat for index, flat in enumerate(self.flats) for name in ("weight", "bias")
        }
        return ModelView(self, build(), tensors | {"head.weight": self.head.weight, "head.bias": self.head.bias})


def test_merged_parameters_train_as_one_tensor_and_are_saved_under_all_their_names() -> None:
    model, flat = build(), Flat()
    train(model, model)
    runner = train(flat.view(), flat)
    for block, tensor in zip(model.blocks, flat.flats, strict=True):
        torch.testing.assert_close(tensor, nn.utils.parameters_to_vector(block.parameters()), rtol=0, atol=1e-6)
    assert runner.state_dict()["parameter_groups"] == [
        ["head.weight", "head.bias"],
        ["blocks.0.0.weight", "blocks.0.0.bias", "blocks.1.0.weight", "blocks.1.0.bias"],
    ]
    assert [len(group["params"]) for group in runner.optimizer.param_groups] == [2, 2]
    assert runner.plan.phases[1].trainable_count == sum(parameter.numel() for parameter in model.parameters())
    assert runner.schedule.phases[1].params == tuple(name for name, _ in model.blocks.named_parameters("blocks"))


def test_progress_passes_between_merged_and_separate_parameters() -> None:
    model, flat = build(), Flat()
    merged = train(flat.view(), flat).state_dict()
    separate = train(model, model).state_dict()
    for state in (merged, separate):
        for view, module in ((flat.view(), flat), (ModelView.of(model), model)):
            runner = PhaseRunner(view, SGD(module.parameters(), lr=0.1, momentum=0.9), PHASES)
            runner.load_state_dict(copy.deepcopy(state) | {"loop": {**state["loop"], "snapshot": None}})
            assert runner.phase == 1
            assert runner.state_dict()["parameter_groups"] == state["parameter_groups"]


def test_a_schedule_of_merged_parameters_names_each_tensor_once() -> None:
    schedule = Schedule.parse({0: {"params": ["head.weight", "head.bias"]}, 1: {"params": ["blocks.0.0.bias"]}})
    view = Flat().view()
    assert list(view.trained) == ["blocks.0.0.weight", "blocks.1.0.weight", "head.weight", "head.bias"]
    assert view.sizes["blocks.0.0.weight"] == 12
    assert [phase.params for phase in view.merged_schedule(schedule).phases] == [("head.weight", "head.bias"), ()]
    assert view.merged(["blocks.1.0.bias", "head.bias", "unknown"]) == ["head.bias", "unknown"]
    assert view.expanded(["blocks.1.0.weight", "unknown"]) == ["blocks.1.0.weight", "blocks.1.0.bias", "unknown"]
