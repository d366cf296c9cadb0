"""Ways to train, and programs around the model: reuse works in them, or says why it does not."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finetuning_scheduler.core import PhaseRunner
from finetuning_scheduler.errors import ScheduleError

from .models import CASES, TEXT, Case, Data, Encoder, language, text, transformer
from .runs import BATCH, ROWS, Run, assert_same, run

ENCODER = CASES["encoder"]
BERT = CASES["bert"]
SMALL = Case(functools.partial(Encoder, blocks=4), text, ENCODER.loss, ("head.*", r"blocks\.3\..*", r"blocks\.2\..*"))


def both(case: Case, mode: str = "all", **options: Any) -> Run:
    """Train with reuse and without; the ends have to be the same."""
    plain, reused = run(case, "off", **options), run(case, mode, **options)
    assert_same(reused, plain)
    return reused


def reasons(reused: Run) -> str:
    said = [account.reason for account in reused.accounts if account.reason is not None]
    left_out = [each for account in reused.accounts for each in account.left_out]
    return "; ".join([*said, *left_out, *([] if reused.reason is None else [reused.reason])])


# --- precision, accumulation, storage


bf16 = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("case", [SMALL, BERT], ids=["encoder", "bert"])
def test_mixed_precision(case: Case) -> None:
    assert both(case, context=bf16).hits("train") >= 150


def test_gradient_accumulation() -> None:
    assert both(SMALL, accumulate=3).hits("train") >= 150


def test_in_order() -> None:
    plain, reused = run(SMALL, "off", shuffled=False), run(SMALL, "all", shuffled=False)
    assert reused.losses == plain.losses  # to the bit
    assert reused.hits("train") >= 150


def test_outputs_kept_in_bfloat16_change_results_by_rounding_only() -> None:
    plain, reused = run(SMALL, "off"), run(SMALL, "all", prefix_dtype=torch.bfloat16)
    assert reused.reason is None
    assert reused.hits("train") > 0
    assert reused.losses != plain.losses
    assert torch.allclose(torch.tensor(reused.losses), torch.tensor(plain.losses), rtol=2e-2)


def test_what_memory_does_not_hold_goes_to_files(tmp_path: Path) -> None:
    directory = tmp_path / "prefix"
    assert both(SMALL, "all", epochs=3).hits("train") >= 150
    plain = run(SMALL, "off")
    reused = run(SMALL, "all", prefix_budget=0, prefix_dir=directory)
    assert_same(reused, plain)
    assert reused.hits("train") > 0
    assert not any(directory.iterdir())


def test_a_directory_that_cannot_be_used_ends_reuse(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    plain = run(SMALL, "off")
    reused = run(SMALL, "all", prefix_budget=0, prefix_dir=tmp_path / "file")
    assert_same(reused, plain)
    assert reused.hits("train") == 0
    assert "the store has failed" in reasons(reused)


# --- activation checkpointing


class Checkpointed(Encoder):
    """Regions of two blocks, one of which the cut divides."""

    reentrant = False

    def __init__(self) -> None:
        super().__init__(blocks=6)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.positions
        for first in range(0, 6, 2):
            x = checkpoint(functools.partial(self.region, first), x, use_reentrant=self.reentrant)
        return self.head(x.mean(dim=1))

    def region(self, first: int, x: Tensor) -> Tensor:
        return self.blocks[first + 1](self.blocks[first](x))


class Reentrant(Checkpointed):
    reentrant = True

    def forward(self, ids: Tensor) -> Tensor:
        self.positions.requires_grad_()  # as reentrant checkpointing needs it
        return super().forward(ids)


CHECKPOINTED = ("head.*", r"blocks\.5\..*", r"blocks\.(3|4)\..*")


def test_checkpointing_across_the_cut() -> None:
    assert both(Case(Checkpointed, text, ENCODER.loss, CHECKPOINTED)).hits("train") >= 150


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")  # below the cut, PyTorch's
def test_reentrant_checkpointing() -> None:
    reused = both(Case(Reentrant, text, ENCODER.loss, CHECKPOINTED))
    assert reused.hits("train") > 0 or "gradients flow through it" in reasons(reused)


@pytest.mark.parametrize("arguments", [None, {"use_reentrant": True}], ids=["default", "reentrant"])
def test_checkpointing_by_transformers(arguments: dict[str, Any] | None) -> None:
    """Its hook on the embeddings lets all that follows need gradients."""
    reused = both(BERT, prepare=lambda model: model.activation_checkpointing_enable(arguments))
    assert "has a hook" in reasons(reused)


# --- hooks and outputs


def test_a_hook_inside_is_called_in_each_step() -> None:
    calls: dict[str, int] = {"off": 0, "all": 0}

    def prepare(mode: str, model: nn.Module) -> None:
        def count(*_: Any) -> None:
            calls[mode] += model.training

        model.blocks[1].norm1.register_forward_hook(count)

    runs = [run(SMALL, mode, prepare=functools.partial(prepare, mode)) for mode in ("off", "all")]
    assert_same(runs[1], runs[0])
    assert "`blocks.1`: `norm1` inside has a hook" in reasons(runs[1])
    assert calls["all"] >= calls["off"]  # the batches that are run twice call it too


def test_a_hook_added_later_is_called() -> None:
    seen: list[Tensor] = []

    def loss(model: nn.Module, batch: Data) -> Tensor:
        if model.training and not seen and len(losses) > 20:
            model.blocks[0].register_forward_hook(lambda module, args, result: seen.append(result.detach().clone()))
        losses.append(0)
        return ENCODER.loss(model, batch)

    losses: list[int] = []
    run(replace(SMALL, loss=loss), "off")
    expected = len(seen)
    losses, seen = [], []
    reused = run(replace(SMALL, loss=loss), "all")
    assert expected > 0
    assert len(seen) > 0
    assert "`blocks.0` has a hook" in reasons(reused)
    assert all(torch.isfinite(each).all() for each in seen)


def every_output(model: nn.Module, batch: Data) -> Tensor:
    outputs = model(**batch, output_attentions=True, output_hidden_states=True)
    assert len(outputs.attentions) == 4
    assert len(outputs.hidden_states) == 5
    return outputs.loss + sum(each.mean() for each in (*outputs.attentions, *outputs.hidden_states))


def test_attentions_and_hidden_states_of_transformers() -> None:
    build = transformer("BertForSequenceClassification", "BertConfig", **TEXT, attn_implementation="eager")
    both(Case(build, text, every_output, BERT.phases))


def test_hidden_states_in_every_third_step() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = BERT.build()
            self.steps = 0

    def loss(model: Sometimes, batch: Data) -> Tensor:
        model.steps += model.training
        outputs = model.bert(**batch, output_hidden_states=model.steps % 3 == 2)
        return outputs.loss + sum(each.mean() for each in outputs.hidden_states or ())

    phases = ("bert.classifier.*", r"bert\.bert\.pooler.*|bert\.bert\.encoder\.layer\.3\..*")
    both(Case(Sometimes, text, loss, phases))


def test_a_cache_that_is_returned() -> None:
    options = {"n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 16, "vocab_size": 50}
    build = transformer("GPT2LMHeadModel", "GPT2Config", **options, use_cache=True)
    lengths: list[int] = []

    def loss(model: nn.Module, batch: Data) -> Tensor:
        outputs = model(**batch)
        lengths.append(outputs.past_key_values.get_seq_length())
        return outputs.loss

    reused = both(Case(build, language, loss, CASES["gpt2"].phases))
    assert set(lengths) == {7}
    assert "DynamicCache, whose content cannot be kept" in reasons(reused)


# --- calls


def test_two_passes_in_a_step() -> None:
    def loss(model: nn.Module, batch: Data) -> Tensor:
        ids = batch["input_ids"]
        return nn.functional.mse_loss(model(ids), model(ids.flip(1)))

    assert both(replace(SMALL, loss=loss)).hits("train") >= 150


def test_a_pass_without_gradients_in_a_step() -> None:
    def loss(model: nn.Module, batch: Data) -> Tensor:
        with torch.no_grad():
            target = model(batch["input_ids"].flip(1)).softmax(dim=1)
        return nn.functional.cross_entropy(model(batch["input_ids"]), target)

    assert both(replace(SMALL, loss=loss)).hits("train") >= 150


class Nested(nn.Module):
    """Frozen modules take and give tuples, mappings, keywords and plain values."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor, options: dict[str, Any], *, scale: float = 1.0) -> dict[str, Any]:
            one = self.one(x) * scale
            return {"pair": (one, [self.other(one)]), "mask": one > 0, "scale": scale, "name": options["name"]}

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = self.Inner(), self.Inner()
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x, {"name": "first", "extra": (x, None)}, scale=0.5)
        second = self.second(first["pair"][1][0], {"name": first["name"]})
        assert (first["scale"], second["name"]) == (0.5, "first")
        return self.head(second["pair"][0] * second["mask"] + first["pair"][0])


def numbers(generator: torch.Generator) -> Data:
    return {"input_ids": torch.randn(ROWS, 6, generator=generator), "labels": text(generator)["labels"]}


def test_nested_inputs_and_outputs() -> None:
    assert both(Case(Nested, numbers, ENCODER.loss, ("head.*", "second.*"))).hits("train") >= 80


class TorchEncoder(nn.Module):
    """PyTorch's own encoder, with a mask of padding and without nested tensors."""

    def __init__(self, nested: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.embedding = nn.Embedding(50, 16)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=nested)
        self.head = nn.Linear(16, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(ids), src_key_padding_mask=mask == 0)[:, 0])


def of_masked(model: nn.Module, batch: Data) -> Tensor:
    return nn.functional.cross_entropy(model(batch["input_ids"], batch["attention_mask"]), batch["labels"])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize(
    ("nested", "context"),
    [(False, nullcontext), (False, bf16), (True, nullcontext)],  # PyTorch's own nested tensors fail under autocast
    ids=["float32", "bfloat16", "nested"],
)
def test_the_fast_path_of_pytorch(nested: bool, context: Any) -> None:
    # Nested tensors fail in PyTorch itself when some layers are in eval mode and some in train mode.
    phases = ("head.*",) if nested else ("head.*", r"encoder\.layers\.3\..*")
    case = Case(functools.partial(TorchEncoder, nested), text, of_masked, phases)
    assert both(case, context=context).hits("train") > 0


# --- compiled modules


def compile_in_place(model: nn.Module) -> None:
    for block in model.blocks:
        block.compile(backend="eager")


def wrap_compiled(model: nn.Module) -> None:
    for number, block in enumerate(model.blocks):
        model.blocks[number] = torch.compile(block, backend="eager")


# PyTorch looks at the gradient of a block's input when it compiles the block.
reads_gradients = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@reads_gradients
@pytest.mark.slow
@pytest.mark.parametrize("compile_blocks", [compile_in_place, wrap_compiled])
def test_blocks_that_are_compiled(compile_blocks: Callable[[nn.Module], None]) -> None:
    torch.compiler.reset()
    assert both(SMALL, prepare=compile_blocks).hits("train") >= 150


@reads_gradients
@pytest.mark.slow
def test_a_model_that_is_compiled_as_a_whole() -> None:
    torch.compiler.reset()
    reused = both(SMALL, prepare=lambda model: model.compile(backend="eager"), epochs=2)
    assert "it is part of a compiled module" in reasons(reused)


# --- refusals


def test_rows_that_never_repeat_end_recording() -> None:
    generator = torch.Generator().manual_seed(4)

    def fresh(data: Data, rows: Tensor) -> Data:
        return {**data, **text(generator)}

    reused = run(SMALL, "all", batch_of=fresh)
    assert reused.hits("train") == 0
    assert "no row has come again in a whole epoch" in reasons(reused)


def test_batches_of_one_row() -> None:
    def single(data: Data, rows: Tensor) -> Data:
        return {name: each[rows[:1]] for name, each in data.items()}

    assert "a batch of one row" in reasons(both(SMALL, batch_of=single))


def test_a_last_batch_of_another_size() -> None:
    def shorter(data: Data, rows: Tensor) -> Data:
        return {name: each[rows[: BATCH - 3] if 0 in rows else rows] for name, each in data.items()}

    assert both(SMALL, batch_of=shorter).hits("train") >= 80


class Opaque:
    """A batch of a kind of its own."""

    def __init__(self, content: Data) -> None:
        self.content = content


def test_a_batch_of_a_kind_of_its_own() -> None:
    case = replace(SMALL, loss=lambda model, batch: ENCODER.loss(model, batch[1].content))

    def wrapped(data: Data, rows: Tensor) -> Any:
        part = {name: each[rows] for name, each in data.items()}
        return (part["labels"], Opaque(part))

    reused = both(case, batch_of=wrapped)
    assert "the batch holds a Opaque, whose rows are not known" in reasons(reused)


def loop(step_of: Callable[[nn.Module, torch.optim.Optimizer, Data], Callable[..., Any]], mode: str) -> PhaseRunner:
    """Three epochs of a loop whose step does more than a forward pass."""
    torch.manual_seed(0)
    model = Encoder(blocks=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = {0: {"params": ["head.*"]}}
    runner = PhaseRunner(model, optimizer, schedule, frozen_modules_mode="eval", frozen_prefix=mode)
    data = text(torch.Generator().manual_seed(1))
    for _ in range(3):
        model.train()
        runner.apply_module_modes()
        for rows in torch.arange(ROWS).split(BATCH):
            batch = {name: each[rows] for name, each in data.items()}
            loss = runner.prefix.train(step_of(model, optimizer, batch), batch)
            if isinstance(loss, Tensor) and loss.requires_grad:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            runner.step()
        runner.epoch_end()
    runner.release_module_modes()
    return runner


def whole_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Data) -> Callable[..., Any]:
    def step(batch: Data) -> float:
        optimizer.zero_grad()
        loss = ENCODER.loss(model, batch)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def with_backward(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Data) -> Callable[..., Any]:
    def step(batch: Data) -> float:
        optimizer.zero_grad()
        loss = ENCODER.loss(model, batch)
        loss.backward()
        return loss.item()

    return step


def closed_over(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Data) -> Callable[..., Any]:
    def step(_: Data) -> Tensor:
        return ENCODER.loss(model, batch)

    return step


@pytest.mark.parametrize(
    ("step_of", "reason"),
    [
        (whole_step, "the step calls the optimizer itself"),
        (with_backward, "the step runs backward itself"),
        (closed_over, "no frozen module is given rows of the batch"),
    ],
)
def test_steps_that_do_more_or_hide_their_batch(step_of: Any, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    plain, reused = loop(step_of, "off"), loop(step_of, "all")
    for name, value in plain.model.state_dict().items():
        assert torch.equal(reused.model.state_dict()[name], value), name
    assert any(reason in str(account.reason) for account in reused.prefix.accounts)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len([message for message in said if reason in message]) == 1


@pytest.mark.parametrize("call", ["train", "validate"])
def test_a_step_without_a_batch_is_told_what_to_do(call: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="finetuning_scheduler")
    torch.manual_seed(0)
    model = Encoder(blocks=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = {0: {"params": ["head.*"]}, 1: {"params": [r"blocks\.1\..*"]}}
    runner = PhaseRunner(model, optimizer, schedule, frozen_modules_mode="eval", frozen_prefix="all")
    batch = text(torch.Generator().manual_seed(1))
    run_step = getattr(runner.prefix, call)
    runner.apply_module_modes()
    for phase in range(2):
        runner.thaw_to(phase)
        for _ in range(2):
            run_step(lambda: ENCODER.loss(model, batch))
    fix = f"the step is given no batch of tensors: in a loop, call {call}(step, x, y) with a step that takes them"
    said = [(record.levelno, record.getMessage()) for record in caplog.records if "no batch" in record.getMessage()]
    assert [level for level, _ in said] == [logging.WARNING]
    assert fix in said[0][1]


def test_settings_are_checked() -> None:
    model = Encoder(blocks=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrong: dict[str, Any] = {
        "frozen_prefix": "all",
        "prefix_budget": -1,
        "prefix_dir": 3,
        "prefix_dtype": torch.int8,
    }
    with pytest.raises(ScheduleError) as raised:
        PhaseRunner(model, optimizer, {0: {"params": ["head.*"]}}, **wrong)
    said = str(raised.value)
    assert "expected frozen_modules_mode='eval' with frozen_prefix='all', got 'train'" in said
    assert all(f"expected `{name}`" in said for name in ("prefix_budget", "prefix_dir", "prefix_dtype"))
    with pytest.raises(ScheduleError, match="expected `frozen_prefix` to be 'off', 'validation' or 'all', got 'yes'"):
        PhaseRunner(model, optimizer, {0: {"params": ["head.*"]}}, frozen_prefix="yes")


# --- what is frozen changes


def changed_by(change: Callable[[nn.Module, int], None]) -> Callable[[], Case]:
    """A case in which something is done to the model in some training steps, alike with and without reuse."""

    class Changing(Encoder):
        def __init__(self) -> None:
            super().__init__(blocks=4)
            self.count = 0

    def loss(model: Changing, batch: Data) -> Tensor:
        model.count += model.training
        result = ENCODER.loss(model, batch)
        if model.training:
            change(model, model.count)
        return result

    return lambda: Case(Changing, text, loss, SMALL.phases)


def move(model: nn.Module, count: int) -> None:
    if count in (8, 9, 16):
        with torch.no_grad():
            model.blocks[0].norm1.weight.add_(0.5)


def load(model: nn.Module, count: int) -> None:
    if count in (8, 9, 16):
        model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})


def test_weights_that_are_moved_though_frozen() -> None:
    """The program itself adds to a frozen weight between steps."""
    events: list[int] = []

    def batch_of(data: Data, rows: Tensor) -> Data:
        events.append(0)
        return {name: each[rows] for name, each in data.items()}

    def session(mode: str) -> Run:
        events.clear()
        models: list[nn.Module] = []

        def moving(data: Data, rows: Tensor) -> Data:
            if len(events) in (10, 20):
                move(models[0], 8)
            return batch_of(data, rows)

        return run(SMALL, mode, prepare=models.append, batch_of=moving)

    plain, reused = session("off"), session("all")
    assert_same(reused, plain)
    assert "`blocks.0.norm1.weight` has changed although it is frozen" in reasons(reused)


def test_weights_that_are_loaded_again_keep_what_is_kept() -> None:
    models: list[nn.Module] = []

    def loading(data: Data, rows: Tensor) -> Data:
        load(models[-1], 8)
        return {name: each[rows] for name, each in data.items()}

    assert both(SMALL, prepare=models.append, batch_of=loading).hits("train") >= 150


def test_weights_that_are_moved_as_a_phase_begins() -> None:
    """What was kept for the coming phase does not fit any more."""

    def session(mode: str) -> Run:
        models: list[nn.Module] = []
        steps = 0

        def moving(data: Data, rows: Tensor) -> Data:
            nonlocal steps
            steps += 1
            if steps == 3 * 2 * (ROWS // BATCH) + 1:  # training and validation of three epochs
                move(models[0], 8)
            return {name: each[rows] for name, each in data.items()}

        return run(SMALL, mode, prepare=models.append, batch_of=moving)

    plain, reused = session("off"), session("all")
    assert [transition.step for transition in plain.transitions] == [9, 18]
    assert_same(reused, plain)
    assert reused.reason is None  # nothing stale was there to be found out by a comparison
    assert reused.hits("train") > 0
