"""The model and the data that the programs beside this file train."""

import hashlib

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

torch.set_num_threads(1)

HEAD_THEN_ALL = {
    0: {"params": ["head.*"], "max_transition_epoch": 3},
    1: {"params": ["backbone.*"], "lr": 0.005},
}


class Classifier(L.LightningModule):
    def __init__(self, lr=0.02):
        super().__init__()
        self.lr = lr
        self.backbone = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 16))
        self.head = torch.nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.backbone(x))

    def training_step(self, batch, batch_idx):
        loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        scores = self(batch[0])
        self.log("val_loss", torch.nn.functional.cross_entropy(scores, batch[1]))
        self.log("val_accuracy", (scores.argmax(dim=1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def loaders(seed=0):
    """Training and validation data: is the sum of eight numbers positive?"""
    x = torch.randn(96, 8, generator=torch.Generator().manual_seed(seed))
    y = (x.sum(dim=1) > 0).long()
    return (
        DataLoader(TensorDataset(x[:64], y[:64]), batch_size=16),
        DataLoader(TensorDataset(x[64:], y[64:]), batch_size=32),
    )


def fingerprint(model):
    """Equal for weights that are equal to the last bit."""
    content = b"".join(tensor.detach().numpy().tobytes() for tensor in model.state_dict().values())
    return hashlib.sha256(content).hexdigest()
