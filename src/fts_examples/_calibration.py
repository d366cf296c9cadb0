"""How far the probabilities of a classifier can be believed, and temperature scaling."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics.functional.classification import multiclass_calibration_error

BINS = 15
TEMPERATURES = (0.01, 100.0)


@dataclass(frozen=True)
class Scores:
    """What logits are worth on labelled rows.

    Attributes:
        accuracy: Share of rows whose most probable class is right.
        ece: Expected calibration error in 15 bins of equal width: the mean over all rows of the difference between
            the mean confidence and the accuracy of the row's bin (Guo et al. 2017, arXiv 1706.04599).
        nll: Mean negative log-likelihood of the labels, in nats.
    """

    accuracy: float
    ece: float
    nll: float


def scores(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Scores:
    """Score logits (rows, classes), divided by ``temperature``, on labels (rows)."""
    logits = logits.double() / temperature
    probabilities = logits.softmax(dim=1)
    return Scores(
        accuracy=float((logits.argmax(dim=1) == labels).double().mean()),
        ece=float(multiclass_calibration_error(probabilities, labels, logits.shape[1], n_bins=BINS, norm="l1")),
        nll=float(cross_entropy(logits, labels)),
    )


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature, between 0.01 and 100, that logits (rows, classes) have the least ``nll`` at.

    The ``nll`` is convex in the inverse temperature, so that halving the interval in which its slope changes sign finds
    the minimum. Temperature scaling is by Guo et al. 2017, arXiv 1706.04599.
    """
    logits = logits.double()
    of_label = logits.gather(1, labels[:, None]).mean()

    def slope(inverse: float) -> float:
        """The derivative of the ``nll`` by the inverse temperature."""
        return float(((logits * inverse).softmax(dim=1) * logits).sum(dim=1).mean() - of_label)

    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) <= 0 else (low, middle)
    return 2 / (low + high)


def joined(batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join the logits and the labels of batches."""
    logits, labels = zip(*batches, strict=True)
    return torch.cat(logits), torch.cat(labels)
