"""Plans that spread the matrices of a :class:`.Decoder` over the ranks of a tensor-parallel mesh."""

from __future__ import annotations

import math
from typing import Literal

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from .decoder import Decoder, DecoderConfig, SizeError

PlanName = Literal["tensor", "sequence"]


def parallelize(decoder: Decoder, mesh: DeviceMesh, plan: PlanName) -> None:
    """Make distributed tensors of a decoder's matrices, in place.

    Args:
        decoder: A decoder that no plan has been applied to.
        mesh: One-dimensional, of the ranks that compute each batch together.
        plan: ``"tensor"``, matrices only, as in Shoeybi et al., "Megatron-LM" (2019), arXiv:1909.08053; or
            ``"sequence"``, which also spreads what lies between the matrices over the ranks, by position: Korthikanti
            et al., "Reducing Activation Recomputation in Large Transformer Models" (2022), arXiv:2205.05198.

    Raises:
        SizeError: The decoder's sizes do not fit the number of ranks.
    """
    _check_sizes(decoder.config, mesh.size())
    styles = _tensor_plan() if plan == "tensor" else _sequence_plan()
    parallelize_module(decoder, mesh, styles)


def _check_sizes(config: DecoderConfig, ranks: int) -> None:
    """See that each rank gets an equal share of whole heads and of what else is spread."""
    names = ("n_heads", "n_kv_heads", "hidden_dim", "vocab_size")
    sizes = {name: getattr(config, name) for name in names}
    if uneven := [f"{name}={size}" for name, size in sizes.items() if size % ranks]:
        fix = f"Use a tensor_parallel_size that divides {math.gcd(*sizes.values())}, or change the sizes."
        message = f"expected sizes that {ranks} tensor-parallel ranks can share equally, got {', '.join(uneven)}"
        raise SizeError(f"{message}. Fix: {fix}")


def _tensor_plan() -> dict[str, ParallelStyle]:
    """By name of a module, how it is spread; embeddings and norms stay whole on every rank."""
    return {
        "layers.*.attention.w[qkv]": ColwiseParallel(),
        "layers.*.attention.wo": RowwiseParallel(),
        "layers.*.feed_forward.w[13]": ColwiseParallel(),
        "layers.*.feed_forward.w2": RowwiseParallel(),
        "output": ColwiseParallel(output_layouts=Replicate()),
    }


def _sequence_plan() -> dict[str, ParallelStyle]:
    """By name of a module, how it is spread; between matrices each rank has a part of every sequence's positions."""
    by_position = Shard(1)
    return {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=by_position),
        "layers.*.attention_norm": SequenceParallel(),
        "layers.*.attention": PrepareModuleInput(
            input_layouts=(by_position, None),  # the rotation is the same on every rank
            desired_input_layouts=(Replicate(), None),
        ),
        "layers.*.attention.w[qkv]": ColwiseParallel(),
        "layers.*.attention.wo": RowwiseParallel(output_layouts=by_position),
        "layers.*.ffn_norm": SequenceParallel(),
        "layers.*.feed_forward": PrepareModuleInput(input_layouts=by_position, desired_input_layouts=Replicate()),
        "layers.*.feed_forward.w[13]": ColwiseParallel(),
        "layers.*.feed_forward.w2": RowwiseParallel(output_layouts=by_position),
        "norm": SequenceParallel(),
        "output": ColwiseParallel(input_layouts=by_position, output_layouts=Replicate()),
    }
