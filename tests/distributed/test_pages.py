"""The configurations in the documentation's pages on strategies, run as they stand on two ranks."""

from __future__ import annotations

import os
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from finetuning_scheduler.strategy_adapters import StrategyAdapter
from tests.docs import pages
from tests.reference import cases, harness

PAGES = Path(__file__).parents[2] / "docs" / "strategies"


def blocks(page: str) -> list[str]:
    return [block.text for block in pages.blocks(f"docs/strategies/{page}.md", "python")]


def instead(page: str, block: str) -> str:
    """The page's program with a block in place of its own strategy and scheduler."""
    before, after = blocks(page)[0].split("\nL.seed_everything")
    return f"{before}\n{block}\nL.seed_everything{after}"


def with_method(page: str, number: int) -> str:
    """The page's program with one of the page's other blocks as a method of the module."""
    method = textwrap.indent(blocks(page)[number], "    ")
    return clipped(blocks(page)[0].replace("    def configure_optimizers", f"{method}\n    def configure_optimizers"))


def clipped(program: str) -> str:
    return program.replace("max_epochs=20", "max_epochs=20, gradient_clip_val=0.05")


def on_one_device(rows: int) -> str:
    """The first page's program on one device, with the rows in the order in which Lightning shares them out."""
    program = blocks("ddp")[0].replace('devices=2, strategy="ddp"', "devices=1")
    loader = "DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=8)"
    assert loader in program
    same_order = f"""DataLoader(
        data := TensorDataset(x, (x[:, 0] > 0).long()),
        batch_size={rows},
        sampler=torch.utils.data.DistributedSampler(data, num_replicas=1, rank=0, shuffle=seed == 1),
    )"""
    return program.replace(loader, same_order)


FLAT = instead("fsdp", blocks("fsdp")[1]).replace("self.parameters()", "self.trainer.model.parameters()")
MIXED_PRECISION = "from torch.distributed.fsdp import MixedPrecisionPolicy\n" + instead("fsdp2", blocks("fsdp2")[1])
PROGRAMS: dict[str, tuple[str, int]] = {  # with the rows of a combined batch
    "ddp": (blocks("ddp")[0], 16),
    "fsdp": (blocks("fsdp")[0], 16),
    "fsdp, flattened": (FLAT, 16),
    "fsdp, clipped": (with_method("fsdp", 2), 16),
    "fsdp2": (blocks("fsdp2")[0], 16),
    "fsdp2, mixed precision": (MIXED_PRECISION, 16),
    "tensor parallel": (blocks("tensor_parallel")[0], 8),
    "tensor parallel, clipped": (with_method("tensor_parallel", 1), 8),
}


def run(program: str, root: Path) -> tuple[int, dict[str, torch.Tensor]]:
    import lightning.pytorch.strategies

    os.chdir(root)
    lightning.pytorch.strategies.FSDPStrategy = cases.FSDPOnCPU  # Lightning's own wants GPUs
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(program.replace("L.Trainer(", 'L.Trainer(accelerator="cpu", enable_progress_bar=False, '), names)
    return names["scheduler"].curr_depth, cases.whole_weights(names["trainer"].strategy.model)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_page_trains_what_one_device_would(name: str, tmp_path: Path) -> None:
    program, rows = PROGRAMS[name]
    reference = clipped(on_one_device(rows)) if "clipped" in name else on_one_device(rows)
    (alone, expected), *_ = harness.run_ranks(run, 1, reference, tmp_path)
    for depth, weights in harness.run_ranks(run, 2, program, tmp_path):
        assert depth == alone == 2
        # A bfloat16 has 8 bits of precision; its rounding changes what the optimizer makes of small gradients.
        tolerance = 5e-3 if "precision" in name else 1e-5
        torch.testing.assert_close(weights, expected, rtol=0, atol=tolerance)


def test_a_plan_shards_the_other_dimension_of_a_mesh(tmp_path: Path) -> None:
    program = instead("tensor_parallel", blocks("tensor_parallel")[2]).replace(
        "data_parallel_size=1, tensor_parallel_size=2", "data_parallel_size=2, tensor_parallel_size=2"
    )
    (alone, expected), *_ = harness.run_ranks(run, 1, on_one_device(16), tmp_path)
    for depth, weights in harness.run_ranks(run, 4, program.replace("devices=2", "devices=4"), tmp_path):
        assert depth == alone == 2
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-5)


def test_an_adapter_of_ones_own_is_used(tmp_path: Path) -> None:
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "adapters.py").write_text(blocks("adapters")[0], encoding="utf-8")
    scheduler = blocks("adapters")[1].replace("FinetuningScheduler(", "FinetuningScheduler(schedule, ")
    program = instead("ddp", f"import sys\nsys.path.insert(0, '.')\n{scheduler}")
    for lines in harness.run_ranks(printed, 2, program, tmp_path):
        assert lines == [f"phase: {count} tensors are trainable" for count in (2, 4, 8)]


def printed(program: str, root: Path) -> list[str]:
    from contextlib import redirect_stdout
    from io import StringIO

    with redirect_stdout(StringIO()) as output:
        run(program, root)
    return [line for line in output.getvalue().splitlines() if line.startswith("phase:")]


def test_the_page_on_adapters_lists_every_method() -> None:
    text = (PAGES / "adapters.md").read_text(encoding="utf-8").split("## Methods")[1]
    documented = set(re.findall(r"`(\w+)\(", "\n".join(re.findall(r"^\|([^|]*)\|", text, flags=re.MULTILINE))))
    methods = {name for name, value in vars(StrategyAdapter).items() if callable(value) and not name.startswith("_")}
    assert documented == methods


def hand_written_loop(block: str) -> tuple[list[int], dict[str, bool]]:
    """The page's runner, of which one rank's metric stops improving: the phase after each epoch, and other answers."""
    import torch.distributed as dist

    from finetuning_scheduler import PhaseRunner

    dist.init_process_group("gloo")
    try:
        first = harness.rank() == 0
        names: dict[str, Any] = {"torch": torch, "nn": torch.nn, "PhaseRunner": PhaseRunner}
        exec(block, names)  # the page is ours
        runner, ranks, phases = names["runner"], names["Processes"](), []
        for metric in (1.0, 2.0 if first else 0.5, 0.25):
            runner.epoch_end(metric)
            phases.append(runner.phase)
        answers = {"any": ranks.any(first), "every": ranks.every(first), "from zero": ranks.from_zero(lambda: first)}
    finally:
        dist.destroy_process_group()
    return phases, answers


def test_processes_of_a_hand_written_loop_run_out_of_patience_together() -> None:
    block = pages.blocks("docs/programs.md", "python")[-1]
    assert block.heading == "Loops written by hand"
    for phases, answers in harness.run_ranks(hand_written_loop, 2, block.text):
        assert phases == [0, 1, 1]
        assert answers == {"any": True, "every": False, "from zero": True}
