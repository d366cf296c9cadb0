"""What a frozen network means for gradients, BatchNorm statistics and module modes."""

import logging

import pytest
import torch
from torch import nn

from finetuning_scheduler.core import PhaseRunner
from finetuning_scheduler.core.thaw import FrozenModulePolicy, frozen_modules, set_trainable


class Block(nn.Module):
    """Linear, BatchNorm and Dropout: parameters, statistics and randomness."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.inner = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.norm(self.linear(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList([Block(), Block()])
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.body:
            x = block(x)
        return self.head(self.dropout(x))


def freeze_body(model: Net) -> None:
    set_trainable(model.parameters(), trainable=False)
    set_trainable(model.head.parameters(), trainable=True)


def in_eval_mode(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if not module.training}


def names_within(model: nn.Module, prefix: str) -> set[str]:
    return {name for name, _ in model.named_modules() if name == prefix or name.startswith(f"{prefix}.")}


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net()


def test_set_trainable_touches_the_given_parameters_only(model: Net) -> None:
    set_trainable([model.head.weight], trainable=False)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["head.weight"]


def test_a_frozen_parameter_loses_its_gradient_and_the_others_keep_theirs(model: Net) -> None:
    model(torch.randn(3, 4)).sum().backward()
    set_trainable([model.head.weight], trainable=False)
    assert model.head.weight.grad is None
    assert model.head.bias.grad is not None


@pytest.mark.parametrize(
    ("trainable", "expected"),
    [
        pytest.param((), {"", "body", "body.0", "body.1", "dropout", "head"}, id="all, with what is inside them"),
        pytest.param(("head.bias",), {"body", "body.0", "body.1"}, id="one trainable parameter spares its module"),
        pytest.param(
            ("body.1.norm.weight", "head.weight"),
            {"body.0", "body.1.linear"},
            id="siblings of a trainable module, nested",
        ),
        pytest.param(
            ("body.0.linear.bias", "body.1.linear.bias", "head.bias"),
            {"body.0.norm", "body.1.norm"},
            id="modules without parameters beside trainable ones are not frozen",
        ),
    ],
)
def test_frozen_modules_are_those_without_a_trainable_parameter(
    model: Net, trainable: tuple[str, ...], expected: set[str]
) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name in trainable
    frozen = frozen_modules(model)
    found = {name for name, module in model.named_modules() if module in frozen}
    assert found == set().union(*(names_within(model, name) if name else {""} for name in expected))


def test_a_module_shared_with_a_trainable_parent_is_frozen_by_its_own_parameters() -> None:
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"one": nn.Sequential(shared), "two": nn.Sequential(shared, nn.Linear(2, 2))})
    set_trainable(shared.parameters(), trainable=False)
    assert frozen_modules(model) == {model["one"], shared}


def test_a_model_without_parameters_has_no_frozen_modules() -> None:
    assert frozen_modules(nn.Sequential(nn.ReLU(), nn.Dropout())) == set()


# --- module modes ----------------------------------------------------------------------------------------------------


def test_train_mode_leaves_modes_and_statistics_alone(model: Net) -> None:
    freeze_body(model)
    model.body[0].inner.eval()
    before = in_eval_mode(model)
    FrozenModulePolicy(model).apply()
    model(torch.randn(3, 4))
    assert in_eval_mode(model) == before
    assert model.body[0].norm.num_batches_tracked == 1


def test_eval_mode_turns_a_frozen_blocks_dropout_off_and_on_again_with_its_thaw(model: Net) -> None:
    freeze_body(model)
    policy = FrozenModulePolicy(model, mode="eval")
    policy.apply()
    assert in_eval_mode(model) == names_within(model, "body")

    set_trainable(model.body[1].parameters(), trainable=True)
    policy.apply()
    assert in_eval_mode(model) == names_within(model, "body.0")


def test_eval_mode_fixes_the_statistics_and_outputs_of_frozen_blocks(model: Net) -> None:
    freeze_body(model)
    FrozenModulePolicy(model, mode="eval").apply()
    x = torch.randn(3, 4)
    assert torch.equal(model.body[1](model.body[0](x)), model.body[1](model.body[0](x)))
    assert model.body[0].norm.num_batches_tracked == 0


def test_eval_mode_is_applied_again_after_the_modes_of_the_whole_model_were_set(model: Net) -> None:
    freeze_body(model)
    policy = FrozenModulePolicy(model, mode="eval")
    policy.apply()
    model.eval()
    policy.apply()
    assert in_eval_mode(model) == names_within(model, "body") | {"", "dropout", "head"}
    model.train()
    policy.apply()
    assert in_eval_mode(model) == names_within(model, "body")


def test_a_module_the_user_keeps_in_eval_mode_stays_there_through_thaw_and_release(model: Net) -> None:
    freeze_body(model)
    kept = [model.body[0].norm, model.dropout]
    for module in kept:
        module.eval()
    policy = FrozenModulePolicy(model, mode="eval")
    policy.apply()
    set_trainable(model.body[0].parameters(), trainable=True)
    policy.apply()
    assert in_eval_mode(model) == names_within(model, "body.1") | {"body.0.norm", "dropout"}
    policy.release()
    assert in_eval_mode(model) == {"body.0.norm", "dropout"}


def test_release_puts_the_switched_modules_back_to_train_mode(model: Net) -> None:
    freeze_body(model)
    policy = FrozenModulePolicy(model, mode="eval")
    policy.apply()
    policy.release()
    assert in_eval_mode(model) == set()


def test_a_thawed_module_is_left_to_the_user(model: Net) -> None:
    freeze_body(model)
    policy = FrozenModulePolicy(model, mode="eval")
    policy.apply()
    set_trainable(model.parameters(), trainable=True)
    policy.apply()
    model.body[0].norm.eval()
    policy.apply()
    policy.release()
    assert in_eval_mode(model) == {"body.0.norm"}


def test_dropout_shared_with_a_trainable_block_stays_in_train_mode() -> None:
    dropout = nn.Dropout(0.5)
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), dropout), nn.Sequential(nn.Linear(2, 2), dropout))
    set_trainable(model[0].parameters(), trainable=False)
    FrozenModulePolicy(model, mode="eval").apply()
    assert not model[0][0].training
    assert dropout.training


# --- BatchNorm statistics --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_paused_statistics_come_back_with_the_layers_first_thawed_parameter(model: Net, mode: str) -> None:
    freeze_body(model)
    policy = FrozenModulePolicy(model, track_running_stats=False, mode=mode)
    policy.apply()
    assert not any(block.norm.track_running_stats for block in model.body)
    model(torch.randn(3, 4))
    assert [int(block.norm.num_batches_tracked) for block in model.body] == [0, 0]

    set_trainable([model.body[1].norm.bias], trainable=True)
    policy.apply()
    model(torch.randn(3, 4))
    assert [int(block.norm.num_batches_tracked) for block in model.body] == [0, 1]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_paused_statistics_come_back_when_the_policy_is_released(model: Net, mode: str) -> None:
    freeze_body(model)
    policy = FrozenModulePolicy(model, track_running_stats=False, mode=mode)
    policy.apply()
    policy.release()
    assert all(block.norm.track_running_stats for block in model.body)
    model(torch.randn(3, 4))
    assert [int(block.norm.num_batches_tracked) for block in model.body] == [1, 1]


def test_statistics_are_tracked_in_frozen_layers_by_default(model: Net) -> None:
    freeze_body(model)
    FrozenModulePolicy(model).apply()
    model(torch.randn(3, 4))
    assert [int(block.norm.num_batches_tracked) for block in model.body] == [1, 1]


def test_a_layer_built_without_statistics_does_not_get_them_when_thawed() -> None:
    norm = nn.BatchNorm1d(4, track_running_stats=False)
    set_trainable(norm.parameters(), trainable=False)
    policy = FrozenModulePolicy(norm, track_running_stats=False)
    policy.apply()
    set_trainable(norm.parameters(), trainable=True)
    policy.apply()
    assert norm.track_running_stats is False


def test_paused_statistics_are_still_used_in_evaluation(model: Net) -> None:
    model(torch.randn(8, 4))
    expected = model.eval()(torch.ones(2, 4))
    freeze_body(model.train())
    FrozenModulePolicy(model, track_running_stats=False).apply()
    assert torch.equal(model.eval()(torch.ones(2, 4)), expected)


class Text(nn.Module):
    """An encoder of padded rows, made with PyTorch's own layers."""

    def __init__(self, nested: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=nested)
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padded = torch.tensor([[False, False, True], [False, False, False]])
        return self.head(self.encoder(x, src_key_padding_mask=padded).mean(dim=1))


def first_failure(model: Text, phases: list[str], mode: str) -> tuple[int | None, list[str]]:
    """Enter phase after phase; return the first one in which the model cannot run, and the warnings before."""
    said: list[str] = []
    runner = PhaseRunner(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        {phase: {"params": [selector]} for phase, selector in enumerate(phases)},
        frozen_modules_mode=mode,
        report=lambda level, text: said.append(text) if level == logging.WARNING else None,
    )
    before = [each for each in said if "NestedTensor" in each]
    for phase in range(len(phases)):
        runner.thaw_to(phase)
        model.train()
        runner.apply_module_modes()
        try:
            model(torch.randn(2, 3, 8)).sum().backward()
        except AssertionError as error:
            expected = "MultiheadAttention does not support NestedTensor" in str(error)
            return phase if expected else -1, before
    return None, before


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize(
    ("phases", "mode", "nested", "failing"),
    [
        (["head.*", r"encoder\.layers\.2\..*", r"encoder\.layers\.[01]\..*"], "eval", True, 1),
        (["head.*", r"encoder\.layers\.[12]\..*"], "eval", True, 1),
        (["head.*", r"encoder\.layers\..*"], "eval", True, None),
        (["head.*", r"encoder\.layers\.0\..*", r"encoder\.layers\.[12]\..*"], "eval", True, None),
        (["head.*", r"encoder\.layers\.2\..*"], "train", True, None),
        (["head.*", r"encoder\.layers\.2\..*"], "eval", False, None),
    ],
)
def test_an_encoder_that_pytorch_cannot_run_in_two_modes_is_told_of(
    phases: list[str], mode: str, nested: bool, failing: int | None
) -> None:
    found, warnings = first_failure(Text(nested), phases, mode)
    assert found == failing
    assert len(warnings) == (failing is not None)
    for warning in warnings:
        assert warning.startswith(f"Phase {failing} keeps the first layer of the nn.TransformerEncoder `encoder`")
        assert "enable_nested_tensor=False" in warning


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_what_the_warning_says_to_set_helps() -> None:
    model = Text()
    model.encoder.use_nested_tensor = False
    assert first_failure(model, ["head.*", r"encoder\.layers\.2\..*"], "eval") == (None, [])
