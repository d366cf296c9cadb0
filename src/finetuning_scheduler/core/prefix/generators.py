"""The state of random generators: have they moved, and back to where they were."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Generators:
    """The states of PyTorch's, Python's and (where it is imported) numpy's own generators at one moment."""

    cpu: Tensor
    devices: tuple[Tensor, ...]
    python: object
    numpy: Any

    @classmethod
    def now(cls) -> Generators:
        """Read the states."""
        numpy: Any = sys.modules.get("numpy")
        state = None if numpy is None else numpy.random.get_state()
        return cls(torch.get_rng_state(), tuple(_device_states()), random.getstate(), state)

    def moved(self) -> bool:
        """Whether something has drawn from a generator since."""
        return self.differs(Generators.now())

    def differs(self, other: Generators) -> bool:
        """Whether the generators would give other numbers."""
        same = torch.equal(self.cpu, other.cpu) and self.python == other.python
        same = same and all(torch.equal(one, each) for one, each in zip(self.devices, other.devices, strict=True))
        return not (same and _same_numpy(self.numpy, other.numpy))

    def restore(self) -> None:
        """Go back to these states."""
        torch.set_rng_state(self.cpu)
        if self.devices:
            torch.cuda.set_rng_state_all(list(self.devices))
        random.setstate(self.python)  # type: ignore[arg-type]
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


def _device_states() -> list[Tensor]:
    used = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.get_rng_state_all() if used else []


def _same_numpy(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return one is other
    return bool(one[0] == other[0] and (one[1] == other[1]).all() and one[2:] == other[2:])
