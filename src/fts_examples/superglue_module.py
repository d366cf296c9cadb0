"""A transformer with a classification head for SuperGLUE's RTE and BoolQ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAccuracy, BinaryF1Score
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig

from fts_examples._text_data import Batch, ModelError
from fts_examples.superglue_data import RteBoolqDataModule, TaskName


class RteBoolqModule(L.LightningModule):
    """Classify pairs of texts; logs ``val_loss``, which phases watch, ``accuracy`` and ``f1`` of the second label.

    In a configuration ``optimizer_init`` and ``lr_scheduler_init`` are a ``class_path`` and ``init_args``.

    Args:
        model_name_or_path: Hub id or folder of a transformer.
        task_name: ``rte`` or ``boolq``.
        optimizer_init: Makes the optimizer of its parameters.
        lr_scheduler_init: Makes the LR scheduler of its optimizer.
        pl_lrs_cfg: Lightning's configuration of the LR scheduler: ``interval``, ``frequency``, ``name``, ...
        model_cfg: What is different in the model's configuration, such as ``{"hidden_dropout_prob": 0.2}``.
        no_decay: Fragments of names; parameters with one of them get no weight decay.
        experiment_tag: Name of the folder of logs on the command line.

    Raises:
        ModelError: The model cannot be loaded, or `no_decay` is one text. In `setup`; the data module has another task.
    """

    def __init__(
        self,
        model_name_or_path: str = "microsoft/deberta-v3-base",
        task_name: TaskName = "rte",
        optimizer_init: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler_init: LRSchedulerCallable | None = None,
        pl_lrs_cfg: dict[str, Any] | None = None,
        model_cfg: dict[str, Any] | None = None,
        no_decay: list[str] | None = None,
        experiment_tag: str = "default",
    ) -> None:
        super().__init__()
        if isinstance(no_decay, str):  # each of its letters would be a fragment
            raise ModelError(f"expected `no_decay` to be a list, got {no_decay!r}. Fix: Write [{no_decay!r}].")
        self.save_hyperparameters(ignore=["optimizer_init", "lr_scheduler_init"])
        self.optimizer_init = optimizer_init
        self.lr_scheduler_init = lr_scheduler_init
        self.pl_lrs_cfg = pl_lrs_cfg or {}
        self.task_name = task_name
        self.no_decay = no_decay
        self.model = load_classifier(model_name_or_path, model_cfg or {})
        self.metrics = MetricCollection({"accuracy": BinaryAccuracy(), "f1": BinaryF1Score()})

    def setup(self, stage: str) -> None:
        """Compare the task with the data's."""
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, RteBoolqDataModule) and data.task_name != self.task_name:
            raise ModelError(
                f"expected one task of model and data, got {self.task_name!r} and {data.task_name!r}. "
                "Fix: Give both the same `task_name`."
            )

    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        """Map token tensors (batch, length) to logits (batch, 2)."""
        logits: Tensor = self.model(**tokens).logits
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the batch's loss."""
        tokens, labels = batch
        loss = cross_entropy(self(tokens), labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the loss that early stopping and checkpoints watch, and the metrics."""
        tokens, labels = batch
        logits = self(tokens)
        self.log("val_loss", cross_entropy(logits, labels), prog_bar=True, sync_dist=True, batch_size=len(labels))
        self.metrics.update(logits.argmax(dim=1), labels)
        self.log_dict(self.metrics, prog_bar=True, batch_size=len(labels))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Do as in validation."""
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the logits."""
        logits: Tensor = self(batch[0])
        return logits

    def configure_optimizers(self) -> Any:
        """Make the optimizer of what phase 0 trains, of everything without a schedule; and the LR scheduler."""
        optimizer = self.optimizer_init(self._parameter_groups())
        if self.lr_scheduler_init is None:
            return optimizer
        lr_scheduler = self.lr_scheduler_init(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {**self.pl_lrs_cfg, "scheduler": lr_scheduler}}

    def _parameter_groups(self) -> list[dict[str, Any]]:
        # The strategy's model: with FSDP it can have a flat tensor that is not in this module.
        model = self.trainer.model or self
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        exempt = [parameter for name, parameter in trained if has_fragment(name, self.no_decay or ())]
        exempt_ids = set(map(id, exempt))
        decayed = [parameter for _, parameter in trained if id(parameter) not in exempt_ids]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": exempt, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]


def has_fragment(name: str, fragments: Sequence[str]) -> bool:
    """Whether a fragment is part of a name."""
    return any(fragment in name for fragment in fragments)


def load_classifier(model_name_or_path: str, changes: dict[str, Any]) -> nn.Module:
    """Load a transformer with a new head for two labels, in 32 bits and in train mode.

    Raises:
        ModelError: There is no such model, or its configuration has no such key.
    """
    try:
        config = _changed(AutoConfig.from_pretrained(model_name_or_path, num_labels=2), changes)
        # Some checkpoints, DeBERTa-v3-base's among them, are stored in 16 bits.
        model: nn.Module = AutoModelForSequenceClassification.from_pretrained(
            model_name_or_path, config=config, dtype=torch.float32
        )
    except ModelError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # the last for weights of other shapes
        raise ModelError(
            f"{model_name_or_path}: expected a folder or hub id of a transformer for classification, got: "
            f"{str(error).rstrip('.')}. Fix: Give one as --model.init_args.model_name_or_path."
        ) from error
    return model.train()  # it comes in eval mode, without dropout


def _changed(config: PretrainedConfig, changes: dict[str, Any]) -> PretrainedConfig:
    for key, value in changes.items():
        if not hasattr(config, key):
            raise ModelError(
                f"expected `model_cfg` to have keys of {type(config).__name__}, got {key!r}. Fix: Drop it."
            )
        setattr(config, key, value)
    return config
