"""Are the skipped modules still what they were when their outputs were kept? Asked before each step."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..checksums import Checksums
from .cut import has_hooks, is_calm
from .stand_ins import version_of
from .trees import is_plain

_PROBED = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.int64: torch.int64,
}
_WORDS = (torch.int64, torch.int32, torch.int16)


class Guard:
    """Watches attributes, weights and hooks of modules.

    Args:
        modules: The skipped modules and all inside them, by name.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._signature: list[object] = []
        self._probes: list[Tensor] = []
        self._probed: list[Tensor] = []
        self._held: dict[str, dict[str, Any]] = {}
        self._checksums = Checksums.of(self._tensors())
        self._note()

    def same(self) -> bool:
        """Whether nothing has changed, as far as a look tells that takes a few microseconds a module.

        What changes weights through ``.data``, as many moving averages do, escapes PyTorch's count of changes. On a CPU
        a value of each tensor is compared, too; elsewhere that would wait for the device, and :meth:`moved` has to be
        asked now and then.
        """
        return self._read() == self._signature and all(map(torch.equal, _stacked(self._probes), self._probed))

    def narrowed(self, modules: Mapping[str, nn.Module]) -> Guard:
        """Return a guard of some of the modules that compares them with the same moment."""
        names = [name for name, module in modules.items() if self._modules.get(name) is module]
        guard = copy.copy(self)
        guard._modules = {name: self._modules[name] for name in names}
        owned = {name for name in self._checksums.names if name.rpartition(".")[0] in names}
        guard._checksums = self._checksums.only(owned)
        return guard

    def obstacle(self) -> str | None:
        """Tell what, at the moment, stands against skipping the modules."""
        for name, module in self._modules.items():
            if has_hooks(module):
                return f"`{name}` has a hook"
            if not is_calm(module):
                return f"`{name}` is in train mode"
            if "forward" in vars(module) and self._held[name].get("forward") is not vars(module)["forward"]:
                return f"the `forward` of `{name}` has been replaced"
        return None

    def moved(self) -> str | None:
        """Tell which weight or buffer has other values than before; reads all of them."""
        now = Checksums.of(self._tensors())
        changed = self._checksums.changed(now) | (self._checksums.names ^ now.names)
        if not changed:
            return None
        name = min(changed)
        owner, _, key = name.rpartition(".")
        if key in self._modules[owner]._buffers:
            return f"the buffer `{name}` of a frozen module changes; frozen_modules_mode='eval' keeps statistics"
        return f"`{name}` has changed although it is frozen"

    def difference(self) -> str | None:
        """Tell what of the modules has another value than before; what has not is taken as it is from now on."""
        if (change := self.moved()) is not None:
            return change
        for name, module in self._modules.items():
            before, later = self._held[name], vars(module)
            for key in {**before, **later}:
                if not _alike(before.get(key), later.get(key)) and key != "training":
                    return f"the attribute `{key}` of `{name}` has changed"
        self._note()
        return None

    def _note(self) -> None:
        self._held = {name: dict(vars(module)) for name, module in self._modules.items()}
        self._signature = self._read()
        self._probes = [_probe(each) for each in self._tensors().values() if _can_be_probed(each)]
        self._probed = _stacked(self._probes)

    def _read(self) -> list[object]:
        signature: list[object] = []
        for module in self._modules.values():
            signature.append(tuple(map(id, vars(module).values())))
            for each in (*module._parameters.values(), *module._buffers.values()):
                if each is not None:
                    signature.append((id(each), version_of(each), each.data_ptr()))
            if has_hooks(module):
                signature.append("hooks")
        return signature

    def _tensors(self) -> dict[str, nn.Parameter]:
        tensors: dict[str, Tensor] = {}
        for name, module in self._modules.items():
            tensors |= {f"{name}.{key}": each for key, each in module.named_parameters(recurse=False)}
            tensors |= {f"{name}.{key}": each for key, each in module.named_buffers(recurse=False)}
        return cast("dict[str, nn.Parameter]", tensors)


def _can_be_probed(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return plain and tensor.device.type == "cpu" and tensor.numel() > 0 and tensor.dtype in _PROBED


def _probe(tensor: Tensor) -> Tensor:
    """View the value in the middle, by its bits."""
    middle = tensor.detach()[tuple(size // 2 for size in tensor.shape)]
    return middle.view(_PROBED[tensor.dtype])


@torch.no_grad()
def _stacked(probes: list[Tensor]) -> list[Tensor]:
    return [torch.stack(alike) for dtype in _WORDS if (alike := [probe for probe in probes if probe.dtype is dtype])]


def _alike(before: object, later: object) -> bool:
    return before is later or (is_plain(before) and type(before) is type(later) and before == later)
