"""Write the default schedule with two processes, which Lightning starts in the way of the strategy that is named."""

import sys

import lightning as L
import torch

from finetuning_scheduler import FinetuningScheduler


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(4, 4)
        self.head = torch.nn.Linear(4, 1)

    def training_step(self, batch):
        return self.head(self.body(batch)).mean()


if __name__ == "__main__":
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=sys.argv[1],
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        callbacks=[FinetuningScheduler(gen_ft_sched_only=True)],
    )
    trainer.fit(Module())
    print("the program has gone on")
