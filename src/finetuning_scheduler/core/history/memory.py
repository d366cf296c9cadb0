"""How much memory a process has needed."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch

resource: Any
try:
    import resource
except ImportError:  # Windows
    resource = None

_UNIT = 1 if sys.platform == "darwin" else 1024  # of `ru_maxrss`, in bytes


def peak_memory(parameters: Iterable[torch.Tensor]) -> int | None:
    """Return the most bytes that this process has needed so far: on the GPU of the first parameter, or of the host.

    Nothing is reset, since others may measure too; the device is not waited for.
    """
    device = next((parameter.device for parameter in parameters), None)
    if device is not None and device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return None if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT
