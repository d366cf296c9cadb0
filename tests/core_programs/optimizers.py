"""Optimizers that are unlike those of PyTorch: without a learning rate, with one for all groups, and a wrapper."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import SGD, Optimizer


class Relative(Optimizer):
    """Finds its step size itself: the n-th step of each parameter is 1/n. Its learning rate is ``None``."""

    def __init__(self, parameters: Iterable[Any], lr: None = None, weight_decay: float = 0.0) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["lr"] is not None:
                raise TypeError(f"expected no learning rate, got {group['lr']}")
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["steps"] = state.get("steps", 0) + 1
                    parameter.mul_(1 - group["weight_decay"])
                    parameter.sub_(parameter.grad, alpha=0.1 / state["steps"])
        return loss


class OneRate(SGD):
    """Demands one learning rate for all groups, as Prodigy does, and says so in the first step that finds several."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        rates = {float(group["lr"]) for group in self.param_groups}
        if len(rates) > 1:
            raise RuntimeError(f"Setting different lr values in different parameter groups is not supported: {rates}")
        return super().step(closure)


class Wrapper(Optimizer):
    """Holds another optimizer and nothing of its own, as Accelerate's ``AcceleratedOptimizer`` does."""

    def __init__(self, optimizer: Optimizer) -> None:  # the base class is not initialised, there as here
        self.optimizer = optimizer

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, param_groups: Any) -> None:
        self.optimizer.param_groups = param_groups

    @property
    def defaults(self) -> Any:
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: Any) -> None:
        self.optimizer.defaults = defaults

    def add_param_group(self, param_group: Any) -> None:
        self.optimizer.add_param_group(param_group)

    def load_state_dict(self, state_dict: Any) -> None:
        self.optimizer.load_state_dict(state_dict)

    def state_dict(self) -> Any:
        return self.optimizer.state_dict()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return self.optimizer.step(closure)

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def adafactor(parameters: Iterable[Any]) -> Optimizer:
    """Adafactor of ``transformers`` that finds its step sizes itself."""
    import transformers

    optimizer: Optimizer = transformers.Adafactor(parameters, lr=None, relative_step=True, warmup_init=True)
    return optimizer


WITHOUT_RATE: dict[str, Callable[[Any], Optimizer]] = {"Relative": Relative, "Adafactor": adafactor}
