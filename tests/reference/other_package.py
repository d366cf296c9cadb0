"""Checkpoints in the form of the 2.x package of this name, made of this package's: the same moment, told otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

Reasons = Literal["as Lightning", "none", "of an earlier phase"]
STILL, OUT_OF_PATIENCE = 0, 3  # of Lightning's `EarlyStoppingReason`
_OWN = ("score", "files")


def as_2x(checkpoint: dict[str, Any], reasons: Reasons = "as Lightning") -> dict[str, Any]:
    """Give the callbacks of a checkpoint the states that the 2.x package's keep.

    Args:
        checkpoint: One that this package has written.
        reasons: What early stopping keeps as the reason why it has stopped; which one, is nowhere documented.
    """
    states = checkpoint["callbacks"]
    state = states["FinetuningScheduler"]
    stored = checkpoint.get("optimizer_states") or [{"param_groups": [{} for _ in state["parameter_groups"]]}]
    groups = [
        {key: value for key, value in options.items() if key != "name"} | {"params": list(names)}
        for options, names in zip(stored[0]["param_groups"], state["parameter_groups"], strict=True)
    ]
    depths = {"current_ckpt_depth": state["phase"], "best_ckpt_depth": state["best_phase"]}
    converted: dict[str, Any] = {
        "FinetuningScheduler": {
            "fts_metadata": {**depths, "best_ckpt_pgs": {0: groups}},
            "internal_optimizer_metadata": {0: groups},
        }
    }
    for key, other in states.items():
        if "wait_count" in other:
            converted[multi_phase(key, "EarlyStopping")] = {**other, **reason(other, reasons)}
        elif "best_model_path" in other:
            kept = {name: value for name, value in other.items() if name not in _OWN}
            converted[multi_phase(key, "ModelCheckpoint").replace("FTSModel", "FTS")] = {**kept, **depths}
    return {**checkpoint, "callbacks": converted}


def multi_phase(key: str, base: str) -> str:
    return key.replace(base, f"FTS{base}", 1) if key.startswith(base) else key


def reason(state: dict[str, Any], reasons: Reasons) -> dict[str, Any]:
    exhausted = state["wait_count"] >= state["patience"]
    value = {"as Lightning": OUT_OF_PATIENCE if exhausted else STILL, "none": STILL}.get(reasons, OUT_OF_PATIENCE)
    return {"stopping_reason": value, "stopping_reason_message": None}


def convert(path: Path, reasons: Reasons = "as Lightning") -> Path:
    """Rewrite a checkpoint, a file or a directory of shards, in place."""
    file = path / "meta.pt" if path.is_dir() else path
    torch.save(as_2x(torch.load(file, weights_only=True), reasons), file)
    return path


def convert_all(root: Path, reasons: Reasons = "as Lightning") -> None:
    """Rewrite all checkpoints below a directory."""
    for path in sorted(root.rglob("*.ckpt")):
        convert(path, reasons)
