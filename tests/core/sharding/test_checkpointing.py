"""Activation checkpointing as configurations write it: what is taken, what it does, and what is refused."""

from __future__ import annotations

from collections import UserDict, UserList
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetuning_scheduler.core.sharding.checkpointing import ActivationCheckpointing, checkpointing_problem

ONCE_AND_AGAIN = {"preserve_rng_state": False}
READ: dict[str, tuple[Any, ActivationCheckpointing | None]] = {
    "none": (None, None),
    "text": ("composable", ActivationCheckpointing("composable")),
    "list": (["composable"], ActivationCheckpointing("composable")),
    "tuple": (("wrapped",), ActivationCheckpointing("wrapped")),
    "arguments": (["wrapped", ONCE_AND_AGAIN], ActivationCheckpointing("wrapped", ONCE_AND_AGAIN)),
    "no-arguments": (["wrapped_offload", None], ActivationCheckpointing("wrapped_offload")),
    "empty-arguments": (["composable", {}], ActivationCheckpointing("composable")),
    "another-sequence": (
        UserList(["composable", UserDict(ONCE_AND_AGAIN)]),
        ActivationCheckpointing("composable", ONCE_AND_AGAIN),
    ),
}


@pytest.mark.parametrize(("given", "read"), READ.values(), ids=READ.keys())
def test_every_way_to_write_it_is_taken(given: Any, read: ActivationCheckpointing | None) -> None:
    assert ActivationCheckpointing.of(given) == read
    assert checkpointing_problem(given, "`here`") is None


class Noisy(nn.Module):
    """Remembers what it has drawn in each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.rand(())
        self.drawn.append(float(noise))
        return (x * noise).exp()


@pytest.mark.parametrize("preserve", [True, False])
@pytest.mark.parametrize("kind", ["composable", "wrapped"])
def test_arguments_have_their_effect(kind: str, preserve: bool) -> None:
    module = Noisy()
    read = ActivationCheckpointing.of([kind, {"preserve_rng_state": preserve, "early_stop": False}])
    assert read is not None
    x = torch.ones(2, requires_grad=True)
    output = read.apply(module)(x)
    torch.rand(())  # what comes after it draws too
    output.sum().backward()
    first, again = module.drawn
    assert (first == again) == preserve


def test_trying_arguments_draws_no_random_number() -> None:
    before = torch.get_rng_state()
    assert checkpointing_problem(["wrapped", ONCE_AND_AGAIN], "`here`") is None
    assert torch.equal(torch.get_rng_state(), before)


KINDS = "to be one of composable, wrapped, wrapped_offload, alone or in a list with a mapping of its arguments"


@pytest.mark.parametrize(
    "given",
    [
        "yes",
        True,
        "",
        [],
        ["yes"],
        [None],
        [["composable"]],
        ["composable", "wrapped"],
        ["composable", {}, {}],
        ["composable", ["preserve_rng_state"]],
        {"composable": {}},
        [ONCE_AND_AGAIN, "composable"],
    ],
    ids=repr,
)
def test_what_makes_no_sense_is_refused(given: Any) -> None:
    assert str(checkpointing_problem(given, "`here`")) == (
        f"expected `act_ckpt` of `here` {KINDS}, got {given!r}. Fix: Leave it out for no activation checkpointing."
    )


@pytest.mark.parametrize("kind", ["composable", "wrapped", "wrapped_offload"])
def test_arguments_that_it_does_not_take_are_refused(kind: str) -> None:
    assert str(checkpointing_problem([kind, {"preserve_rng": False}], "`here`")) == (
        "`act_ckpt` of `here` does not take the arguments {'preserve_rng': False}: Unexpected keyword arguments: "
        "preserve_rng. Fix: Use arguments of torch.utils.checkpoint.checkpoint, such as preserve_rng_state."
    )
