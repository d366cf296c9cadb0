"""A weight that is kept as integers but says it is float32, as quantisers make them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


class Quantised(Tensor):
    """Eight-bit integers and a scale. No gradient ever reaches them."""

    @staticmethod
    def __new__(cls, integers: Tensor, scale: Tensor) -> Quantised:
        return Tensor._make_wrapper_subclass(cls, integers.shape, dtype=torch.float32)

    def __init__(self, integers: Tensor, scale: Tensor) -> None:
        self.integers, self.scale = integers, scale

    @classmethod
    def of(cls, weight: Tensor) -> Quantised:
        scale = weight.detach().abs().max() / 127
        return cls((weight.detach() / scale).round().to(torch.int8), scale)

    def dequantised(self) -> Tensor:
        return self.integers.to(torch.float32) * self.scale

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        aten = torch.ops.aten
        if function in (aten.detach.default, aten.alias.default):
            return cls(arguments[0].integers, arguments[0].scale)
        if function is aten.clone.default:
            return cls(arguments[0].integers.clone(), arguments[0].scale.clone())
        if function is aten.copy_.default and isinstance(arguments[0], cls):
            source = arguments[1] if isinstance(arguments[1], cls) else cls.of(arguments[1])
            arguments[0].integers.copy_(source.integers)
            arguments[0].scale.copy_(source.scale)
            return arguments[0]
        plain = tree_map(
            lambda each: each.dequantised() if isinstance(each, cls) else each, (arguments, keywords or {})
        )
        return function(*plain[0], **plain[1])


class QuantisedLinear(nn.Module):
    """A linear layer over a quantised weight."""

    def __init__(self, linear: nn.Linear, *, requires_grad: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(Quantised.of(linear.weight), requires_grad=requires_grad)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.detach().dequantised(), self.bias)
