"""LP-FT (the head for 5 epochs, then everything for 5) with reuse, against fine-tuning everything for 5 epochs.

python benchmarks/lp_ft.py [--pairs 5]
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from _common import Figure, Options, alternate, main
from _encoder import Sizes, Stage, Way, fit

FULL = (Stage("everything", 5),)
LP_FT = (Stage(0, 5), Stage("everything", 10))


def figures(options: Options) -> Iterator[Figure]:
    """Compare three ways: all of it plain, LP-FT with reuse, and LP-FT by hand."""
    sizes = Sizes.of(options, train_batches=16, val_batches=4)

    def seconds(stages: tuple[Stage, ...], way: Way) -> float:
        return fit(sizes, stages, way)[0]

    for stages, way in ((FULL, "plain"), (LP_FT, "all"), (LP_FT, "by hand")):
        fit(Sizes.tiny(), stages, way)  # so that nothing is done for the first time in what is measured
    kinds = (partial(seconds, FULL, "plain"), partial(seconds, LP_FT, "all"), partial(seconds, LP_FT, "by hand"))
    turns = alternate(*kinds, pairs=options.pairs, warm_up=0)
    limit = Figure.of("", [by_hand / full for full, _, by_hand in turns], ">= 1").value
    ratios = [reused / full for full, reused, _ in turns]
    yield Figure.of("LP-FT with reuse, time against full fine-tuning alone", ratios, "<= 1.15", limit=limit)


if __name__ == "__main__":
    main(__doc__, figures)
