"""Gradual unfreezing from end to end: the head, then 1, 2 and 4 of 12 blocks, 5 epochs each, with reuse and without.

Whole fits with recording, validation and checkpoints, the same seeds and data, equal metrics at the end. The limit is
the same program with the frozen outputs looked up by hand after one pass over the data.

    python benchmarks/gradual_unfreezing.py [--pairs 5]
"""

from __future__ import annotations

from collections.abc import Iterator

from _common import Figure, Options, main
from _encoder import Sizes, Stage, compare

STAGES = tuple(Stage(blocks, until) for blocks, until in ((0, 5), (1, 10), (2, 15), (4, 20)))


def figures(options: Options) -> Iterator[Figure]:
    """Compare three ways: plain, with reuse, by hand."""
    turns = compare(Sizes.of(options, train_batches=16, val_batches=4), STAGES, ("plain", "all", "by hand"), options)
    limit = Figure.of("", [plain / by_hand for plain, _, by_hand in turns], ">= 1").value
    ratios = [plain / reused for plain, reused, _ in turns]
    yield Figure.of("gradual unfreezing, 4 phases of 5 epochs: faster by reuse", ratios, ">= 1.9", limit=limit)
    above = [reused / by_hand for _, reused, by_hand in turns]
    yield Figure.of("the same, time against the limit", above, "<= 1.15", limit=1)


if __name__ == "__main__":
    main(__doc__, figures)
