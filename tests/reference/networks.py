"""The networks that every driver trains, the names of their parameters, and the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

SEED = 7
BATCHES_PER_EPOCH = 4


def pair(layer: str) -> tuple[str, str]:
    """Names of a layer's parameters in `Wrapped` and in a LightningModule."""
    return (f"network.{layer}.bias", f"network.{layer}.weight")


# Layers of `mlp` and `residual`; the latter has the norm.
HEAD, THIRD, SECOND, NORM, FIRST = (pair(layer) for layer in ("head", "third", "second", "norm", "first"))


class Wrapped(nn.Module):
    """Gives the network the same parameter names that it has inside a LightningModule."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def mlp() -> nn.Sequential:
    """Four linear layers, eight parameters: two to each phase of the default schedule."""
    layers = nn.Sequential()
    layers.add_module("first", nn.Linear(4, 5))
    layers.add_module("tanh1", nn.Tanh())
    layers.add_module("second", nn.Linear(5, 5))
    layers.add_module("tanh2", nn.Tanh())
    layers.add_module("third", nn.Linear(5, 5))
    layers.add_module("tanh3", nn.Tanh())
    layers.add_module("head", nn.Linear(5, 1))
    return layers


def normalised() -> nn.Sequential:
    """BatchNorm and Dropout between linear layers: buffers and random numbers take part in training."""
    layers = nn.Sequential()
    layers.add_module("first", nn.Linear(4, 6))
    layers.add_module("norm", nn.BatchNorm1d(6))
    layers.add_module("drop", nn.Dropout(0.5))
    layers.add_module("second", nn.Linear(6, 6))
    layers.add_module("head", nn.Linear(6, 1))
    return layers


def batch_normalised() -> nn.Sequential:
    """BatchNorm in the lowest of three layers."""
    layers = nn.Sequential()
    layers.add_module("lower", nn.Linear(4, 4))
    layers.add_module("norm", nn.BatchNorm1d(4))
    layers.add_module("upper", nn.Linear(4, 4))
    layers.add_module("tanh", nn.Tanh())
    layers.add_module("head", nn.Linear(4, 1))
    return layers


class Tied(nn.Module):
    """``out.weight`` is another name of ``embed.weight``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.middle = nn.Linear(4, 4)
        self.out = nn.Linear(4, 4)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.middle(torch.tanh(self.embed(x))))).sum(dim=1, keepdim=True)


class Residual(nn.Module):
    """Four linear layers and a LayerNorm that ranks can share out; every layer is a wrap unit of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        self.second = nn.Linear(16, 16)
        self.third = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.first(x)))
        x = x + torch.tanh(self.third(torch.tanh(self.second(x))))
        return self.head(x)


def build_network(factory: Callable[[], nn.Module], seed: int = SEED) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return factory()


# --- data ------------------------------------------------------------------------------------------------------------


def sum_of_sines(x: Tensor, generator: Generator) -> Tensor:
    return x.sin().sum(dim=1, keepdim=True)


def random_classes(x: Tensor, generator: Generator) -> Tensor:
    return torch.randint(4, (len(x),), generator=generator)


@dataclass(frozen=True)
class Task:
    """What a network learns. There is one batch of validation, of ``validation_rows``."""

    features: int
    batch_size: int
    validation_rows: int
    targets: Callable[[Tensor, Generator], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]

    def training(self) -> TensorDataset:
        return self._data(seed=1, rows=self.batch_size * BATCHES_PER_EPOCH)

    def validation(self) -> TensorDataset:
        return self._data(seed=2, rows=self.validation_rows)

    def _data(self, seed: int, rows: int) -> TensorDataset:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(rows, self.features, generator=generator)
        return TensorDataset(x, self.targets(x, generator))


REGRESSION = Task(4, batch_size=4, validation_rows=8, targets=sum_of_sines, loss=nn.functional.mse_loss)
CLASSIFICATION = Task(8, batch_size=8, validation_rows=8, targets=random_classes, loss=nn.functional.cross_entropy)


def loader(data: TensorDataset, batch_size: int) -> DataLoader[tuple[Tensor, ...]]:
    """Its own generator, so that iterating draws no global random numbers."""
    return DataLoader(data, batch_size=batch_size, shuffle=False, generator=torch.Generator())


class Share:
    """A rank's part of each batch, in every epoch the same: rank r of W takes the rows ``r::W``.

    As each loss here is a mean, a run on W ranks equals a run on one device that is given whole batches.
    """

    def __init__(self, data: TensorDataset, batch_size: int, rank: int, ranks: int) -> None:
        x, y = data.tensors
        whole = zip(x.split(batch_size), y.split(batch_size), strict=True)
        self.batches = [(x[rank::ranks], y[rank::ranks]) for x, y in whole]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)
