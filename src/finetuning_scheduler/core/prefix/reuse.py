"""Frozen-prefix reuse as a listener of the engine, for any loop."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from ..optim.param_groups import mesh_of
from ..ranks import Ranks
from ..session import Report, Session
from ..settings import Settings
from ..transitions import Listener
from .accounts import PrefixAccount
from .closeness import Comparison
from .stage import Stage
from .store import PrefixStore
from .trial import Quiet, Trials

StageName = Literal["train", "validation"]
_STAGES: dict[str, tuple[StageName, ...]] = {"off": (), "validation": ("validation",), "all": ("train", "validation")}


class FrozenPrefix(Listener):
    """Computes what runs before the first trained parameter once a sample, and replays it.

    A loop calls :meth:`train` and :meth:`validate` with its steps, and :meth:`epoch_end`; the rest follows the session.

    Args:
        session: Executes the schedule.
        settings: ``frozen_prefix`` and what goes with it.
        ranks: The processes that train together, if there are several: those of a node share what is kept.
        report: Where messages go: ``report(logging level, text)``; the package's logger if not given.
        quiet: Keeps what a step reports from being counted twice, while a batch is run once more.
    """

    def __init__(
        self,
        session: Session,
        settings: Settings,
        *,
        ranks: Ranks | None = None,
        report: Report | None = None,
        quiet: Quiet = nullcontext,
    ) -> None:
        self._session = session
        self._report = report or logging.getLogger("finetuning_scheduler").log
        self._past: list[PrefixAccount] = []
        self._stages: dict[str, Stage] = {}
        self._phase: int | None = None  # none has begun
        self._store: PrefixStore | None = None
        self._reason: str | None = None
        self._told: set[str] = set()
        self._warned = False
        self._running = False
        self._left_out: dict[str, str] = {}
        if names := _STAGES[settings.frozen_prefix]:
            directory = None if settings.prefix_dir is None else Path(settings.prefix_dir)
            shared = None if ranks is None else ranks.from_zero(lambda: uuid.uuid4().hex)
            store = PrefixStore(settings.prefix_budget, directory, settings.prefix_dtype, shared=shared)
            self._store = store
            trials = Trials(session.view.model, lambda: session.optimizer, quiet)
            for name in names:
                self._stages[name] = Stage(
                    name,
                    session,
                    store,
                    trials,
                    self.turn_off,
                    self._teller(name),
                    Comparison(settings.prefix_dtype),
                    shared=shared is not None,
                )
            if (reason := _sharded(session)) is not None:
                self.turn_off(reason)

    @property
    def accounts(self) -> list[PrefixAccount]:
        """What reuse has done, phase by phase, up to now."""
        return [*self._past, *self._present()]

    @property
    def reason(self) -> str | None:
        """Why there is no reuse any more in this session, if there is none."""
        return self._reason

    def reuses(self, stage: StageName) -> bool:
        """Whether a stage may be given to this object at all."""
        return stage in self._stages

    def train(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run ``step(*args, **kwargs)``, the forward pass and the loss of a batch, and return what it returns.

        Some batches are run more than once, without anything remaining of it in modules and random generators.
        """
        return self._run("train", step, args, kwargs)

    def validate(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run ``step(*args, **kwargs)``, the validation of a batch, and return what it returns."""
        return self._run("validation", step, args, kwargs)

    def after_backward(self) -> None:
        """Take note that the backward pass of the last training step is over."""
        for stage in self._stages.values():
            stage.after_backward()

    def epoch_end(self, *stages: StageName) -> None:
        """Take note that an epoch of a stage is over, of all if none is named."""
        for name, stage in self._stages.items():
            if not stages or name in stages:
                stage.epoch_ends()

    def leave_out(self, stage: StageName, reason: str) -> None:
        """Go on without reuse in one stage, and say why."""
        if (left := self._stages.pop(stage, None)) is not None:
            self._left_out[stage] = reason
            left.close()
            self._report(logging.WARNING, f"Frozen-prefix reuse is off in {stage} steps: {reason}.")

    def turn_off(self, reason: str) -> None:
        """Go on without reuse, and say why."""
        if self._reason is None:
            self._reason = reason
            self._report(logging.WARNING, f"Frozen-prefix reuse is off from now on: {reason}.")
        for stage in self._stages.values():
            stage.note(reason)
        self.close()

    def close(self) -> None:
        """Let modules be called as before, and remove what is kept."""
        self._past += self._present()
        for stage in self._stages.values():
            stage.close()
        self._stages = {}
        if self._store is not None:
            self._store.close()
            self._store = None

    def after_thaw(self) -> None:
        """Follow a change of what is trained."""
        if self._phase is not None:
            self._past += self._present()
        self._phase = self._session.phase
        for stage in self._stages.values():
            stage.phase_begins()

    def _run(self, name: str, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        stage = self._stages.get(name)
        if stage is None or self._running:  # a validation step that calls the training step is a validation step
            return step(*args, **kwargs)
        self._running = True
        try:
            return stage.run(step, args, kwargs)
        finally:
            self._running = False

    def _present(self) -> list[PrefixAccount]:
        phase = self._session.phase if self._phase is None else self._phase
        left_out = [PrefixAccount(phase, name, reason=why) for name, why in self._left_out.items()]
        return [*left_out, *(stage.account(phase) for stage in self._stages.values())]

    def _teller(self, stage: str) -> Callable[[str, bool], None]:
        def tell(reason: str, misused: bool) -> None:
            if reason not in self._told:
                self._told.add(reason)
                text = f"Phase {self._session.phase} goes without frozen-prefix reuse in its {stage} steps: {reason}."
                # Who has asked for reuse and gets none at all has to see it, once.
                self._report(logging.WARNING if misused and not self._warned else logging.INFO, text)
                self._warned |= misused

        return tell


def _sharded(session: Session) -> str | None:
    model = session.view.model
    if any(isinstance(each, (FullyShardedDataParallel, FSDPModule)) for each in model.modules()):
        return "the model is sharded by FSDP"
    if any(mesh_of(each) is not None for each in model.parameters()):
        return "parameters are distributed tensors"
    return None
