"""What ``ZeroRedundancyOptimizer`` needs besides what every optimizer does: its state is spread over the ranks."""

from __future__ import annotations

from typing import Any


def is_zero(optimizer: Any) -> bool:
    """Whether an optimizer spreads its state over ranks; its class is not there in every build of PyTorch."""
    return hasattr(optimizer, "consolidate_state_dict")


def forget_state(optimizer: Any) -> None:
    """Drop all per-parameter state.

    ``ZeroRedundancyOptimizer.load_state_dict`` leaves the state of parameters alone that the given state does not name.
    """
    optimizer.state.clear()
    if is_zero(optimizer):
        optimizer.optim.state.clear()


def repartition(optimizer: Any) -> None:
    """Let a ``ZeroRedundancyOptimizer`` spread its parameters over the ranks anew, in place, before its first step."""
    if is_zero(optimizer):
        type(optimizer).__init__(
            optimizer,
            optimizer.param_groups,
            optimizer._optim_constructor,
            process_group=optimizer.process_group,
            parameters_as_bucket_view=optimizer.parameters_as_bucket_view,
            **optimizer._optim_defaults,
        )
