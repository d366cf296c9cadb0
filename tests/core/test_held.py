"""What is held of a checkpoint is what was written, whatever becomes of the model and of what is given out."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from finetuning_scheduler.core import held as module_under_test
from finetuning_scheduler.core.held import Held, NoRoomError
from finetuning_scheduler.core.memory import free_memory


def trained() -> tuple[nn.Sequential, AdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    optimizer = AdamW(model[2].parameters())
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    return model, optimizer


def checkpoint_of(model: nn.Module, optimizer: AdamW, **more: Any) -> dict[str, Any]:
    return {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()], **more}


def frozen_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: each for name, each in model.named_parameters() if not each.requires_grad}


def test_what_is_frozen_is_not_copied() -> None:
    model, optimizer = trained()
    held = Held.of(checkpoint_of(model, optimizer), 0, frozen_of(model))
    assert held.frozen == {"0.weight", "0.bias"}
    assert set(held.changed) == set(model.state_dict()) - held.frozen


def test_what_is_given_out_is_what_was_written_though_all_has_changed_since() -> None:
    model, optimizer = trained()
    mine = {"bank": torch.ones(2), "list": [torch.ones(1), ("a", None)], "again": model.state_dict()}
    held = Held.of(checkpoint_of(model, optimizer, mine=mine), 0, frozen_of(model))
    written = torch.load(saved(checkpoint_of(model, optimizer, mine=mine)), weights_only=True)
    for value in [*model[2].parameters(), *model[1].buffers(), mine["bank"], mine["list"][0]]:
        value.data.mul_(2)
    for state in optimizer.state.values():
        state["exp_avg"].mul_(2)
    for _ in range(2):  # what has been given out is changed before it is given out again
        content, foreign = held.read(lambda name: dict(model.named_parameters())[name].detach().clone())
        weights = held.all_weights(content, lambda name: dict(model.named_parameters())[name].detach().clone())
        assert same(content | {"state_dict": weights}, written)
        assert list(weights) == list(written["state_dict"])
        assert weights._metadata == written["state_dict"]._metadata  # type: ignore[attr-defined]
        assert list(foreign) == []
        for value in tensors(content):
            value.mul_(3)


def saved(content: Any) -> Any:
    from io import BytesIO

    buffer = BytesIO()
    torch.save(content, buffer)
    buffer.seek(0)
    return buffer


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [each for item in inner for each in tensors(item)]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def test_what_several_keys_share_is_copied_once() -> None:
    shared = torch.ones(3)
    state = OrderedDict(a=shared, b=shared, c=shared.clone())
    held = Held.of({"state_dict": state, "optimizer_states": []}, 0, {})
    assert held.changed["a"] is held.changed["b"]
    assert held.changed["a"] is not held.changed["c"]


def test_a_state_that_is_no_optimizers_usual_one_is_given_out_too() -> None:
    states = [{"state": {0: {"moments": [torch.ones(2), {"deep": torch.zeros(1)}]}}, "param_groups": []}]
    held = Held.of({"state_dict": OrderedDict(), "optimizer_states": states}, 0, {})
    content, _ = held.read(lambda name: torch.empty(0))
    assert same(content["optimizer_states"], states)


def test_objects_of_other_classes_are_named_and_not_kept() -> None:
    model, optimizer = trained()
    held = Held.of(checkpoint_of(model, optimizer, mine={"path": Path("x")}), 0, frozen_of(model))
    content, foreign = held.read(lambda name: torch.empty(0))
    assert len(foreign) == 1
    assert not isinstance(content["mine"]["path"], Path)


def test_copies_take_no_more_than_a_part_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained()
    checkpoint = checkpoint_of(model, optimizer)
    needed = sum(each.numel() * each.element_size() for each in tensors(checkpoint))
    needed -= sum(each.numel() * each.element_size() for each in model[0].parameters())
    monkeypatch.setattr(module_under_test, "free_memory", lambda: 4 * needed)
    Held.of(checkpoint, 0, frozen_of(model))
    monkeypatch.setattr(module_under_test, "free_memory", lambda: 4 * needed - 4)
    with pytest.raises(NoRoomError, match=f"{needed:,} bytes"):
        Held.of(checkpoint, 0, frozen_of(model))


def test_some_memory_is_free() -> None:
    assert 1 << 20 < free_memory() < 1 << 50
