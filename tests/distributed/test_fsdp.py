"""FSDP's first version: what has to fit together, told before training; weight decay, wrapping, precision."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.distributed.fsdp.wrap import CustomPolicy, ModuleWrapPolicy, size_based_auto_wrap_policy

from tests.reference import cases, harness
from tests.reference.cases import AN_EPOCH_EACH, Classifier, fit
from tests.reference.networks import CLASSIFICATION, HEAD, THIRD
from tests.reference.recipe import adamw, momentum_sgd

FLAT = partial(cases.fsdp, use_orig_params=False, state_dict_type="sharded")


class NoDecay(Classifier):
    no_decay = ("bias", "norm")


class Own(Classifier):
    """Clips gradients by itself, as FSDP can."""

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, *_: Any, **__: Any) -> None:
        self.trainer.strategy.model.clip_grad_norm_(gradient_clip_val)


ONE_UNIT = (
    "expected what FSDP flattens into one tensor to thaw in one phase, got the unit Classifier with "
    "phase 0: network.head.weight, network.head.bias; "
    "phase 1: network.second.weight, network.second.bias, network.third.weight, network.third.bias; "
    "phase 2: network.first.weight, network.first.bias, network.norm.weight, network.norm.bias. "
)


def test_phases_that_share_a_flat_tensor_are_refused_with_the_overrides_that_help(tmp_path: Path) -> None:
    strategy = partial(FLAT, auto_wrap_policy=None)
    message = cases.refused_message(tmp_path, strategy)
    assert message == (
        f"{ONE_UNIT}Fix: Use strategy_adapter_cfg={{'awp_overrides': ['network.second', 'network.third', "
        "'network.head']}."
    )
    adapter = {"awp_overrides": ["network.second", "network.third", "network.head"]}
    expected = cases.on_one_device()
    for epochs in harness.run_ranks(partial(fit, adapter=adapter), 2, tmp_path / "two", 2, strategy):
        assert [epoch.phase for epoch in epochs] == [0, 1, 2]
        for one, other in zip(epochs, expected, strict=True):
            cases.assert_same_weights(one, other)


def test_parameters_in_no_phase_are_named_too(tmp_path: Path) -> None:
    message = cases.refused_message(tmp_path, partial(FLAT, auto_wrap_policy=None), schedule={0: {"params": [*HEAD]}})
    assert "phase 0: network.head.weight, network.head.bias; no phase: network.first.weight," in message
    assert message.endswith("Fix: Use strategy_adapter_cfg={'awp_overrides': ['network.head']}.")


def test_phases_beyond_the_deepest_one_do_not_count(tmp_path: Path) -> None:
    schedule = {0: {"params": [*HEAD], "max_transition_epoch": 1}, 1: {"params": [THIRD[0]]}, 2: {"params": [THIRD[1]]}}
    for epochs in harness.run_ranks(partial(fit, schedule=schedule, max_depth=0), 2, tmp_path, 2, FLAT):
        assert [epoch.phase for epoch in epochs] == [0]


def test_a_layer_whose_own_parameters_thaw_apart_needs_original_parameters(tmp_path: Path) -> None:
    schedule = {0: {"params": [HEAD[0]], "max_transition_epoch": 1}, 1: {"params": [HEAD[1]], "lr": 0.01}}
    message = cases.refused_message(tmp_path, FLAT, schedule=schedule)
    assert message == (
        "expected what FSDP flattens into one tensor to thaw in one phase, got the unit network.head with "
        "phase 0: network.head.bias; phase 1: network.head.weight. Fix: Give each module's own parameters one phase, "
        "or use FSDPStrategy(use_orig_params=True)."
    )


def test_units_made_by_the_module_are_to_be_taken_apart_there(tmp_path: Path) -> None:
    message = cases.refused_message(tmp_path, partial(cases.FSDPOnCPU, use_orig_params=False), module=OneUnit)
    assert "got the unit network with phase 0: network.head.weight" in message
    assert message.endswith(
        "Fix: Wrap these modules too in `configure_model`: network.second, network.third, network.head."
    )


class OneUnit(Classifier):
    def configure_model(self) -> None:
        options = {"device_id": torch.device("cpu"), "use_orig_params": False}
        self.network = FullyShardedDataParallel(self.network, **options)


@pytest.mark.quick
def test_no_decay_is_right_with_original_parameters_and_refused_without(tmp_path: Path) -> None:
    decaying = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.3)
    options = {"module": NoDecay, "optimizer": decaying}
    expected = cases.on_one_device(optimizer=decaying, no_decay=NoDecay.no_decay)
    for epochs in harness.run_ranks(partial(fit, **options), 2, tmp_path / "two", 2, cases.fsdp):
        assert [len(epoch.groups) for epoch in epochs] == [2, 4, 6]
        cases.assert_same_epochs(epochs, expected)
    message = cases.refused_message(tmp_path, FLAT, **options)
    assert message == (
        "expected no `no_decay` list with FSDP's use_orig_params=False, which merges parameters, got one. "
        "Fix: Use FSDPStrategy(use_orig_params=True), or drop the module's `no_decay`."
    )


class HeadOutside(Classifier):
    """The head is in no unit."""

    def configure_model(self) -> None:
        for name, layer in self.network.named_children():
            if name != "head":
                setattr(self.network, name, FullyShardedDataParallel(layer, device_id=torch.device("cpu")))


def test_parameters_in_no_unit_are_refused(tmp_path: Path) -> None:
    assert cases.refused_message(tmp_path, cases.FSDPOnCPU, module=HeadOutside) == (
        "expected every parameter to thaw in a module that FSDP wraps, got network.head.bias, network.head.weight. "
        "Fix: Wrap the module that holds them too, and do not let FSDP ignore it."
    )


def test_learning_rates_by_block_need_a_unit_for_each_block(tmp_path: Path) -> None:
    below = ["network.(first|second|third|norm).*"]
    schedule = {0: {"params": [*HEAD], "max_transition_epoch": 1}, 1: {"params": below, "lr": 0.01, "lr_decay": 0.5}}
    strategy, adapter = partial(FLAT, auto_wrap_policy=None), {"awp_overrides": ["network.head"]}
    assert cases.refused_message(tmp_path, strategy, schedule=schedule, adapter=adapter) == (
        "expected a unit for each block, since `lr_decay` gives each a learning rate of its own, got the unit "
        "Classifier over several. Fix: Add the blocks to `awp_overrides`, or use_orig_params=True."
    )


def test_an_optimizer_without_state_trains_where_nothing_is_saved(tmp_path: Path) -> None:
    plain = partial(torch.optim.SGD, lr=0.1)
    expected = cases.on_one_device(optimizer=plain)
    for epochs in harness.run_ranks(partial(fit, optimizer=plain), 2, tmp_path, 2, cases.fsdp):
        cases.assert_same_epochs(epochs, expected)


@pytest.mark.parametrize("sharding", ["SHARD_GRAD_OP", "NO_SHARD"])
@pytest.mark.parametrize("strategy", [cases.fsdp, FLAT], ids=["original", "flat"])
def test_other_sharding_strategies_train_the_same(strategy: Any, sharding: str, tmp_path: Path) -> None:
    expected = cases.on_one_device()
    for epochs in harness.run_ranks(fit, 2, tmp_path, 2, partial(strategy, sharding_strategy=sharding)):
        cases.assert_same_epochs(epochs, expected)


def test_full_checkpoints_of_flattened_parameters_are_refused(tmp_path: Path) -> None:
    strategy = partial(cases.fsdp, use_orig_params=False)
    assert cases.refused_message(tmp_path, strategy, enable_checkpointing=True) == (
        "expected sharded checkpoints with FSDP's use_orig_params=False, since PyTorch cannot save the optimizer "
        'whole, got state_dict_type="full". Fix: Use FSDPStrategy(state_dict_type="sharded").'
    )


def test_everything_that_is_wrong_comes_in_one_report(tmp_path: Path) -> None:
    strategy = partial(FLAT, auto_wrap_policy=None)
    plain = partial(torch.optim.SGD, lr=0.1)
    options = {"gradient_clip_val": 1.0, "enable_checkpointing": True}
    message = cases.refused_message(tmp_path, strategy, module=NoDecay, optimizer=plain, **options)
    assert message.startswith("4 problems found:\n1. expected an optimizer that keeps state")
    assert "\n2. expected gradients clipped by value, the only way in Lightning's FSDPStrategy, got by norm" in message
    assert "\n3. expected no `no_decay` list" in message
    assert f"\n4. {ONE_UNIT.replace('unit Classifier', 'unit NoDecay')}" in message


@pytest.mark.parametrize(
    ("options", "alone"),
    [({"gradient_clip_algorithm": "value"}, {"clip_value": 0.05}), ({"module": Own}, {"clip_norm": 0.05})],
    ids=["value", "by itself"],
)
def test_gradients_can_be_clipped(options: dict[str, Any], alone: dict[str, float], tmp_path: Path) -> None:
    expected = cases.on_one_device(**alone)
    clipped = partial(fit, gradient_clip_val=0.05, **options)
    for epochs in harness.run_ranks(clipped, 2, tmp_path, 2, cases.fsdp):
        cases.assert_same_epochs(epochs, expected)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["network.nrm"], "selector 'network.nrm': expected `awp_overrides` to match a module, got no match. Fix: Did"),
        (["("], "selector '(': expected a module's name or a regular expression in `awp_overrides`, got an invalid"),
        ("network.head", "does not take `strategy_adapter_cfg` {'awp_overrides': 'network.head'}: expected"),
    ],
)
def test_overrides_that_select_nothing_are_refused(overrides: Any, problem: str, tmp_path: Path) -> None:
    assert problem in cases.refused_message(tmp_path, cases.fsdp, adapter={"awp_overrides": overrides})


def test_overrides_are_refused_where_the_module_wraps_itself(tmp_path: Path) -> None:
    options = {"module": cases.WrappedByItself, "adapter": {"awp_overrides": ["network.head"]}}
    assert cases.refused_message(tmp_path, cases.FSDPOnCPU, **options) == (
        "expected `awp_overrides` with a model that FSDP wraps, got one wrapped in `configure_model`. "
        "Fix: Drop `awp_overrides` and wrap those modules there too."
    )


POLICIES: dict[str, tuple[Any, list[str]]] = {
    "none": (None, ["", "network.head", "network.norm"]),
    "classes": ({nn.LayerNorm}, ["", "network.head", "network.norm"]),
    "module": (ModuleWrapPolicy({nn.Linear}), ["network.first", "network.head", "network.norm", "network.second"]),
    "size": (partial(size_based_auto_wrap_policy, min_num_params=200), ["network.head", "network.norm"]),
    "custom": ("custom", ["network.first", "network.head", "network.norm"]),
}


@pytest.mark.parametrize("kind", POLICIES)
def test_overrides_add_to_any_kind_of_policy_and_leave_the_users_as_it_was(kind: str, tmp_path: Path) -> None:
    policy, expected = POLICIES[kind]
    for units, untouched in harness.run_ranks(units_with_overrides, 2, tmp_path, policy):
        assert set(expected) <= set(units)
        assert untouched


def units_with_overrides(root: Path, policy: Any) -> tuple[list[str], bool]:
    from finetuning_scheduler import FinetuningScheduler

    policy = CustomPolicy(is_first) if policy == "custom" else policy
    strategy = cases.fsdp(auto_wrap_policy=policy)
    before = dict(strategy.kwargs)
    units: list[str] = []

    class Look(cases.pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            modules = trainer.strategy.model.named_modules()
            units.extend(cases.plain_name(n) for n, m in modules if isinstance(m, FullyShardedDataParallel))

    adapter = {"awp_overrides": ["network.(head|norm)"]}
    scheduler = FinetuningScheduler(AN_EPOCH_EACH, restore_best=False, strategy_adapter_cfg=adapter)
    trainer = cases.make_trainer(root, 2, strategy, callbacks=[scheduler, Look()], max_epochs=1)
    trainer.fit(Classifier(adamw))
    # A unit's name ends in the name of the module that it wraps.
    return sorted({unit.rstrip(".") for unit in units}), strategy.kwargs == before


def policy_after_a_failure(root: Path) -> bool:
    from finetuning_scheduler import FinetuningScheduler

    strategy = cases.fsdp()
    before = strategy.kwargs["auto_wrap_policy"]
    adapter = {"awp_overrides": ["network.head"]}
    scheduler = FinetuningScheduler(AN_EPOCH_EACH, restore_best=False, strategy_adapter_cfg=adapter)
    module = Failing(adamw)
    with pytest.raises(ValueError, match="no optimizer today"):
        cases.make_trainer(root, 2, strategy, callbacks=[scheduler]).fit(module)
    return strategy.kwargs["auto_wrap_policy"] is before and "configure_model" not in vars(module)


class Failing(Classifier):
    def configure_optimizers(self) -> Any:
        raise ValueError("no optimizer today")


def test_a_fit_that_fails_while_it_is_set_up_leaves_nothing_behind(tmp_path: Path) -> None:
    assert harness.run_ranks(policy_after_a_failure, 2, tmp_path) == [True, True]


def is_first(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module.in_features == CLASSIFICATION.features


def test_the_default_schedule_has_the_names_from_before_wrapping(tmp_path: Path) -> None:
    for name, strategy in {"one": "auto", "two": cases.fsdp, "flat": FLAT}.items():
        harness.run_ranks(generate_only, 1 if name == "one" else 2, tmp_path / name, strategy)
    expected = (tmp_path / "one" / "Classifier_ft_schedule.yaml").read_text()
    assert "network.head.weight" in expected
    assert "% of the model" in expected
    for name in ("two", "flat"):
        assert (tmp_path / name / "Classifier_ft_schedule.yaml").read_text() == expected


def generate_only(root: Path, strategy: Any) -> None:
    from finetuning_scheduler import FinetuningScheduler

    scheduler = FinetuningScheduler(gen_ft_sched_only=True, log_dir=root)
    strategy = strategy if isinstance(strategy, str) else strategy()
    with pytest.raises(SystemExit):
        cases.make_trainer(root, harness.world_size(), strategy, callbacks=[scheduler]).fit(Classifier(adamw))


def test_mixed_precision_reduces_in_full_precision_in_every_phase(tmp_path: Path) -> None:
    """Compare with one device that computes gradients in bfloat16, rank by rank, and averages them in float32."""
    precision = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    expected = cases.MixedPrecisionLoop(cases.recipe_of(optimizer=momentum_sgd)).run().epochs
    strategy = partial(cases.fsdp, mixed_precision=precision)
    for epochs in harness.run_ranks(partial(fit, optimizer=momentum_sgd), 2, tmp_path, 2, strategy):
        assert [epoch.phase for epoch in epochs] == [0, 1, 2]
        for one, other in zip(epochs, expected, strict=True):
            cases.assert_same_weights(one, other)
