"""Fine-tune a pre-trained transformer on SuperGLUE's RTE or BoolQ, with and without schedules, by configurations.

In this folder: ``python fts_superglue.py fit --config config/fts_explicit.yaml``. From anywhere, with the full path of
a configuration: ``python -m fts_examples.fts_superglue``. Every configuration changes ``config/fts_defaults.yaml``.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import transformers
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.cli import LightningCLI
from ruamel.yaml import YAML

from fts_examples._text_data import DataError, ModelError
from fts_examples.superglue_data import RteBoolqDataModule
from fts_examples.superglue_module import RteBoolqModule

__all__ = ["RteBoolqCLI", "RteBoolqDataModule", "RteBoolqModule", "main"]

HERE = Path(__file__).resolve().parent
DEFAULTS = HERE / "config" / "fts_defaults.yaml"
SHARED = ("model_name_or_path", "task_name")


class RteBoolqCLI(LightningCLI):
    """Completes a configuration: what model and data share, the name of the logs, where a schedule lies.

    Args:
        **options: Of Lightning's ``LightningCLI``, such as ``args``.
    """

    def __init__(self, **options: Any) -> None:
        defaults = {"default_config_files": [str(DEFAULTS)]}
        super().__init__(
            RteBoolqModule,
            RteBoolqDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            parser_kwargs={"fit": defaults, "validate": defaults, "test": defaults},
            **options,
        )

    def before_instantiate_classes(self) -> None:
        """Complete the configuration."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        share(config.model.init_args, config.data.init_args)
        trainer = config.trainer
        if isinstance(trainer.logger, Namespace) and trainer.logger.init_args.get("name", "") is None:
            trainer.logger.init_args.name = config.model.init_args.experiment_tag
        callbacks = trainer.callbacks if isinstance(trainer.callbacks, list) else []
        for callback in callbacks:
            if isinstance(schedule := callback.get("init_args", {}).get("ft_schedule"), str):
                callback.init_args.ft_schedule = schedule_path(schedule)


def share(model: Namespace, data: Namespace) -> None:
    """Let the model's arguments hold for the data, too, or the data's where the model has the default.

    Raises:
        ModelError: Both are given, and are not the same.
    """
    defaults = YAML(typ="safe").load(DEFAULTS)["model"]["init_args"]
    for name in SHARED:
        if data.get(name) is not None and model[name] == defaults[name]:
            model[name] = data[name]
        data[name] = data.get(name) or model[name]
        if data[name] != model[name]:
            raise ModelError(
                f"expected one {name!r} of model and data, got {model[name]!r} and {data[name]!r}. Fix: Leave out "
                f"--data.init_args.{name}, which follows the model's."
            )


def schedule_path(path: str) -> str:
    """Tell where a schedule is that lies in the working directory or, if it does not, beside this file."""
    return str(HERE / path) if not Path(path).exists() and (HERE / path).exists() else path


def main(**options: Any) -> None:
    """Run the command line; problems with data, model or schedule are told in a line and end it with 2.

    Args:
        **options: Of Lightning's ``LightningCLI``, such as ``args``.
    """
    # The package says through its logger what begins and ends phases.
    logging.basicConfig(format="%(message)s")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        RteBoolqCLI(**options)
    except (ValueError, MisconfigurationException) as error:
        problem = user_problem(error)
        if problem is None:
            raise
        tell(problem)
        raise SystemExit(2) from error


@rank_zero_only
def tell(problem: BaseException) -> None:
    """Print a problem."""
    print(f"error: {problem}", file=sys.stderr)


def user_problem(error: BaseException | None) -> BaseException | None:
    """Find what a user can mend behind an error; what a constructor raises is wrapped by the command line's parser."""
    while error is not None and not isinstance(error, (DataError, ModelError, MisconfigurationException)):
        error = error.__cause__
    return error


if __name__ == "__main__":
    main()
