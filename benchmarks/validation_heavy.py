"""Gradual unfreezing with as many rows to validate on as to train on, reuse in the validation only.

python benchmarks/validation_heavy.py [--pairs 5]
"""

from __future__ import annotations

from collections.abc import Iterator

from _common import Figure, Options, main
from _encoder import Sizes, Stage, compare

STAGES = tuple(Stage(blocks, until) for blocks, until in ((0, 5), (1, 10), (2, 15), (4, 20)))


def figures(options: Options) -> Iterator[Figure]:
    """Compare two ways: plain, and with reuse in the validation."""
    turns = compare(Sizes.of(options, train_batches=5, val_batches=5), STAGES, ("plain", "validation"), options)
    ratios = [plain / reused for plain, reused in turns]
    yield Figure.of(
        'validation on half of the rows: faster by reuse in the validation ("validation")', ratios, ">= 1.3"
    )


if __name__ == "__main__":
    main(__doc__, figures)
