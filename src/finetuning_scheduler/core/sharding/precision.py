"""The precision of FSDP2 modules as a configuration file can say it, where no objects can be written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy


def mixed_precision(value: Any) -> MixedPrecisionPolicy:
    """Make the policy of its configuration: one, or its arguments, in which types stand by name (``bfloat16``).

    Raises:
        TypeError: It is neither.
    """
    if isinstance(value, MixedPrecisionPolicy):
        return value
    if not isinstance(value, Mapping):
        raise TypeError(f"got {value!r}")
    types = {key: _type(key, each) for key, each in value.items() if str(key).endswith("dtype")}
    return MixedPrecisionPolicy(**{**value, **types})


def _type(key: str, value: Any) -> torch.dtype | None:
    found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if (found is None and isinstance(value, str)) or not isinstance(found, torch.dtype | None):
        raise TypeError(f"got {value!r} as {key}")
    return found
