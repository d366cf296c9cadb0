"""A transition restores from memory what it would read from disk, whatever the program; else it reads and says why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins import Precision
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import SGD, Adafactor, Adagrad, AdamW, RMSprop
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from finetuning_scheduler import FinetuningScheduler
from finetuning_scheduler.core import held
from finetuning_scheduler.strategy_adapters import StrategyAdapter
from tests.reference.networks import HEAD, SECOND, THIRD, Tied, batch_normalised, normalised
from tests.reference.recipe import PhaseSpec, Recipe, adamw
from tests.reference.toys import Session, Toy, ToyData

pytestmark = pytest.mark.quick

# Best in phase 0, from where both transitions go on; then a better one in phase 2.
EARLY = (3.0, 4.0, 5.0, 6.0, 7.0, 2.0, 3.0, 4.0)
RECIPE = Recipe(
    phases=(
        PhaseSpec(HEAD, max_epoch=2),
        PhaseSpec(THIRD, lr=0.05, max_epoch=4),
        PhaseSpec(SECOND, lr=0.02, max_epoch=7),
        PhaseSpec(("network.first.weight",), lr=0.02),
    ),
    epochs=8,
    optimizer=adamw,
    scores=EARLY,
)
TRANSITIONS = 3
BATCH_NORMALISED = replace(
    RECIPE,
    network=batch_normalised,
    phases=(
        PhaseSpec(HEAD, max_epoch=2),
        PhaseSpec(("network.upper.weight", "network.upper.bias"), lr=0.05, max_epoch=4),
        PhaseSpec(("network.norm.weight", "network.lower.weight"), lr=0.02),
    ),
    epochs=6,
)


# --- what is observed -------------------------------------------------------------------------------------------------


def _flat(value: object, place: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{place}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _flat(item, f"{place}/{index}")
    elif not isinstance(value, Tensor):
        yield place, value
    elif not isinstance(value, UninitializedParameter):
        yield place, value.detach().clone()


class Observe(Callback):
    """All that trains and all that is saved, at the first batch of each epoch, when transitions are over."""

    def __init__(self) -> None:
        self.seen: list[dict[str, object]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            everything = {
                "weights": dict(pl_module.named_parameters()),
                "buffers": dict(pl_module.named_buffers()),
                "optimizer": [group | {"params": None} for group in trainer.optimizers[0].param_groups],
                "state": trainer.optimizers[0].state_dict()["state"],
                "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
                "saved": trainer._checkpoint_connector.dump_checkpoint(weights_only=False),
                "module": getattr(pl_module, "observed", None),
                "data": getattr(trainer.datamodule, "served", None),
            }
            self.seen.append(dict(_flat(everything, "")))


def _differences(one: Mapping[str, object], other: Mapping[str, object]) -> list[str]:
    def same(mine: object, theirs: object) -> bool:
        if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
            return mine.dtype == theirs.dtype and torch.equal(mine, theirs)
        return type(mine) is type(theirs) and (mine == theirs or isinstance(mine, Path))

    ignored = ("best_model_path", "last_model_path", "dirpath", "files", "best_k", "kth", "metrics")
    names = [name for name in one if name in other and not any(part in name for part in ignored)]
    assert one.keys() ^ other.keys() <= {name for name in one.keys() | other.keys() if ".ckpt" in name}
    return [name for name in names if not same(one[name], other[name])]


# --- programs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """A fit that restores at each of its transitions; ``reads`` of these have to do so from disk, for a reason."""

    module: type[Toy] = Toy
    recipe: Recipe = RECIPE
    callbacks: Callable[[], tuple[Callback, ...]] = tuple
    data: type[ToyData] | None = None
    plugins: Callable[[], list[Any]] = list
    checkpoint: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    kind: type[FinetuningScheduler] = FinetuningScheduler
    transitions: int = TRANSITIONS
    reads: int = 0
    reason: str = ""

    def fit(self, root: Path) -> list[dict[str, object]]:
        observe = Observe()
        session = Session(
            self.recipe,
            root,
            module=self.module,
            checkpoint=self.checkpoint,
            extra_callbacks=(*self.callbacks(), observe),
            scheduler_options=self.scheduler,
            scheduler_class=self.kind,
            plugins=self.plugins(),
        )
        session.fit(datamodule=None if self.data is None else self.data())
        return observe.seen


def optimizer(kind: Any, **options: Any) -> Program:
    return Program(recipe=replace(RECIPE, optimizer=lambda parameters: kind(parameters, lr=0.01, **options)))


class Teacher(Toy):
    """A mean teacher, which moves without the optimizer and in a way that no version counter tells."""

    begins = 0

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.teacher = nn.Linear(5, 1)
        self.teacher.load_state_dict(self.network.head.state_dict())

    def on_train_batch_end(self, *_: Any) -> None:
        if self.global_step >= self.begins:
            pairs = zip(self.teacher.parameters(), self.network.head.parameters(), strict=True)
            for mine, theirs in pairs:
                mine.data.mul_(0.9).add_(theirs.data, alpha=0.1)

    def training_step(self, batch: Any) -> Tensor:
        hidden = self.network[:-1](batch[0])
        loss = nn.functional.mse_loss(self.network.head(hidden), self.teacher(hidden).detach())
        return loss + super().training_step(batch)


class LateTeacher(Teacher):
    begins = 6  # in the epoch after the best one


class Lazy(Toy):
    """Gets the shape of a layer in its first forward pass."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        with torch.random.fork_rng():
            self.network.third = nn.LazyLinear(5)


class Scales(Toy):
    """Saves all weights times four, and undoes it when it loads."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {name: value * 4 for name, value in checkpoint["state_dict"].items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {name: value / 4 for name, value in checkpoint["state_dict"].items()}


class ScalesInPlace(Scales):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for value in checkpoint["state_dict"].values():
            value /= 4


class SavesOthers(Toy):
    """Saves other weights than its own, an average say, and does not undo it."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        head = checkpoint["state_dict"]["network.head.weight"] * 0.5
        checkpoint["state_dict"] = {**checkpoint["state_dict"], "network.head.weight": head}


class Counts(Toy):
    """Keeps what it counts, and a tensor that is no buffer, in the file."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.observed = {"count": 0, "bank": torch.zeros(2)}

    def on_train_batch_end(self, *_: Any) -> None:
        self.observed["count"] += 1
        self.observed["bank"] += 1

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["bank"] = self.observed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.observed = checkpoint["bank"]


class KeepsFrozen(Toy):
    """Puts frozen weights into the file a second time, and keeps what it is given back."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["again"] = {name: each for name, each in self.state_dict().items() if "second" in name}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.observed = checkpoint["again"]


class Derived(Toy):
    """Has a table of the weights made anew when they have been loaded."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.observed: dict[str, Tensor] = {}
        self.network.head.register_load_state_dict_post_hook(self.refresh)

    def refresh(self, module: nn.Module, _: object) -> None:
        self.observed = {"table": module.weight.detach().clone()}


class Tracker(nn.Linear):
    """A layer with a method of its own to load, and a state that is no tensor."""

    loaded = 0

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.loaded += 1
        super()._load_from_state_dict(*arguments)

    def get_extra_state(self) -> dict[str, int]:
        return {"loaded": self.loaded}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.loaded = state["loaded"]


class ExtraState(Toy):
    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.network.third = Tracker(5, 5)

    def on_train_batch_end(self, *_: Any) -> None:
        self.network.third.loaded += 1


class Replaces(Toy):
    """Puts another parameter in the place of a frozen one, after the best moment."""

    def on_train_epoch_end(self) -> None:
        if self.current_epoch == 1:
            self.network.first.bias = nn.Parameter(self.network.first.bias.detach() + 1, requires_grad=False)


class Replaced(Toy):
    """Has put another in the place of a frozen one by the best moment."""

    def on_train_start(self) -> None:
        self.network.first.bias = nn.Parameter(self.network.first.bias.detach() + 1, requires_grad=False)


class Buffers(Toy):
    """Buffers of several kinds, shared ones among them."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        shared = torch.zeros(3)
        self.register_buffer("mine", shared)
        self.network.register_buffer("theirs", shared)
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def on_train_batch_end(self, *_: Any) -> None:
        self.mine += 1
        self.count += 1
        self.scratch += 1


class WeightNormed(Toy):
    """A parametrised layer, which loads with a hook."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        nn.utils.parametrizations.weight_norm(self.network.first)


class Served(ToyData):
    """A datamodule with state."""

    def __init__(self) -> None:
        super().__init__()
        self.served = {"batches": 0, "table": torch.zeros(2)}

    def state_dict(self) -> dict[str, Any]:
        return self.served

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.served = state_dict


class Serve(Callback):
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.datamodule.served["batches"] += 1
        trainer.datamodule.served["table"] += 1


class Scaler(Precision):
    """A precision plugin with state, as a gradient scaler is."""

    scale = 1.0

    def after_closure(self, *_: Any) -> None:
        self.scale *= 1.5

    def optimizer_step(self, *arguments: Any, **options: Any) -> Any:
        self.scale *= 1.5
        return super().optimizer_step(*arguments, **options)

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scale = state_dict["scale"]


class Hides(Callback):
    """Writes other weights than the model's, and keeps the true ones elsewhere in the file."""

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["hidden"] = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: torch.zeros_like(value) for name, value in checkpoint["state_dict"].items()}

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        pl_module.load_state_dict(checkpoint["hidden"])


class Lags(Callback):
    """Keeps weights as its state."""

    weights: Mapping[str, Tensor] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.weights = state_dict["weights"]


class ByHand(FinetuningScheduler):
    """Has another file named as the best one before it is restored."""

    def restore_best_ckpt(self) -> None:
        saving: Any = self.trainer.checkpoint_callback  # type: ignore[union-attr]
        saving.best_model_path = max(saving.best_k_models)
        super().restore_best_ckpt()


class Touch(Callback):
    """Lets the file system tell of a change where there is none."""

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        Path(trainer.checkpoint_callback.best_model_path).touch()


class Thaws(FinetuningScheduler):
    """Goes to phase 1 by itself and without a restore."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            self.thaw_to_depth(1)
        super().on_train_epoch_start(trainer, pl_module)


def installing(kind: str, **arguments: Any) -> dict[int, dict[str, Any]]:
    """The recipe's schedule with a new optimizer in phase 1."""
    init = {"optimizer_init": {"class_path": kind, "init_args": {"lr": 0.01, **arguments}}}
    return {
        0: {"params": list(HEAD), "max_transition_epoch": 2},
        1: {"params": list(THIRD), "lr": 0.05, "max_transition_epoch": 4, "new_optimizer": init},
        2: {"params": list(SECOND), "lr": 0.02, "max_transition_epoch": 7},
        3: {"params": ["network.first.weight"], "lr": 0.02},
    }


TIED = (PhaseSpec(("network.out.bias",), max_epoch=2), PhaseSpec(("network.embed.weight",), max_epoch=4))
TIED += (PhaseSpec(("network.middle.weight",)),)

PROGRAMS: dict[str, Program] = {
    "sgd": optimizer(SGD),
    "momentum": optimizer(SGD, momentum=0.9, nesterov=True),
    "adamw": optimizer(AdamW),
    "amsgrad": optimizer(AdamW, amsgrad=True),
    "foreach": optimizer(AdamW, foreach=True),
    "adagrad": optimizer(Adagrad),
    "rmsprop": optimizer(RMSprop, momentum=0.5, centered=True),
    "adafactor": optimizer(Adafactor),
    "step lr": Program(recipe=replace(RECIPE, scheduler=lambda each: StepLR(each, 1, 0.7))),
    "plateau": Program(recipe=replace(RECIPE, scheduler=lambda each: ReduceLROnPlateau(each, patience=0))),
    "ever better": Program(recipe=replace(RECIPE, scores=(8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0))),
    "better in each phase": Program(recipe=replace(RECIPE, scores=(8.0, 9.0, 7.0, 8.0, 6.0, 7.0, 8.0, 1.0))),
    "best in phase 1": Program(recipe=replace(RECIPE, scores=(8.0, 9.0, 7.0, 8.0, 8.0, 8.0, 8.0, 9.0))),
    "several kept": Program(checkpoint={"save_top_k": 3, "save_last": True}),
    "all kept": Program(checkpoint={"save_top_k": -1, "save_last": "link"}),
    "one name": Program(checkpoint={"filename": "best", "enable_version_counter": False}),
    "inside an epoch": Program(checkpoint={"every_n_train_steps": 3, "save_on_train_epoch_end": False}),
    "dropout and batch norm": Program(
        recipe=replace(
            BATCH_NORMALISED,
            network=normalised,
            phases=(
                PhaseSpec(HEAD, max_epoch=2),
                PhaseSpec(SECOND, lr=0.05, max_epoch=4),
                PhaseSpec(("network.norm.weight",)),
            ),
        ),
        transitions=2,
    ),
    "batch norm": Program(recipe=BATCH_NORMALISED, transitions=2),
    "batch norm that rests": Program(recipe=BATCH_NORMALISED, scheduler={"frozen_modules_mode": "eval"}, transitions=2),
    "buffers": Program(Buffers),
    "tied weights": Program(recipe=replace(RECIPE, network=Tied, phases=TIED, epochs=6), transitions=2),
    "weight norm": Program(WeightNormed, replace(RECIPE, phases=RECIPE.phases[:3], epochs=6), transitions=2),
    "lazy": Program(Lazy),
    "a thaw without a restore": Program(kind=Thaws, transitions=2),
    "new optimizer": Program(scheduler={"ft_schedule": installing("torch.optim.AdamW")}),
    "optimizer of another class": Program(scheduler={"ft_schedule": installing("torch.optim.SGD", momentum=0.9)}),
    "mean teacher": Program(Teacher),
    "a hook scales": Program(Scales),
    "a hook scales in place": Program(ScalesInPlace),
    "a hook saves other weights": Program(SavesOthers),
    "a hook counts": Program(Counts),
    "a hook keeps frozen weights": Program(KeepsFrozen),
    "a hook of a layer": Program(Derived),
    "extra state": Program(ExtraState),
    "a datamodule": Program(callbacks=lambda: (Serve(),), data=Served, recipe=RECIPE),
    "a precision plugin": Program(plugins=lambda: [Scaler()]),
    "ema": Program(callbacks=lambda: (EMAWeightAveraging(decay=0.5),)),
    "ema of batch norm": Program(
        recipe=BATCH_NORMALISED, callbacks=lambda: (EMAWeightAveraging(decay=0.7),), transitions=2
    ),
    "a callback hides": Program(callbacks=lambda: (Hides(),)),
    "a callback keeps weights": Program(callbacks=lambda: (Lags(),)),
    "a file that is touched": Program(callbacks=lambda: (Touch(),)),
    "replaced before": Program(Replaced),
    "a teacher that begins late": Program(LateTeacher, reads=2, reason="has been changed since"),
    "replaced after": Program(Replaces, reads=2, reason="network.first.bias has been changed since"),
    "named by hand": Program(
        kind=ByHand, checkpoint={"save_top_k": 3}, reads=3, reason="another run, or in another way"
    ),
}


class Loads:
    """Counts the checkpoints that are read."""

    def __init__(self) -> None:
        self.count = 0


@contextmanager
def counted_loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loads]:
    loads, usual = Loads(), StrategyAdapter.restore

    def restore(self: StrategyAdapter, *arguments: Any) -> None:
        loads.count += 1
        usual(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(StrategyAdapter, "restore", restore)
        yield loads


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature", "ignore:A layer with UninitializedParameter")
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_goes_on_as_from_disk(
    name: str, messages: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = PROGRAMS[name]
    with counted_loads(monkeypatch) as loads:
        actual = program.fit(tmp_path / "memory")
    said = [message for message in messages() if "is read from disk" in message]
    assert loads.count == program.reads
    assert len(said) == min(program.reads, 1)
    assert all(program.reason in message for message in said)
    with ExitStack() as stack:
        patch = stack.enter_context(monkeypatch.context())
        patch.setattr(StrategyAdapter, "why_from_disk", lambda self: "a test asks for it")
        loads = stack.enter_context(counted_loads(monkeypatch))
        expected = program.fit(tmp_path / "disk")
    assert loads.count == program.transitions
    assert len(actual) == len(expected) == program.recipe.epochs
    for epoch, (mine, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert _differences(mine, theirs) == [], f"in epoch {epoch}"


# --- when it is read from disk ----------------------------------------------------------------------------------------


def reasons(messages: Callable[[], list[str]]) -> list[str]:
    return [message.partition("is read from disk: ")[2] for message in messages() if "is read from disk" in message]


def test_a_resumed_run_reads_until_there_is_a_better_checkpoint(
    messages: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Session(replace(RECIPE, epochs=3), tmp_path, checkpoint={"save_last": True}).fit()
    with counted_loads(monkeypatch) as loads:
        last = tmp_path / "checkpoints" / "last.ckpt"
        Session(RECIPE, tmp_path, checkpoint={"save_last": True}).fit(ckpt_path=last)
    assert loads.count == 2  # those at epochs 2 and 4; the best one of epoch 5 is in memory
    (reason,) = reasons(messages)
    assert "another run" in reason


def test_without_enough_memory_it_is_read(
    messages: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(held, "free_memory", lambda: 0)
    with counted_loads(monkeypatch) as loads:
        Session(RECIPE, tmp_path).fit()
    assert loads.count == TRANSITIONS
    assert all("not enough memory" in reason for reason in reasons(messages))


def test_what_cannot_be_copied_is_read(
    messages: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*_: Any) -> Any:
        raise TypeError("no copies of this")

    monkeypatch.setattr(held.Held, "of", fails)
    Session(RECIPE, tmp_path).fit()
    assert all("no copies of this" in reason for reason in reasons(messages))


class SavesItself(ModelCheckpoint):
    """Writes its files otherwise than by the trainer."""

    def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
        trainer.strategy.checkpoint_io.save_checkpoint(
            trainer._checkpoint_connector.dump_checkpoint(weights_only=False), filepath
        )


class RestoresItself(StrategyAdapter):
    def restore(self, *arguments: Any) -> None:
        super().restore(*arguments)


def test_a_checkpoint_callback_that_saves_in_its_own_way_is_read(
    messages: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    session = Session(RECIPE, tmp_path)
    callbacks: list[Callback] = session.trainer.callbacks  # type: ignore[attr-defined]
    place = next(index for index, each in enumerate(callbacks) if isinstance(each, ModelCheckpoint))
    callbacks[place] = SavesItself(tmp_path / "checkpoints", monitor="val_loss")
    with counted_loads(monkeypatch) as loads:
        session.fit()
    assert loads.count == TRANSITIONS
    assert len(reasons(messages)) == 1


def test_an_adapter_that_restores_in_its_own_way_is_asked(messages: Callable[[], list[str]], tmp_path: Path) -> None:
    adapters = {"custom_strategy_adapters": {"single_device": f"{__name__}:RestoresItself"}}
    Session(RECIPE, tmp_path, scheduler_options=adapters).fit()
    (reason,) = reasons(messages)
    assert "RestoresItself restores in its own way" in reason


def test_nothing_is_held_where_nothing_is_restored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(*_: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(held.Held, "of", fails)
    Session(replace(RECIPE, restore_best=False), tmp_path).fit()
