"""Checkpoints that know the phase they were written in, and what they hold."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from .._lightning import NotifyingModelCheckpoint, Trainer, forget_checkpoints, is_search_checkpoint
from ..core.fingerprints import fingerprint
from .files import Mark, copied_beside, is_remote, mark_of, writes_later
from .phase_holder import PhaseHolder
from .saved_states import SavedFile

log = logging.getLogger("finetuning_scheduler")


class FTSCheckpoint(NotifyingModelCheckpoint):
    """``ModelCheckpoint`` for a fine-tuning schedule; it takes the same arguments, and one more.

    Args:
        arguments: Those of ``ModelCheckpoint``.
        save_frozen_weights: Whether parameters that no phase has thawed yet are saved. Without them a file is smaller;
            whoever loads it has to make the model as the one was that was trained, which is verified by a hash. They
            are filled in when a trainer that has a ``FinetuningScheduler`` loads the file; elsewhere use
            ``finetuning_scheduler.load_from_checkpoint``, or make the file whole with ``merge_checkpoint``.
        options: Those of ``ModelCheckpoint``.

    Attributes:
        current_ckpt_depth: Phase in which the newest checkpoint was written.
        best_ckpt_depth: Phase in which the checkpoint at ``best_model_path`` was written.
    """

    current_ckpt_depth = 0
    best_ckpt_depth = 0
    _scheduler: PhaseHolder | None = None
    _trainer: Trainer | None = None
    stands_for: str | None = None
    _files: dict[str, SavedFile] = {}  # noqa: RUF012 - replaced, never changed
    _verifies = False
    _told_of_unverified = False
    _mark: tuple[str, Mark | None] = ("", None)  # of the best checkpoint that has been written last
    _keep: Callable[[str, dict[str, Any]], None] | None = None
    _slim: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    save_frozen_weights = True

    def __init__(self, *arguments: Any, save_frozen_weights: bool = True, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.save_frozen_weights = save_frozen_weights

    def begin(self, scheduler: PhaseHolder, trainer: Trainer, *, verifies: bool = True) -> None:
        """Attach the scheduler.

        Args:
            scheduler: Its phases are recorded.
            trainer: Its metrics are saved.
            verifies: Whether checkpoints are going to be restored, and so are to be known by their content.
        """
        self._scheduler = scheduler
        self._trainer = trainer
        self._verifies = verifies
        self._told_of_unverified = False

    def give_best_to(self, keep: Callable[[str, dict[str, Any]], None]) -> None:
        """Have a function called, on every rank, with each best checkpoint that has been written, and its path."""
        self._keep = keep

    def leave_out_by(self, slim: Callable[[dict[str, Any]], dict[str, Any]] | None) -> None:
        """Have a function leave frozen weights out of what rank zero writes, if they are not to be saved."""
        self._slim = slim

    def let_go(self) -> None:
        """Act as ``ModelCheckpoint`` again."""
        self._scheduler = self._trainer = self._keep = None

    def forget(self) -> None:
        """Forget the checkpoints of an earlier fit."""
        forget_checkpoints(self)
        self.current_ckpt_depth = self.best_ckpt_depth = 0
        self._files = {}

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint: that of the user's own class, if this object stands for one of it."""
        key = super().state_key
        return key if self.stands_for is None else key.replace(type(self).__qualname__, self.stands_for, 1)

    def before_save(self, filepath: str) -> None:
        """Record the depth; that of the best checkpoint only when this file is the one recorded as best."""
        self.current_ckpt_depth = self._depth()
        # What the path has held so far is no longer known by the checkpoint that is about to be written there.
        self._files = {path: file for path, file in self._files.items() if path != filepath}
        if filepath == self.best_model_path:
            self.best_ckpt_depth = self.current_ckpt_depth

    def after_save(self, trainer: Trainer, filepath: str) -> None:
        """Record what a checkpoint holds that may be restored; forget those that are no longer kept."""
        if self._scheduler is None:
            return
        kept = {*self.best_k_models, self.best_model_path}
        self._files = {path: file for path, file in self._files.items() if path in kept}
        if filepath in kept:
            content = trainer.strategy.broadcast(self._content(trainer, filepath))
            self._files = {**self._files, filepath: SavedFile(phase=self.current_ckpt_depth, fingerprint=content)}
        if filepath == self.best_model_path:
            self._mark = (filepath, mark_of(filepath))

    def to_write(self, trainer: Trainer, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Leave out frozen weights, if they are not to be saved."""
        if self.save_frozen_weights or self._slim is None or not trainer.is_global_zero:
            return checkpoint
        return self._slim(checkpoint)

    def on_written(self, trainer: Trainer, filepath: str, checkpoint: dict[str, Any]) -> None:
        """Give the best checkpoint on."""
        if self._keep is not None and filepath == self.best_model_path:
            self._keep(filepath, checkpoint)

    def ranked_paths(self) -> list[str]:
        """List the paths of the kept checkpoints whose score is a finite number, best first."""
        scores = {path: float(score) for path, score in self.best_k_models.items() if torch.isfinite(_tensor(score))}
        return sorted(scores, key=scores.__getitem__, reverse=self.mode == "max")

    @property
    def best_is_finite(self) -> bool:
        """Whether the best score so far is a number that anything else can be compared with."""
        return self.best_model_score is None or bool(torch.isfinite(_tensor(self.best_model_score)))

    def holds_what_was_written(self, path: str) -> bool:
        """Whether a checkpoint on disk is the one that was written there, as far as that is known."""
        if is_remote(path):
            return True
        known = self._files.get(path)
        if known is None or known.fingerprint is None:
            return Path(path).exists()
        try:
            return fingerprint(Path(path)) == known.fingerprint
        except OSError:
            return False

    def seems_untouched(self, path: str) -> bool:
        """Whether the file system tells of no change since a checkpoint was written, as far as it tells anything."""
        marked, mark = self._mark
        return marked == path and mark in (None, mark_of(path))

    def drop(self, paths: Collection[str]) -> None:
        """Forget checkpoints that cannot be used; the next best is the best then, if there is one."""
        self.best_k_models = {path: score for path, score in self.best_k_models.items() if path not in paths}
        if self.best_model_path in paths:
            best = next(iter([*self.ranked_paths(), *self.best_k_models]), "")
            self.best_model_path, self.best_model_score = best, self.best_k_models.get(best)
            self.best_ckpt_depth = self._files[best].phase if best in self._files else self.best_ckpt_depth
        self._settle_worst()

    def state_dict(self) -> dict[str, Any]:
        """Return ``ModelCheckpoint``'s state, what the files hold, and the monitored value at this moment."""
        metrics = {} if self._trainer is None else self._trainer.callback_metrics
        score = None if self.monitor is None else metrics.get(self.monitor)
        return {
            **super().state_dict(),
            "current_ckpt_depth": self._depth(),
            "best_ckpt_depth": self.best_ckpt_depth,
            "score": None if score is None else score.detach().cpu().clone(),
            "files": {path: file.model_dump() for path, file in self._files.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned.

        In a new ``dirpath``, and where the checkpoints it tells of are gone, the given one becomes the best.
        """
        self.current_ckpt_depth = state_dict.get("current_ckpt_depth", 0)
        self.note_saved(state_dict.get("saved_step"))
        resumed = None if self._trainer is None else self._trainer.ckpt_path
        if self._trainer is None or resumed is None or state_dict["dirpath"] == self.dirpath:
            super().load_state_dict(state_dict)
            self.best_ckpt_depth = state_dict.get("best_ckpt_depth", 0)
            self._files = {path: SavedFile(**file) for path, file in state_dict.get("files", {}).items()}
            if self._trainer is not None and resumed is not None and not is_search_checkpoint(resumed):
                self._go_on_from(self._trainer, str(resumed), state_dict.get("score"))
        else:
            self._start_from(str(resumed), state_dict.get("score"))
            until = "" if state_dict.get("score") is not None else ", whose score it does not tell, until the next one"
            self._report(
                logging.INFO,
                f"Checkpoints now go to {self.dirpath} instead of {state_dict['dirpath']}, which starts with "
                f"{self.best_model_path} as its best{until}.",
            )

    def _go_on_from(self, trainer: Trainer, resumed: str, score: torch.Tensor | None) -> None:
        """Leave out what the resumed checkpoint tells of and is no longer there; if nothing is left, it is the best."""
        best = self.best_model_path
        lost = trainer.strategy.broadcast(self._lost(resumed) if trainer.is_global_zero else [])
        if best in lost:
            self.drop(lost)
            if not (self.best_model_path and self.best_is_finite):
                own = trainer.strategy.broadcast(self._own_copy(resumed) if trainer.is_global_zero else resumed)
                self._start_from(own, score)
            text = "The best checkpoint {}, which {} tells of, is gone or not what was written: {} is the best now."
            self._report(logging.WARNING, text.format(best, resumed, self.best_model_path))
        elif lost:
            self.drop(lost)
            self._report(logging.INFO, f"Of the kept checkpoints that {resumed} tells of, {', '.join(lost)} are gone.")
        for path in dict.fromkeys([self.best_model_path, *self.best_k_models]):
            if path and (path not in self._files or self._files[path].fingerprint is None):
                # It is the resumed file, or an earlier release has written this: what is there now has to stay.
                phase = self._files[path].phase if path in self._files else self.best_ckpt_depth
                content = trainer.strategy.broadcast(self._content(trainer, path))
                self._files = {**self._files, path: SavedFile(phase=phase, fingerprint=content)}

    def _lost(self, resumed: str) -> list[str]:
        """Name the recorded checkpoints that are gone, and those that would be the best if they were as written."""
        recorded = {self.best_model_path, *self.best_k_models} - {"", resumed}
        lost = [path for path in sorted(recorded) if not is_remote(path) and not Path(path).exists()]
        for path in dict.fromkeys([self.best_model_path, *self.ranked_paths()]):
            if path == resumed:
                break
            if path and path not in lost:
                if self.holds_what_was_written(path):
                    break
                lost.append(path)
        return lost

    def _own_copy(self, resumed: str) -> str:
        """Keep a copy of the resumed checkpoint: ``last.ckpt`` is going to be written anew."""
        if is_remote(resumed) or self.dirpath is None:
            return resumed
        path = Path(resumed)
        try:
            return str(copied_beside(path, Path(self.dirpath) / f"best-of-{path.name}"))
        except OSError as error:
            log.warning("%s could not be copied (%s): it is the best only until it is written anew.", resumed, error)
            return resumed

    def _start_from(self, path: str, score: torch.Tensor | None) -> None:
        """Take a checkpoint of the present depth as the best and only one."""
        if score is not None and torch.isnan(score):  # nothing is better than that, nothing worse: as Lightning does
            score = torch.tensor(torch.inf if self.mode == "min" else -torch.inf)
        self.best_model_path, self.best_model_score, self.current_score = path, score, score
        self.best_ckpt_depth = self.current_ckpt_depth
        self.best_k_models = {} if score is None else {path: score}
        self._settle_worst()
        if (trainer := self._trainer) is not None:
            content = trainer.strategy.broadcast(self._content(trainer, path))
            self._files = {path: SavedFile(phase=self.current_ckpt_depth, fingerprint=content)}

    def _settle_worst(self) -> None:
        """Name the worst of the kept checkpoints, which the next better one replaces, if no more are to be kept."""
        fresh = torch.tensor(torch.inf if self.mode == "min" else -torch.inf)
        self.kth_best_model_path, self.kth_value = "", fresh
        if len(self.best_k_models) == self.save_top_k:
            worst = (max if self.mode == "min" else min)(self.best_k_models, key=self.best_k_models.__getitem__)
            self.kth_best_model_path, self.kth_value = worst, self.best_k_models[worst]

    def _content(self, trainer: Trainer, path: str) -> str | None:
        """Return, on rank zero, the fingerprint of a checkpoint; say once if there is none."""
        if not (trainer.is_global_zero and self._verifies):
            return None
        if not is_remote(path) and not writes_later(trainer.strategy):
            try:
                return fingerprint(Path(path))
            except OSError:
                pass
        if not self._told_of_unverified:
            self._told_of_unverified = True
            log.info("Whether %s still holds what was written is not verified: it is no local file, or not yet.", path)
        return None

    def _report(self, level: int, message: str) -> None:
        if self._trainer is not None and self._trainer.is_global_zero:
            log.log(level, message)

    def _depth(self) -> int:
        return self.current_ckpt_depth if self._scheduler is None else self._scheduler.curr_depth


def _tensor(score: torch.Tensor | float) -> torch.Tensor:
    return torch.as_tensor(score)
