"""Is what a phase thaws really trained, and does what is frozen rest? Watched until the end of its first epoch."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .checksums import Checksums
from .optim.param_groups import mesh_of
from .ranks import OneProcess, Ranks
from .schedule.collapse import collapsed
from .schedule.wording import listed
from .session import Report, Session
from .steps import stepping
from .transitions import Listener

MAX_STEPS = 100  # an epoch may be endless

_UNUSED = (
    "not used in `forward`, used behind `detach` or under `no_grad`, part of a compiled model that was not traced "
    "anew, or checkpointed with use_reentrant=True (reentrant) over inputs that need no gradient"
)


@dataclass(frozen=True)
class Judgement:
    """What became of the parameters in the first steps of a phase, by full name.

    Attributes:
        phase: The phase.
        steps: How many steps it had made.
        trained: Parameters, thawed when it began, that a gradient has reached.
        untrained: Those that none has reached.
        moved: Frozen parameters that the optimizer holds and has changed.
    """

    phase: int
    steps: int
    trained: tuple[str, ...]
    untrained: tuple[str, ...]
    moved: tuple[str, ...]


class GradientWatch(Listener):
    """Finds parameters that a phase thaws and no gradient reaches, and frozen ones that the optimizer changes.

    Each phase is judged once: at the first end of an epoch that it has seen the whole of, after ``MAX_STEPS`` steps
    in a longer one, or else when it is left. What is wrong is told in one warning. A parameter is watched until its
    first gradient; nothing of it is left in later steps. The values of frozen parameters are read only if the optimizer
    holds any, and only around few steps; nothing waits for a device before the judgement. What FSDP has flattened into
    one tensor gets its gradient together, and is trained as soon as a part of it is.

    Args:
        session: Executes the schedule.
        ranks: The processes that train together: a gradient on one of them is enough.
        report: Where messages go: ``report(logging level, text)``; the package's logger if not given.

    Attributes:
        judgements: What was found, phase by phase.
    """

    def __init__(self, session: Session, *, ranks: Ranks | None = None, report: Report | None = None) -> None:
        self.judgements: list[Judgement] = []
        self._session = session
        self._ranks = ranks or OneProcess()
        self._report = report or logging.getLogger("finetuning_scheduler").log
        self._thawed: list[str] = []  # in the same order on every rank, as what follows
        self._waiting: dict[str, RemovableHandle | None] = {}
        self._frozen: dict[str, nn.Parameter] = {}
        self._before: Checksums | None = None
        self._around: list[tuple[Checksums, Checksums]] = []
        self._handles: list[RemovableHandle] = []
        self._due = self._began_inside = False
        self._steps = self._steps_in_epoch = 0

    def step(self) -> None:
        """Count an optimizer step; judge a phase whose first epoch is long."""
        self._steps += 1
        self._steps_in_epoch += 1
        self._before = None
        if self._due and self._steps >= MAX_STEPS:
            self.judge()

    def epoch_end(self, *, whole: bool = True) -> None:
        """Judge a phase at the end of the first epoch that it has seen from the beginning.

        Args:
            whole: Whether the loop has run through all of the epoch: not if it was resumed inside of it.
        """
        whole = whole and not self._began_inside
        self._steps_in_epoch, self._began_inside = 0, False
        if whole:
            self.judge()

    def judge(self) -> None:
        """Judge the present phase if it has made a step and was not judged yet. All ranks have to call it together."""
        if not self._due or self._steps == 0:
            return
        thawed, waiting, moved = self._thawed, self._waiting, self._moved()
        untrained: list[str] = []
        if self._ranks.any(bool(waiting or moved)):
            untrained = [name for name in thawed if self._ranks.every(name in waiting)]
            moved = {name for name in self._frozen if self._ranks.any(name in moved)}
        names, missed = self._session.view.expanded, frozenset(untrained)
        judgement = Judgement(
            self._session.phase,
            self._steps,
            trained=tuple(names(name for name in thawed if name not in missed)),
            untrained=tuple(names(untrained)),
            moved=tuple(names(name for name in self._frozen if name in moved)),
        )
        self.judgements.append(judgement)
        if messages := [*self._about_untrained(judgement, untrained), *self._about_moved(judgement)]:
            self._report(logging.WARNING, " ".join(messages))
        self.close()

    def close(self) -> None:
        """Stop watching."""
        self._due = False
        self._stop(list(self._waiting))
        self._detach()
        self._thawed, self._frozen, self._around, self._before = [], {}, [], None

    def before_thaw(self, thawed: Mapping[str, nn.Parameter]) -> None:
        """Judge a phase that is left early; what it has not made a step with is judged with what follows."""
        self.judge()
        self._thawed += thawed

    def after_thaw(self) -> None:
        """Watch what has been thawed, and what is frozen and in the optimizer."""
        session = self._session
        trained = set(session.trained_names)
        self._stop([name for name in self._waiting if name not in trained])
        self._thawed = [name for name in self._thawed if name in trained]
        for name in self._thawed:
            if name not in self._waiting:
                self._waiting[name] = self._hooked(name, session.parameters[name])
        self._frozen = {
            name: session.parameters[name]
            for names in session.group_names
            for name in names
            if name in session.parameters and not session.parameters[name].requires_grad
        }
        self._around, self._before, self._steps = [], None, 0
        self._due, self._began_inside = True, self._steps_in_epoch > 0
        self._attach(session.optimizer)

    def _hooked(self, name: str, parameter: nn.Parameter) -> RemovableHandle | None:
        """Have a gradient told when it arrives; sharded parameters get theirs in another way, see `_after_step`."""
        if isinstance(parameter, UninitializedParameter) or not (parameter.requires_grad and parameter.is_leaf):
            return None
        hook = partial(self._received, name)
        handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        return handle

    def _received(self, name: str, _: Tensor) -> None:
        self._stop([name])

    def _stop(self, names: Iterable[str]) -> None:
        for name in names:
            if (handle := self._waiting.pop(name, None)) is not None:
                handle.remove()

    def _attach(self, optimizer: Optimizer) -> None:
        self._detach()
        if (inner := stepping(optimizer)) is not None:
            self._handles = [
                inner.register_step_pre_hook(self._before_step),
                inner.register_step_post_hook(self._after_step),
            ]

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before_step(self, *_: object) -> None:
        # Around the first step, the second, the fourth, ...: enough to be fair to warm-up and rare gradients. A class
        # that calls its base class's step calls the hooks twice: the first call counts here, the last one below.
        if self._frozen and self._before is None and self._steps & (self._steps + 1) == 0:
            self._before = Checksums.of(self._frozen)

    def _after_step(self, *_: object) -> None:
        if self._before is not None:
            self._around.append((self._before, Checksums.of(self._frozen)))
        if self._waiting:
            parameters = self._session.parameters
            self._stop([name for name in self._waiting if parameters[name].grad is not None])

    def _moved(self) -> set[str]:
        return {name for before, after in self._around for name in before.changed(after)}

    def _about_untrained(self, judgement: Judgement, untrained: Iterable[str]) -> Iterator[str]:
        view = self._session.view
        by_cause: dict[str, list[str]] = {}
        for name in untrained:
            by_cause.setdefault(_likely_cause(view.trained[name]), []).extend(view.expanded([name]))
        if by_cause:
            count = len(judgement.untrained)
            yield (
                f"No gradient has reached {count} of the {count + len(judgement.trained)} tensors that phase "
                f"{judgement.phase} has thawed, up to its optimizer step {judgement.steps}."
            )
        for cause, names in by_cause.items():
            yield f"{self._said(names)}: likely {cause}."

    def _about_moved(self, judgement: Judgement) -> Iterator[str]:
        if judgement.moved:
            yield (
                f"The optimizer holds and changes {len(judgement.moved)} frozen tensors in phase {judgement.phase}: "
                f"{self._said(judgement.moved)}. Leave them out of the optimizer, or set `enforce_phase0_params=True`."
            )

    def _said(self, names: Iterable[str]) -> str:
        return listed([f"`{pattern}`" for pattern in collapsed(names, self._session.view.tensors)])


def _likely_cause(parameter: nn.Parameter) -> str:
    if not parameter.requires_grad:
        return "frozen again by something else"
    own_kind = type(parameter).__torch_dispatch__ is not Tensor.__torch_dispatch__ and mesh_of(parameter) is None
    if own_kind or not (parameter.is_floating_point() or parameter.is_complex()):
        return f"quantised ({type(parameter).__name__}), which takes no gradients"
    return _UNUSED
