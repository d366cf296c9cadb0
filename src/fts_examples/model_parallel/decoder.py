"""A small decoder of the Llama kind in plain PyTorch.

Its parts are those of Touvron et al., "LLaMA: Open and Efficient Foundation Language Models" (2023), arXiv:2302.13971,
with the grouped-query attention of "Llama 2" (2023), arXiv:2307.09288. Modules have the short names that PyTorch's
tutorial on tensor parallel uses for this architecture (``wq``, ``w1``, ``ffn_norm``, ...), so that plans and schedules
written for such a model fit this one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


class SizeError(ValueError):
    """A size of a decoder that does not fit the others, or the devices that share the decoder."""


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a :class:`Decoder`.

    Args:
        vocab_size: Number of different tokens.
        dim: Width of the residual stream.
        n_layers: Number of layers.
        n_heads: Number of attention heads; the width of one is ``dim / n_heads``.
        n_kv_heads: Number of heads for keys and values, each of which serves ``n_heads / n_kv_heads`` heads.
        hidden_dim: Width inside the feed-forward networks.
        rope_base: Base of the rotary embedding's wavelengths.
        norm_eps: Added to the mean square before its root is taken.

    Raises:
        SizeError: A size does not fit the others; the message names it.
    """

    vocab_size: int = 32
    dim: int = 32
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = 2
    hidden_dim: int = 64
    rope_base: float = 10000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "rope_base", "norm_eps"):
            if not (value := getattr(self, name)) > 0:
                raise SizeError(f"expected {name} to be positive, got {value}. Fix: Give {name} a positive value.")
        if self.dim % self.n_heads:
            fix = f"Set dim to a multiple of {self.n_heads}, or change n_heads."
            raise SizeError(f"expected n_heads to divide dim={self.dim}, got n_heads={self.n_heads}. Fix: {fix}")
        if self.n_heads % self.n_kv_heads:
            fix = f"Set n_kv_heads to a divisor of {self.n_heads}."
            message = f"expected n_kv_heads to divide n_heads={self.n_heads}, got n_kv_heads={self.n_kv_heads}"
            raise SizeError(f"{message}. Fix: {fix}")
        if self.head_dim % 2:
            fix = f"Set dim to a multiple of {2 * self.n_heads}."
            message = "expected dim / n_heads to be even, since the rotary embedding turns pairs of values"
            raise SizeError(f"{message}, got {self.dim} / {self.n_heads} = {self.head_dim}. Fix: {fix}")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.n_heads


class RMSNorm(nn.Module):
    """Divide by the root mean square of the last dimension.

    Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), arXiv:1910.07467. ``torch.nn.RMSNorm`` computes
    the same; it is written out here for the reader.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., dim) to (..., dim). The mean square is taken in float32 at least."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normal = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return normal.type_as(x) * self.weight


class RotaryEmbedding(nn.Module):
    """The angles by which :func:`rotate` turns queries and keys.

    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), arXiv:2104.09864.
    """

    def __init__(self, head_dim: int, base: float) -> None:
        super().__init__()
        self.head_dim, self.base = head_dim, base

    def forward(self, length: int, device: torch.device | None = None) -> Tensor:
        """Return cosines and sines at the positions from 0, (2, length, head_dim / 2).

        They are in float32 and computed anew each time: in bfloat16 neighbours above position 256 would be one, and
        what a module keeps goes along with ``.to(torch.bfloat16)`` and is lost on the meta device.
        """
        powers = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device) / self.head_dim
        angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), self.base**-powers)
        return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn pairs of values by angles that grow with the position.

    The products of a turned query and a turned key depend on the distance of their positions only. Values ``i`` and
    ``i + head_dim / 2`` make a pair, as in the published Llama weights of the library transformers; RoFormer pairs
    neighbours, which is the same up to the order of a head's values.

    Args:
        x: (batch, heads, length, head_dim).
        rotation: What :class:`RotaryEmbedding` returns for this length.
    """
    cosines, sines = rotation.type_as(x)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)


class Attention(nn.Module):
    """Causal self-attention in which several heads share the keys and values of one.

    Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints" (2023),
    arXiv:2305.13245.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """Map (batch, length, dim) to the same shape."""
        query, key, value = (self._heads(projection(x)) for projection in (self.wq, self.wk, self.wv))
        query, key = rotate(query, rotation), rotate(key, rotation)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        merged: Tensor = self.wo(mixed.transpose(1, 2).flatten(2))
        return merged

    def _heads(self, x: Tensor) -> Tensor:
        """Map (batch, length, heads * head_dim) to (batch, heads, length, head_dim).

        How many heads there are follows from ``x``: under tensor parallel a rank computes its share of them.
        """
        return x.reshape(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)


class FeedForward(nn.Module):
    """A network whose hidden values are gated: SwiGLU of Shazeer, "GLU Variants Improve Transformer" (2020).

    arXiv:2002.05202.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)  # the gate
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., dim) to (..., dim)."""
        mapped: Tensor = self.w2(functional.silu(self.w1(x)) * self.w3(x))
        return mapped


class DecoderLayer(nn.Module):
    """Attention and a feed-forward network, each on normalised inputs and added to the residual stream."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """Map (batch, length, dim) to the same shape."""
        x = x + self.attention(self.attention_norm(x), rotation)
        mapped: Tensor = x + self.feed_forward(self.ffn_norm(x))
        return mapped


class Decoder(nn.Module):
    """Predict each sequence's next tokens."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.rotary = RotaryEmbedding(config.head_dim, config.rope_base)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (batch, length) to logits (batch, length, vocab_size) of the tokens one position on."""
        rotation = self.rotary(tokens.shape[1], tokens.device)
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x, rotation)
        logits: Tensor = self.output(self.norm(x))
        return logits
