"""Checkpoints that know the phase they were written in."""

from __future__ import annotations

import logging
from typing import Any

import torch

from .._lightning import NotifyingModelCheckpoint, Trainer, forget_checkpoints
from .phase_holder import PhaseHolder

log = logging.getLogger("finetuning_scheduler")


class FTSCheckpoint(NotifyingModelCheckpoint):
    """``ModelCheckpoint`` for a fine-tuning schedule; it takes the same arguments.

    Attributes:
        current_ckpt_depth: Phase in which the newest checkpoint was written.
        best_ckpt_depth: Phase in which the checkpoint at ``best_model_path`` was written.
    """

    current_ckpt_depth = 0
    best_ckpt_depth = 0
    _scheduler: PhaseHolder | None = None
    _trainer: Trainer | None = None
    stands_for: str | None = None
    _written: set[str] = set()  # noqa: RUF012 - replaced, never changed, while no scheduler is attached

    def begin(self, scheduler: PhaseHolder, trainer: Trainer) -> None:
        """Attach the scheduler whose phases are recorded, and the trainer, whose metrics are saved."""
        self._scheduler = scheduler
        self._trainer = trainer
        self._written = set()

    def let_go(self) -> None:
        """Act as ``ModelCheckpoint`` again."""
        self._scheduler = self._trainer = None
        self._written = set()

    def forget(self) -> None:
        """Forget the checkpoints of an earlier fit."""
        forget_checkpoints(self)
        self.current_ckpt_depth = self.best_ckpt_depth = 0

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint: that of the user's own class, if this object stands for one of it."""
        key = super().state_key
        return key if self.stands_for is None else key.replace(type(self).__qualname__, self.stands_for, 1)

    def before_save(self, filepath: str) -> None:
        """Record the depth; that of the best checkpoint only when this file is the one recorded as best."""
        self._written.add(filepath)
        self.current_ckpt_depth = self._depth()
        if filepath == self.best_model_path:
            self.best_ckpt_depth = self.current_ckpt_depth

    def was_written_here(self, filepath: str) -> bool:
        """Whether this process wrote the file, so that its content can be trusted."""
        return filepath in self._written

    def ranked_paths(self) -> list[str]:
        """List the paths of the kept checkpoints, best first."""
        return sorted(self.best_k_models, key=lambda path: float(self.best_k_models[path]), reverse=self.mode == "max")

    def state_dict(self) -> dict[str, Any]:
        """Return ``ModelCheckpoint``'s state, the depths, and the monitored value at this moment."""
        metrics = {} if self._trainer is None else self._trainer.callback_metrics
        score = None if self.monitor is None else metrics.get(self.monitor)
        return {
            **super().state_dict(),
            "current_ckpt_depth": self._depth(),
            "best_ckpt_depth": self.best_ckpt_depth,
            "score": None if score is None else score.detach().cpu().clone(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned; in a new ``dirpath`` the given checkpoint becomes the best one."""
        self.current_ckpt_depth = state_dict.get("current_ckpt_depth", 0)
        if state_dict["dirpath"] == self.dirpath or self._trainer is None or self._trainer.ckpt_path is None:
            super().load_state_dict(state_dict)
            self.best_ckpt_depth = state_dict.get("best_ckpt_depth", 0)
        else:
            self._start_from(str(self._trainer.ckpt_path), state_dict.get("score"))
            self.best_ckpt_depth = self.current_ckpt_depth
            if self._trainer.is_global_zero:
                log.info(
                    "Checkpoints now go to %s instead of %s, which starts with %s as its best.",
                    self.dirpath,
                    state_dict["dirpath"],
                    self.best_model_path,
                )

    def _start_from(self, path: str, score: torch.Tensor | None) -> None:
        self.best_model_path, self.best_model_score, self.current_score = path, score, score
        if score is not None:
            self.best_k_models = {path: score}
            if self.save_top_k == 1:
                self.kth_best_model_path, self.kth_value = path, score

    def _depth(self) -> int:
        return self.current_ckpt_depth if self._scheduler is None else self._scheduler.curr_depth
