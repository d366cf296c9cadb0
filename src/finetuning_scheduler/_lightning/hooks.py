"""Moments at which Lightning has no hook, and what a trainer has to remember."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NoReturn

from torch.multiprocessing.spawn import ProcessRaisedException

from .package import LightningModule, MultiProcessingLauncher, Strategy, Trainer, TunerExit


@contextmanager
def after_configure_model(module: LightningModule, action: Callable[[], None]) -> Iterator[None]:
    """Call ``action`` whenever the module's ``configure_model`` has run.

    It is the only moment between the module getting its layers and the strategy setting it up, and Lightning offers it
    to the module alone. For as long as this lasts, the module counts as one that overrides ``configure_model``.
    """
    own = module.configure_model

    def configure_model() -> None:
        own()
        action()

    with _replaced(module, "configure_model", configure_model):
        yield


@contextmanager
def around_setup(
    trainer: Trainer,
    module: LightningModule,
    *,
    make_optimizers: Callable[[Callable[[], Any]], Any],
    after: Callable[[], None],
) -> Iterator[None]:
    """Call functions while the strategy sets up the module, when there is no hook yet.

    ``make_optimizers`` gets the module's ``configure_optimizers`` and is called in its place, when the module has been
    wrapped and moved, and ``after`` when the optimizers exist: before any callback's ``on_fit_start``, in which some
    already train.
    """
    configure, set_up = module.configure_optimizers, trainer.strategy.setup

    def setup(trainer: Trainer) -> None:
        with _replaced(module, "configure_optimizers", lambda: make_optimizers(configure)):
            set_up(trainer)
        after()

    with _replaced(trainer.strategy, "setup", setup):
        yield


@contextmanager
def around_saves(trainer: Trainer, during: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Enter a context around each checkpoint that the trainer saves in this block, whoever asks for it."""
    usual = trainer.save_checkpoint

    def save_checkpoint(*args: Any, **kwargs: Any) -> None:
        with during():
            usual(*args, **kwargs)

    with _replaced(trainer, "save_checkpoint", save_checkpoint):
        yield


@contextmanager
def around_loads(
    strategy: Strategy, before: Callable[[], None], after: Callable[[dict[str, Any], object], None]
) -> Iterator[None]:
    """Have functions called before a checkpoint is loaded, and with its content and path before that is used."""
    usual = strategy.load_checkpoint

    def load_checkpoint(checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        before()
        checkpoint = usual(checkpoint_path, weights_only)
        after(checkpoint, checkpoint_path)
        return checkpoint

    with _replaced(strategy, "load_checkpoint", load_checkpoint):
        yield


@contextmanager
def around_weights(strategy: Strategy, loading: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Have Lightning load a checkpoint's weights into the model within a context of ``loading``."""
    usual = strategy.load_model_state_dict

    def load_model_state_dict(*arguments: Any, **options: Any) -> None:
        with loading():
            usual(*arguments, **options)

    with _replaced(strategy, "load_model_state_dict", load_model_state_dict):
        yield


@contextmanager
def noted_saves(
    strategy: Strategy, written: Callable[[dict[str, Any]], dict[str, Any]]
) -> Iterator[dict[str, dict[str, Any]]]:
    """Yield what is going to be saved in this block, by path; ``written`` tells what of it is written."""
    usual, noted = strategy.save_checkpoint, {}

    def save_checkpoint(checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        usual(written(checkpoint), filepath, storage_options)
        noted[str(filepath)] = checkpoint

    with _replaced(strategy, "save_checkpoint", save_checkpoint):
        yield noted


def needs_no_optimizers(module: LightningModule) -> AbstractContextManager[None]:
    """Let Lightning's check of a module pass one without ``configure_optimizers`` for as long as this lasts."""
    return _replaced(module, "configure_optimizers", lambda: None)


class _Done(Exception):  # noqa: N818 - it tells of no error
    """A launched process has done its work, and the program is to end."""


def leave(trainer: Trainer) -> NoReturn:
    """End the fit that is being set up as one that has done its work; then leave the program with exit status 0.

    To be called inside a hook, on every rank at the same time. Callbacks, module and data are torn down and loggers
    are told of success, since nothing has failed that an ``on_exception`` could save or report.

    Raises:
        SystemExit: At the end, from ``Trainer.fit``.
    """
    if isinstance(trainer.strategy.launcher, MultiProcessingLauncher):
        # The process that has launched those of its machine waits for what the first of them returns, or raises.
        raise _Done if trainer.local_rank == 0 else SystemExit(0)
    tear_down = trainer._teardown

    def then_exit() -> None:
        del vars(trainer)["_teardown"]
        tear_down()
        raise SystemExit(0)

    vars(trainer)["_teardown"] = then_exit  # the last that Lightning calls when a search ends a fit
    raise TunerExit


def has_left(exception: BaseException) -> bool:
    """Whether an exception tells the process that has launched the others that these have left."""
    return isinstance(exception, ProcessRaisedException) and f"{__name__}.{_Done.__name__}" in str(exception)


_SEARCHES = (".lr_find_", ".scale_batch_size_")  # what Lightning's finders call their temporary checkpoints


def is_search_checkpoint(path: object) -> bool:
    """Whether a checkpoint is one that a search for a learning rate or a batch size goes back to."""
    return path is not None and str(path).rpartition("/")[2].startswith(_SEARCHES)


def remember(trainer: Trainer, fit: object) -> None:
    """Keep the last fit of a trainer with it, whichever callback object has carried it out."""
    vars(trainer)["finetuning_fit"] = fit


def remembered(trainer: Trainer) -> Any:
    """Return the last fit of a trainer, if there is one."""
    return vars(trainer).get("finetuning_fit")


@contextmanager
def loading_with(strategy: Strategy, load: Callable[[str, bool | None], dict[str, Any]]) -> Iterator[None]:
    """Let ``load`` read the next checkpoint that the strategy is asked for; those after it are read as usual.

    Strategies that load checkpoints after ``on_fit_start`` load the optimizer's state too, and nothing tells earlier
    which checkpoint a run is resumed from.
    """
    usual = strategy.load_checkpoint
    with ExitStack() as replacement:

        def load_checkpoint(checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
            if is_search_checkpoint(checkpoint_path):
                return usual(checkpoint_path, weights_only)
            replacement.close()
            return load(str(checkpoint_path), weights_only)

        replacement.enter_context(_replaced(strategy, "load_checkpoint", load_checkpoint))
        yield


@contextmanager
def _replaced(instance: object, method: str, function: Callable[..., Any]) -> Iterator[None]:
    """Replace a method of one instance for a while."""
    before = vars(instance).get(method)
    vars(instance)[method] = function
    try:
        yield
    finally:
        vars(instance).pop(method, None)
        if before is not None:
            vars(instance)[method] = before
