"""A checksum tells every change of a parameter's values, and no change where there is none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from finetuning_scheduler.core.checksums import Checksums

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128, torch.uint8)
SHAPES = ((), (6,), (4, 6), (2, 3, 4))
KINDS: dict[str, Callable[[tuple[int, ...]], Tensor]] = {"zeros": torch.zeros, "ones": torch.ones}


def parameter(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def changed(before: Tensor, after: Tensor) -> bool:
    return Checksums.of({"it": parameter(before)}).changed(Checksums.of({"it": parameter(after)})) == {"it"}


def one_value(values: Tensor) -> None:
    values.view(-1)[-1:] += 1


def every_value_alike(values: Tensor) -> None:
    values += 1


@pytest.mark.parametrize("change", [one_value, every_value_alike])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_a_change_is_told(
    kind: Callable[[tuple[int, ...]], Tensor], dtype: torch.dtype, shape: tuple[int, ...], change: Callable[..., None]
) -> None:
    values = kind(shape).to(dtype)
    before = values.clone()
    change(values)
    assert changed(before, values)
    assert not changed(before, before.clone())


def test_the_last_bit_of_a_value_among_far_larger_ones_is_told() -> None:
    values = torch.full((1000, 100), 1e30)
    values[3, 5] = 1e-30
    after = values.clone()
    after[3, 5] = torch.nextafter(after[3, 5], torch.tensor(1.0))
    assert changed(values, after)


def test_rows_that_change_places_are_told() -> None:
    values = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert changed(values, values.roll(1, dims=0))


def test_a_change_through_data_is_told() -> None:
    moving = parameter(torch.ones(3))
    before = Checksums.of({"it": moving})
    moving.data.mul_(0.5)
    assert before.changed(Checksums.of({"it": moving})) == {"it"}


def test_only_what_has_changed_is_named() -> None:
    parameters = {name: parameter(torch.ones(2)) for name in ("moves", "rests")}
    before = Checksums.of(parameters)
    parameters["moves"].data += 1
    assert before.changed(Checksums.of(parameters)) == {"moves"}


def test_a_tensor_without_values_has_no_checksum() -> None:
    nothing = Checksums.of({"it": parameter(torch.empty(2, device="meta"))})
    assert nothing.changed(nothing) == set()
