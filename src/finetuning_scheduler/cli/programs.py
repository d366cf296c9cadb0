"""Models that code makes, without weights if possible: classes and functions, and Hugging Face folders."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.schedule.wording import closest, did_you_mean, listed
from ..errors import Problem, ScheduleError
from .outline import ModelOutline
from .output import foreign_code

if TYPE_CHECKING:
    from torch import nn

PROGRAM = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def read_program(source: str, init: Mapping[str, Any]) -> ModelOutline:
    """Outline the model that a class or function makes, on the meta device if it can be made there.

    Args:
        source: ``package.module:Class`` or ``package.module:function``; the folder at hand is searched, too.
        init: Its keyword arguments.

    Raises:
        ScheduleError: It is not there, or makes no module.
    """
    with foreign_code():
        return ModelOutline.of_module(built(source, init), source)


def built(source: str, init: Mapping[str, Any], devices: Sequence[str] = ("meta", "cpu")) -> nn.Module:
    """Make the model that a class or function makes, on the first device on which that can be done.

    Raises:
        ScheduleError: It is not there, or makes no module.
    """
    return _made(_found(source), init, source, devices)


def read_hugging_face(folder: Path) -> ModelOutline | None:
    """Outline the model of a Hugging Face folder from its ``config.json`` alone.

    ``None`` where transformers is not installed, or knows no such model. Nothing is downloaded, and no code of the
    folder runs.
    """
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _wrong(
            f"expected a configuration in JSON, got {error}", "correct it", str(folder / "config.json")
        ) from error
    if (
        not isinstance(settings, dict)
        or "model_type" not in settings
        or importlib.util.find_spec("transformers") is None
    ):
        return None
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        named: list[Any] = [getattr(transformers, name, None) for name in settings.get("architectures") or ()]
        with torch.device("meta"), foreign_code():
            known = bool(named) and named[0] is not None
            model = named[0](config) if known else transformers.AutoModel.from_config(config)
    except Exception as error:
        if isinstance(error, (KeyError, ValueError)) and "does not recognize" in str(error):
            return None
        raise _wrong(
            f"expected a configuration that transformers makes a model of, got an error: {_reason(error)}",
            "correct it, or name the file with the tensors",
            str(folder / "config.json"),
        ) from error
    return ModelOutline.of_module(model, str(folder))


def parsed_arguments(given: Sequence[str], option: str = "--init") -> dict[str, Any]:
    """Read ``key=value`` pairs of an option; values are what YAML takes them for.

    Raises:
        ScheduleError: One is no such pair.
    """
    from ruamel.yaml import YAML

    arguments: dict[str, Any] = {}
    for pair in given:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            example = "num_labels=3" if option == "--init" else "weight_decay=0.01"
            raise _wrong(f"expected {option} key=value, got {pair!r}", f"write, for example, {option} {example}")
        try:
            arguments[key] = YAML(typ="safe", pure=True).load(text)
        except Exception as error:  # the library lets more than its own exceptions out
            raise _wrong(f"expected a value of YAML after {key}=, got {text!r}", "put it in quotes") from error
    return arguments


def found_object(source: str) -> Any:
    """Import something by its path, ``package.module:name``; the folder at hand is searched, too.

    Raises:
        ScheduleError: It is not there.
    """
    module_name, _, attribute = source.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            fix = "check the name; modules of this folder and of installed packages are found"
            raise _wrong(f"expected a module that can be imported, got {module_name!r}", fix, source) from error
        raise _import_error(source, error) from error
    except (Exception, SystemExit) as error:
        raise _import_error(source, error) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            near = closest(part, [name for name in dir(found) if not name.startswith("_")], count=2)
            message = f"expected a class or function of {module_name}, got {part!r}, which it does not have"
            raise _wrong(message, did_you_mean(near, "check the name"), source)
        found = getattr(found, part)
    return found


def _found(source: str) -> Callable[..., Any]:
    """Import what makes the model."""
    found = found_object(source)
    if not callable(found):
        raise _wrong(f"expected a class or function that makes a model, got {type(found).__name__}", None, source)
    made: Callable[..., Any] = found
    return made


def _made(make: Callable[..., Any], init: Mapping[str, Any], source: str, devices: Sequence[str]) -> nn.Module:
    import torch
    from torch import nn

    _check_arguments(make, init, source)
    failure: BaseException | None = None
    # some constructors look at values: only on a device with values can these be told
    for device in devices:
        try:
            with torch.device(device):
                made = make(**init)
            break
        except (Exception, SystemExit) as error:  # noqa: BLE001  # what a user's code raises is said below
            failure = error
    else:
        fix = "give its arguments with --init key=value"
        raise _wrong(f"expected a model, got an error: {_reason(failure)}", fix, source) from failure
    if not isinstance(made, nn.Module):
        raise _wrong(f"expected a torch.nn.Module, got {type(made).__name__}", "name what makes the model", source)
    return made


def _check_arguments(make: Callable[..., Any], init: Mapping[str, Any], source: str) -> None:
    """Compare the arguments with the signature, as far as there is one."""
    try:
        signature = inspect.signature(make)
    except (TypeError, ValueError):
        return
    known = {
        name: each
        for name, each in signature.parameters.items()
        if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    }
    open_ended = any(each.kind is each.VAR_KEYWORD for each in signature.parameters.values())
    problems = []
    for name in () if open_ended else [name for name in init if name not in known]:
        taken = f"one of its arguments {listed(list(known))}" if known else "no arguments"
        problems.append(
            Problem(f"expected {taken}, got {name!r}", did_you_mean(closest(name, known), "remove it"), source)
        )
    missing = [name for name, each in known.items() if each.default is each.empty and name not in init]
    if missing:
        fix = f"add --init {missing[0]}=VALUE"
        problems.append(
            Problem(f"expected a value for {listed([repr(name) for name in missing])}, got none", fix, source)
        )
    if problems:
        raise ScheduleError(problems)


def _import_error(source: str, error: BaseException) -> ScheduleError:
    message = f"expected a module that can be imported, got an error: {_reason(error)}"
    return _wrong(message, "correct what it says; `python -c 'import ...'` shows where", source)


def _reason(error: BaseException | None) -> str:
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _wrong(message: str, fix: str | None = None, source: str | None = None) -> ScheduleError:
    return ScheduleError(Problem(message, fix, source))
