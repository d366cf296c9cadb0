"""What it costs to watch whether everything thawed is trained: the first steps of a phase, watched and not watched.

Both are run alternately in one process, and the ratio of their times is printed: the median of all pairs, with the
quartiles. One layer is never used, so that the watch lasts to the end. Later steps are not watched at all.

    python benchmarks/gradient_watch.py [--pairs 15] [--steps 25] [--device cpu]
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from finetuning_scheduler.core import PhaseRunner

WIDTH, LAYERS, TOKENS, ROWS = 128, 4, 32, 8


class Encoder(nn.Module):
    """A small transformer, and a layer that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS)
        self.spare = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Encode, and read off one number."""
        return self.head(self.encoder(x)).mean()


def seconds(device: torch.device, steps: int, *, watched: bool) -> float:
    """Train the first steps of a phase, its judgement included."""
    torch.manual_seed(0)
    model = Encoder().to(device)
    runner = PhaseRunner(model, AdamW(model.parameters()), {0: {"params": [".*"]}}, restore_best=False)
    if not watched:
        runner.gradients.close()
    batch = torch.randn(ROWS, TOKENS, WIDTH, device=device)
    clock = time.process_time if device.type == "cpu" else time.perf_counter  # others may use the processor too
    started = clock()
    for _ in range(steps):
        runner.optimizer.zero_grad()
        runner.model(batch).square().backward()
        runner.optimizer.step()
        runner.step()
    runner.epoch_end()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - started


def main() -> None:
    """Measure, and print one line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    arguments = parser.parse_args()
    logging.getLogger("finetuning_scheduler").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    ratios = []
    for pair in range(-1, arguments.pairs):  # the first pair warms up
        times = {}
        for watched in (True, False) if pair % 2 else (False, True):
            times[watched] = seconds(arguments.device, arguments.steps, watched=watched)
        if pair >= 0:
            ratios.append(times[True] / times[False])
    low, median, high = statistics.quantiles(ratios, n=4)
    step = times[False] / arguments.steps
    print(
        f"watched / not watched: {median:.4f} (quartiles {low:.4f} to {high:.4f} of {len(ratios)} pairs, "
        f"{arguments.steps} steps of {step * 1000:.1f} ms, {arguments.device})"
    )


if __name__ == "__main__":
    main()
