"""A phase in which the head alone trains, 10 epochs, with reuse and without; the limit looks features up by hand.

python benchmarks/head_only.py [--pairs 5]
"""

from __future__ import annotations

from collections.abc import Iterator

from _common import Figure, Options, main
from _encoder import Sizes, Stage, compare


def figures(options: Options) -> Iterator[Figure]:
    """Compare three ways: plain, with reuse, by hand."""
    sizes = Sizes.of(options, batch=32, train_batches=40, val_batches=10)
    turns = compare(sizes, (Stage(0, 10),), ("plain", "all", "by hand"), options)
    limit = Figure.of("", [plain / by_hand for plain, _, by_hand in turns], ">= 1").value
    ratios = [plain / reused for plain, reused, _ in turns]
    yield Figure.of("head only, 10 epochs: faster by reuse", ratios, ">= 7", limit=limit)


if __name__ == "__main__":
    main(__doc__, figures)
