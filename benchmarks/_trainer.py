"""The trainer of the benchmarks: one process on the CPU, which logs and shows nothing."""

from __future__ import annotations

from typing import Any

import lightning as L


def quiet_trainer(folder: str, **options: Any) -> L.Trainer:
    """Make a trainer that writes below a folder; options are those of ``Trainer``."""
    usual: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(default_root_dir=folder, **{**usual, **options})
