"""FSDP2 and tensor parallel: plans, plain tensors among distributed ones, precision, what is told before training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

from tests.reference import cases, harness
from tests.reference.cases import AN_EPOCH_EACH, Classifier, fit
from tests.reference.networks import FIRST, HEAD, NORM, SECOND, THIRD, Share
from tests.reference.recipe import adamw, momentum_sgd

LAYERS = "network.(first|norm|second|third|head)"
BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def foreach_adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, foreach=True)


# --- precision -------------------------------------------------------------------------------------------------------


class LowPrecision(Classifier):
    """FSDP2 in bfloat16, gradients reduced in float32; every layer and the whole are units."""

    def configure_model(self) -> None:
        for part in (*self.network.children(), self.network):
            fully_shard(part, mesh=self.device_mesh["data_parallel"], mp_policy=BFLOAT16)


class LowPrecisionInOne(Classifier):
    def configure_model(self) -> None:
        fully_shard(self.network, mesh=self.device_mesh["data_parallel"], mp_policy=BFLOAT16)


PLAN_IN_BFLOAT16 = {"fsdp_plan": {LAYERS: None, "network": None}, "fsdp_default_kwargs": {"mp_policy": BFLOAT16}}
IN_WORDS = {"param_dtype": "bfloat16", "reduce_dtype": "torch.float32"}  # as a configuration file has it


@pytest.mark.parametrize(
    ("module", "adapter"),
    [
        (LowPrecision, None),
        (LowPrecisionInOne, None),
        (Classifier, PLAN_IN_BFLOAT16),
        (Classifier, {**PLAN_IN_BFLOAT16, "fsdp_default_kwargs": {"mp_policy": IN_WORDS}}),
    ],
    ids=["layers", "one unit", "plan", "plan in words"],
)
def test_layers_frozen_at_the_first_forward_pass_reduce_gradients_in_full_precision(
    module: type[Classifier], adapter: Any, tmp_path: Path
) -> None:
    """Compare with one device that computes gradients in bfloat16, rank by rank, and averages them in float32."""
    expected = cases.MixedPrecisionLoop(cases.recipe_of(optimizer=momentum_sgd)).run().epochs
    run = partial(fit, module=module, adapter=adapter, optimizer=momentum_sgd)
    for epochs in harness.run_ranks(run, 2, tmp_path, 2, cases.fsdp2):
        assert [epoch.phase for epoch in epochs] == [0, 1, 2]
        for one, other in zip(epochs, expected, strict=True):
            cases.assert_same_weights(one, other)


# --- plain and distributed tensors -----------------------------------------------------------------------------------

MIXED_FROM_THE_START = {
    0: {"params": [*HEAD, *THIRD], "max_transition_epoch": 1},
    1: {"params": [*NORM, *SECOND, *FIRST], "lr": 0.01, "max_transition_epoch": 3},
}
MIXED_LATER = {
    0: {"params": [*HEAD], "max_transition_epoch": 1},
    1: {"params": [*THIRD, *NORM, *SECOND, *FIRST], "lr": 0.01, "max_transition_epoch": 3},
}


@pytest.mark.parametrize(
    ("schedule", "groups"), [(MIXED_FROM_THE_START, [2, 4, 4]), (MIXED_LATER, [1, 3, 3])], ids=["phase 0", "phase 1"]
)
def test_plain_and_distributed_tensors_get_groups_of_their_own(
    schedule: dict[int, dict[str, Any]], groups: list[int], tmp_path: Path
) -> None:
    expected = cases.on_one_device(schedule, optimizer=foreach_adamw)
    run = partial(fit, schedule=schedule, optimizer=foreach_adamw, module=cases.TensorParallel)
    for epochs in harness.run_ranks(run, 2, tmp_path, 2, cases.tensor_parallel):
        assert [len(epoch.groups) for epoch in epochs] == groups
        for one, other in zip(epochs, expected, strict=True):
            cases.assert_same_weights(one, other)


class ClipsByItself(cases.TensorParallel):
    """As the documentation shows it: plain and distributed gradients, by the norm of all."""

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, *_: Any, **__: Any) -> None:
        for group in optimizer.param_groups:
            nn.utils.clip_grad_value_(group["params"], gradient_clip_val)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_that_pytorch_cannot_do_is_refused(algorithm: str, tmp_path: Path) -> None:
    options = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": algorithm}
    message = cases.refused_message(tmp_path, cases.tensor_parallel, module=cases.TensorParallel, **options)
    assert message == (
        "expected gradients that can be clipped together, got those of plain tensors or of several meshes beside "
        "distributed ones. Fix: Override `configure_gradient_clipping`, or parallelise the modules that hold plain "
        "tensors too."
    )


def test_gradients_can_be_clipped_group_by_group(tmp_path: Path) -> None:
    options = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"}
    expected = cases.on_one_device(clip_value=0.05)
    run = partial(fit, module=ClipsByItself, **options)
    for epochs in harness.run_ranks(run, 2, tmp_path, 2, cases.tensor_parallel):
        for one, other in zip(epochs, expected, strict=True):
            cases.assert_same_weights(one, other)


def test_gradients_that_are_all_distributed_can_be_clipped(tmp_path: Path) -> None:
    expected = cases.on_one_device(clip_norm=0.05)
    run = partial(fit, module=cases.Sharded, gradient_clip_val=0.05)
    for epochs in harness.run_ranks(run, 2, tmp_path, 2, cases.fsdp2):
        cases.assert_same_epochs(epochs, expected)


# --- checkpoints -----------------------------------------------------------------------------------------------------


class SaveBeforeTheFirstStep(cases.pl.Callback):
    """Saves when a phase's parameters are thawed and have no optimizer state yet. List it after the scheduler."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0 and not (self.root / f"{trainer.current_epoch}.ckpt").exists():
            trainer.strategy.barrier()
            trainer.save_checkpoint(self.root / f"{trainer.current_epoch}.ckpt")


FRESH: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": cases.ddp},
    "fsdp": {"strategy": cases.fsdp},
    "fsdp, sharded checkpoints": {"strategy": partial(cases.fsdp, state_dict_type="sharded")},
    "fsdp2": {"strategy": cases.fsdp2, "module": cases.Sharded},
    "fsdp2, full checkpoints": {
        "strategy": partial(cases.fsdp2, save_distributed_checkpoint=False),
        "module": cases.Sharded,
    },
    "fsdp2, plain SGD": {
        "strategy": cases.fsdp2,
        "module": cases.Sharded,
        "optimizer": partial(torch.optim.SGD, lr=0.01),
    },
    "tensor parallel": {"strategy": cases.tensor_parallel, "module": cases.TensorParallel},
}


@pytest.mark.parametrize("name", FRESH)
def test_a_checkpoint_between_a_thaw_and_its_first_step_resumes(name: str, tmp_path: Path) -> None:
    run = partial(fit, tmp_path, 2, **FRESH[name], extra=SaveBeforeTheFirstStep)
    (whole, _) = harness.run_ranks(run, 2)
    for epoch in (1, 2):
        path = str(tmp_path / f"{epoch}.ckpt")
        for epochs in harness.run_ranks(partial(run, resume_from=path), 2):
            cases.assert_same_epochs(epochs, whole[epoch:], tolerance=0)


class Scaled(torch.optim.AdamW):
    """Keeps an attribute of its own that its step needs."""

    def __init__(self, parameters: Any, scale: float) -> None:
        super().__init__(parameters, lr=0.01)
        self.scale = scale

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(self.scale)
        return super().step(closure)


def test_an_optimizer_with_attributes_of_its_own_resumes(tmp_path: Path) -> None:
    options = {"strategy": cases.fsdp2, "module": cases.Sharded, "optimizer": partial(Scaled, scale=0.5)}
    run = partial(fit, tmp_path, 2, **options, extra=SaveBeforeTheFirstStep)
    (whole, _) = harness.run_ranks(run, 2)
    for epochs in harness.run_ranks(partial(run, resume_from=str(tmp_path / "2.ckpt")), 2):
        cases.assert_same_epochs(epochs, whole[2:], tolerance=0)


def fit_twice(root: Path, strategy: Callable[[], Any], again_from: str | None) -> list[tuple[int, int]]:
    """Fit, then fit once more with the same trainer: from a checkpoint, or on from where the first fit ended."""
    from finetuning_scheduler import FinetuningScheduler

    adapter = {cases.fsdp2: PLAN, cases.fsdp: {"awp_overrides": ["network.head"]}}.get(strategy)
    scheduler = FinetuningScheduler(AN_EPOCH_EACH, restore_best=False, strategy_adapter_cfg=adapter)
    recorder = cases.Recorder(lambda: scheduler.curr_depth)
    callbacks = [scheduler, recorder, SaveBeforeTheFirstStep(root)]
    trainer = cases.make_trainer(root, 2, strategy(), callbacks=callbacks)
    module = Classifier(adamw)
    trainer.fit(module)
    recorder.epochs.clear()
    trainer.fit_loop.max_epochs = 7
    trainer.fit(module, ckpt_path=again_from)
    return [(epoch.number, epoch.phase) for epoch in recorder.epochs]


class Remembering(Classifier):
    """Its hyper-parameters hold a function, which a checkpoint gives back only if anything may be loaded."""

    def __init__(self, optimizer: Callable[[Any], Any]) -> None:
        super().__init__(optimizer)
        self.save_hyperparameters()


def resume_with_a_foreign_object(root: Path) -> str:
    options: dict[str, Any] = {"strategy": cases.fsdp2, "module": Remembering, "adapter": PLAN}
    fit(root, 2, **options, extra=SaveBeforeTheFirstStep)
    return cases.refused(root, 2, **options, resume_from=str(root / "1.ckpt"))


def test_a_checkpoint_that_cannot_be_loaded_is_named_with_the_fix(tmp_path: Path) -> None:
    for message in harness.run_ranks(resume_with_a_foreign_object, 2, tmp_path):
        assert message.startswith(f"expected a checkpoint to resume from, got {tmp_path / '1.ckpt'} (UnpicklingError: ")
        assert message.endswith("Fix: Keep other objects than tensors and plain values out of `save_hyperparameters`.")


@pytest.mark.parametrize("strategy", [cases.ddp, cases.fsdp, cases.fsdp2], ids=["ddp", "fsdp", "fsdp2"])
def test_a_trainer_that_has_fitted_fits_again_from_a_checkpoint_of_an_earlier_phase(
    strategy: Callable[[], Any], tmp_path: Path
) -> None:
    for epochs in harness.run_ranks(fit_twice, 2, tmp_path, strategy, str(tmp_path / "1.ckpt")):
        assert epochs == [(1, 1), (2, 2)]


# --- plans -----------------------------------------------------------------------------------------------------------


def units(root: Path, module: type[Classifier], adapter: dict[str, Any]) -> dict[str, bool]:
    """Tell for each sharded module whether it is wrapped for activation checkpointing."""
    from finetuning_scheduler import FinetuningScheduler

    seen: dict[str, bool] = {}

    class Look(cases.pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            for name, part in pl_module.named_modules():
                if isinstance(part, FSDPModule):
                    seen[cases.plain_name(name)] = isinstance(part, CheckpointWrapper)

    scheduler = FinetuningScheduler(AN_EPOCH_EACH, restore_best=False, strategy_adapter_cfg=adapter)
    trainer = cases.make_trainer(root, 2, cases.fsdp2(), callbacks=[scheduler, Look()], max_epochs=1)
    trainer.fit(module(adamw))
    assert "configure_model" not in vars(trainer.lightning_module)
    return seen


def test_a_plan_shards_what_is_not_sharded_yet_and_the_first_entry_of_a_module_counts(tmp_path: Path) -> None:
    adapter = {
        "fsdp_plan": {
            "network.norm": {"act_ckpt": None},
            LAYERS: {"reshard_after_forward": True},
            "network": None,
        },
        "fsdp_default_kwargs": {"act_ckpt": "wrapped"},
    }
    for seen in harness.run_ranks(units, 2, tmp_path, cases.HalfSharded, adapter):
        assert seen == {
            "network": True,
            "network.first": True,
            "network.norm": False,  # by its own entry
            "network.second": False,  # sharded by the module
            "network.third": True,
            "network.head": False,
        }


PLAN = {"fsdp_plan": {LAYERS: None, "network": None}}


def validated(root: Path, strategy: Callable[[], Any]) -> tuple[float, float, bool]:
    from finetuning_scheduler import FinetuningScheduler

    plan = PLAN if strategy is cases.fsdp2 else None
    scheduler = FinetuningScheduler(AN_EPOCH_EACH, restore_best=False, strategy_adapter_cfg=plan)
    trainer = cases.make_trainer(root, 2, strategy(), callbacks=[scheduler])
    module = Classifier(adamw)
    (before,) = trainer.validate(module)
    trainer.fit(module)
    (after,) = trainer.validate(module)
    return before["val_loss"], after["val_loss"], "configure_model" in vars(module)


def test_a_plan_is_carried_out_for_validation_too(tmp_path: Path) -> None:
    (expected_before, expected_after, _), _ = harness.run_ranks(validated, 2, tmp_path, cases.ddp)
    for before, after, is_hooked in harness.run_ranks(validated, 2, tmp_path, cases.fsdp2):
        assert before == pytest.approx(expected_before, abs=1e-5)
        assert after == pytest.approx(expected_after, abs=1e-5)
        assert not is_hooked


class WholeModule(Classifier):
    """Shards the LightningModule itself."""

    def configure_model(self) -> None:
        fully_shard(self, mesh=self.device_mesh["data_parallel"])


def test_what_lies_in_a_sharded_lightning_module_is_left_alone(tmp_path: Path) -> None:
    for seen in harness.run_ranks(units, 2, tmp_path, WholeModule, PLAN):
        assert seen == {"": False}


def test_everything_that_is_wrong_with_a_plan_comes_in_one_report(tmp_path: Path) -> None:
    plan = {
        "network.first": {"reshard_after_forwards": True, "act_ckpt": "yes"},
        "network.(second|third)": {"cpu_offload_policy": {"pin": True}, "offload_policy": CPUOffloadPolicy()},
        "network.norm": {"mp_policy": "bfloat16"},
        "network.frist": None,
    }
    assert cases.refused_message(tmp_path, cases.fsdp2, adapter={"fsdp_plan": plan}).splitlines() == [
        "6 problems found:",
        "1. expected `fsdp_plan` for 'network.first' to hold arguments of `fully_shard`, got 'reshard_after_forwards'. "
        "Fix: Did you mean `reshard_after_forward`?",
        "2. expected `act_ckpt` of `fsdp_plan` for 'network.first' to be one of composable, wrapped, wrapped_offload, "
        "alone or in a list with a mapping of its arguments, got 'yes'. Fix: Leave it out for no activation "
        "checkpointing.",
        "3. expected one of `offload_policy` and `cpu_offload_policy` in `fsdp_plan` for 'network.(second|third)', "
        "got both. Fix: Keep one of them.",
        "4. expected `cpu_offload_policy` of `fsdp_plan` for 'network.(second|third)' to be True or arguments of "
        "CPUOffloadPolicy (CPUOffloadPolicy.__init__() got an unexpected keyword argument 'pin'). "
        "Fix: Write, for example, {pin_memory: false}.",
        "5. expected `mp_policy` of `fsdp_plan` for 'network.norm' to be a MixedPrecisionPolicy or arguments of one "
        "(got 'bfloat16'). Fix: Write, for example, {param_dtype: bfloat16, reduce_dtype: float32}.",
        "6. selector 'network.frist': expected `fsdp_plan` to match a module, got no match. "
        "Fix: Did you mean `network.first` or `network.norm` or `network`?",
    ]


class Listed(Classifier):
    def __init__(self, optimizer: Callable[[Any], Any]) -> None:
        super().__init__(optimizer)
        self.unused = nn.ModuleList([nn.Linear(2, 2)])


@pytest.mark.parametrize(
    ("adapter", "problem"),
    [
        (
            {"fsdp_plan": {"network": None, "network.head": None}},
            "selector 'network.head': expected `fsdp_plan` to shard inner modules first, got network.head after "
            "network. Fix: Put 'network.head' before 'network'.",
        ),
        (
            {"fsdp_plan": {"network.(first|norm)": None}},
            "expected every parameter to thaw in a module that `fully_shard` has sharded, since 2 data-parallel ranks "
            "share out the data, got network.head.bias, network.head.weight, network.third.bias, network.third.weight, "
            "network.second.bias, network.second.weight. Fix: Shard the module that holds them, in `configure_model` "
            "or by `fsdp_plan`.",
        ),
        (
            {"fsdp_plan": {"unused": None}},
            "selector 'unused': expected `fsdp_plan` to select modules with a forward pass, got unused. "
            "Fix: Select the modules inside, such as 'unused.*'.",
        ),
        (
            {"fsdp_default_kwargs": {"mesh_": None}},
            "expected `fsdp_default_kwargs` to hold arguments of `fully_shard`, got 'mesh_'. Fix: Did you mean `mesh`?",
        ),
        (
            {"fsdp_plan": ["network"]},
            "ModelParallelStrategyAdapter does not take `strategy_adapter_cfg` {'fsdp_plan': ['network']}: expected "
            "`fsdp_plan` to be a mapping, got ['network']. Fix: Correct `strategy_adapter_cfg`.",
        ),
    ],
    ids=["order", "incomplete", "container", "defaults", "list"],
)
def test_a_plan_that_cannot_be_carried_out_is_refused(adapter: dict[str, Any], problem: str, tmp_path: Path) -> None:
    assert cases.refused_message(tmp_path, cases.fsdp2, module=Listed, adapter=adapter) == problem


def test_a_head_left_unsharded_beside_other_ranks_is_refused(tmp_path: Path) -> None:
    assert "got network.head.bias, network.head.weight." in cases.refused_message(
        tmp_path, cases.mesh_2d, 4, module=HeadUnsharded, schedule={0: {"params": [*HEAD]}}
    )


class HeadUnsharded(cases.TensorParallel):
    """On a 2-D mesh, the head is a plain tensor."""

    def configure_model(self) -> None:
        for layer in (self.network.second, self.network.third):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])


def test_full_checkpoints_are_refused_where_lightning_cannot_load_them(tmp_path: Path) -> None:
    strategy = partial(cases.fsdp2, save_distributed_checkpoint=False)
    adapter = {"fsdp_plan": {LAYERS: {"act_ckpt": "wrapped"}, "network": None}}
    plain = partial(torch.optim.SGD, lr=0.1)
    message = cases.refused_message(tmp_path, strategy, adapter=adapter, optimizer=plain, enable_checkpointing=True)
    assert message.splitlines() == [
        "2 problems found:",
        "1. expected an optimizer that keeps state, since Lightning cannot load its checkpoint without any, got SGD "
        "without momentum. Fix: Give it momentum, or use ModelParallelStrategy with distributed checkpoints.",
        "2. expected distributed checkpoints of a model with wrappers for activation checkpointing, since Lightning "
        "cannot load full ones into it, got save_distributed_checkpoint=False. Fix: Use act_ckpt: composable, or "
        "ModelParallelStrategy(save_distributed_checkpoint=True).",
    ]


def test_plain_tensors_that_drift_apart_are_found_after_the_first_step(tmp_path: Path) -> None:
    run = partial(drifts, tmp_path)
    for message in harness.run_ranks(run, 2):
        assert (
            "The ranks' copies of the model differ after the first step of a phase (ranks [1] from rank 0)" in message
        )


class DifferentData(cases.TensorParallel):
    """Ranks of one tensor-parallel group are given different rows by mistake."""

    def train_dataloader(self) -> Share:
        task = self.recipe.task
        return Share(task.training(), task.batch_size, harness.rank(), 2)


def drifts(root: Path) -> str:
    with pytest.raises(RuntimeError) as error:
        fit(root, 2, cases.tensor_parallel, DifferentData)
    return str(error.value)
