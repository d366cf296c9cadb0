"""Fine-tune a small Llama-style decoder by a schedule, with FSDP2 or tensor parallel.

Run it in this folder, for example with ``python mp_examples.py fit --config config/fts_fsdp_auto_plan.yaml``: on two
GPUs, or on two processes of a machine without any.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import lightning as L
import torch
import torch.distributed
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy

from fts_examples.model_parallel.decoder import Decoder, DecoderConfig, SizeError
from fts_examples.model_parallel.sequences import CountingSequences
from fts_examples.model_parallel.tensor_parallel import PlanName, parallelize
from fts_examples.profiling.memprofiler import MemProfiler


class DecoderModule(L.LightningModule):
    """Learns to predict the next token.

    Args:
        decoder: Sizes of the decoder.
        tp_plan: How a tensor-parallel mesh is used, if the strategy has one: see :func:`.parallelize`. Sharding by
            FSDP2 is left to the ``fsdp_plan`` of the strategy adapter.
        lr: Learning rate of phase 0.
    """

    def __init__(self, decoder: DecoderConfig, tp_plan: PlanName | None = None, lr: float = 1e-2) -> None:
        super().__init__()
        self.model = Decoder(decoder)
        self.tp_plan = tp_plan
        self.lr = lr

    def configure_model(self) -> None:
        """Parallelise the decoder, once, over the ranks that the strategy has for that.

        Raises:
            MisconfigurationException: There are such ranks but no plan for them.
            SizeError: The decoder's sizes do not fit their number.
        """
        mesh = None if self.device_mesh is None else self.device_mesh["tensor_parallel"]
        if mesh is None or mesh.size() == 1 or any(isinstance(p, DTensor) for p in self.model.parameters()):
            return
        if self.tp_plan is None:
            message = f"expected a tp_plan, since the strategy has tensor_parallel_size={mesh.size()}, got none"
            fix = "Set model.tp_plan to 'tensor' or 'sequence', or tensor_parallel_size to 1."
            raise MisconfigurationException(f"{message}. Fix: {fix}")
        parallelize(self.model, mesh, self.tp_plan)

    @MemProfiler.memprofilable
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss of a token."""
        return self._loss(batch)

    @MemProfiler.memprofilable
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the loss that ends phases and chooses checkpoints, the same on all ranks."""
        self.log("val_loss", self._loss(batch), prog_bar=True, sync_dist=True)

    def _loss(self, batch: list[Tensor]) -> Tensor:
        tokens, following = batch
        return cross_entropy(self.model(tokens).flatten(0, 1), following.flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Optimize with AdamW; the schedule decides which parameters it holds."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class ModelParallelCLI(LightningCLI):
    """Lightning's command line, with one vocabulary for data and decoder."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Say that the data has the decoder's vocabulary."""
        parser.link_arguments("model.decoder.vocab_size", "data.vocab_size")

    def before_instantiate_classes(self) -> None:
        """Find what Lightning reports without a word on what to do.

        Raises:
            MisconfigurationException: There are not as many GPUs as are asked for, or the mesh does not have as many
                places as there are devices.
        """
        trainer = self.config[self.subcommand].trainer
        _check_gpus(trainer.accelerator, trainer.devices)
        mesh = getattr(trainer.strategy, "init_args", None) or {}
        numbers = [mesh.get("data_parallel_size"), mesh.get("tensor_parallel_size"), trainer.num_nodes, trainer.devices]
        if not all(str(number).isdecimal() for number in numbers):
            return  # "auto", or another strategy
        data, tensor, nodes, devices = (int(number) for number in numbers)
        if data * tensor != nodes * devices:
            message = (
                f"expected data_parallel_size={data} times tensor_parallel_size={tensor} to be the number of ranks"
            )
            fix = "Change trainer.devices, or a size, as --trainer.strategy.init_args.data_parallel_size."
            raise MisconfigurationException(f"{message}, got {nodes * devices}. Fix: {fix}")


def _check_gpus(accelerator: object, devices: object) -> None:
    present, wanted = torch.cuda.device_count(), int(str(devices)) if str(devices).isdecimal() else 1
    asked_for = accelerator in ("gpu", "cuda") or (accelerator == "auto" and present > 0)
    if asked_for and present < wanted:
        message = f"expected {wanted} GPUs for trainer.accelerator={accelerator}, got {present}"
        raise MisconfigurationException(f"{message}. Fix: Use --trainer.accelerator cpu, or fewer devices.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what a command line says, ``sys.argv`` if none is given."""
    words = None if arguments is None else list(arguments)
    try:
        cli = ModelParallelCLI(DecoderModule, CountingSequences, args=words, seed_everything_default=42)
    except (MisconfigurationException, SizeError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    for process in getattr(cli.trainer.strategy.launcher, "procs", ()):
        process.wait()  # the other ranks, which this one has started; their ends may take a moment longer


if __name__ == "__main__":
    main()
