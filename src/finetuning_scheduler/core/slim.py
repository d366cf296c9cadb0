"""Checkpoints without the weights that no phase has thawed: a model that is made anew has them, as a hash tells.

Such a file says by key what it leaves out. It is made whole when it is loaded in a fit, a validation, a test or a
prediction with the callback; or for good by :func:`merge_checkpoint`.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from os import PathLike, fspath
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from ..errors import CheckpointError, Problem
from .checksums import Resting
from .drafts import draft_of, publish
from .fingerprints import tensor_fingerprints
from .schedule.wording import listed
from .state import read_as

M = TypeVar("M", bound=nn.Module)
WEIGHTS = "state_dict"
LEFT_OUT = "frozen_weights_left_out"
# Whoever loads such a file strictly and without this package is shown this key as one that he does not expect.
NOTE = "(the weights that are missing were frozen: see finetuning_scheduler.merge_checkpoint)"


class LeftOut(BaseModel):
    """What a file says of the weights that it leaves out."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    fingerprints: dict[str, str]  # by key
    dtypes: dict[str, str]
    places: dict[str, list[str]]  # by key of the checkpoint, the keys of what is left out there


class Fresh:
    """Knows which parameters have the values that they had when the model was made, in a fit that saves slim files."""

    def __init__(self) -> None:
        self.begun = False
        self._resting = Resting()
        self._names: frozenset[str] = frozenset()
        self._fingerprints: dict[str, str] = {}

    def begin(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Note the values of a model that has just been made: nothing has been loaded into it, nothing trained."""
        if not self.begun:
            self._names = frozenset(name for name, parameter in parameters.items() if _is_plain(parameter))
            self._resting.begin(parameters)
            self.begun = True

    def without_frozen(
        self, checkpoint: Mapping[str, Any], parameters: Mapping[str, nn.Parameter], keys: Mapping[str, str]
    ) -> dict[str, Any]:
        """Return a checkpoint without the weights that are frozen and were never changed; the given one stays.

        Args:
            checkpoint: What is about to be written.
            parameters: The model's, by the name that they have for a schedule.
            keys: By key of the model's state dictionary, such a name.
        """
        self._resting.moved(parameters)
        fresh = {name: each for name, each in self._resting.of(parameters).items() if name in self._names}
        missing = {name: parameter for name, parameter in fresh.items() if name not in self._fingerprints}
        self._fingerprints |= tensor_fingerprints(missing)
        owners = {key: fresh[name] for key, name in keys.items() if name in fresh}
        whole, places = dict(checkpoint), {}
        for place, content in checkpoint.items():
            if isinstance(content, dict) and (left_out := [k for k in content if _holds(content, k, owners)]):
                whole[place] = copy(content)  # it keeps its class and, as an attribute, its metadata
                for key in left_out:
                    del whole[place][key]
                places[place] = left_out
        if WEIGHTS not in places:
            return dict(checkpoint)
        whole[WEIGHTS][NOTE] = torch.empty(0)
        named = sorted({key for left_out in places.values() for key in left_out})
        fingerprints = {key: self._fingerprints[keys[key]] for key in named}
        dtypes = {key: str(owners[key].dtype).removeprefix("torch.") for key in named}
        whole[LEFT_OUT] = {"fingerprints": fingerprints, "dtypes": dtypes, "places": places}
        return whole


def names_of_keys(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Tell by key of a module's state dictionary whose values it has; those of a shared parameter have several keys."""
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    named = module.named_parameters(remove_duplicate=False)
    return {key: name_of[id(each)] for key, each in named if id(each) in name_of}


def is_slim(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint leaves out frozen weights."""
    return LEFT_OUT in checkpoint


def fill_in(
    checkpoint: dict[str, Any],
    weights: Mapping[str, Any],
    path: object,
    known: Mapping[str, Tensor] | None = None,
) -> None:
    """Make a checkpoint whole in place.

    Args:
        checkpoint: What has been read of a file.
        weights: The state dictionary of a model that has been made as the one was that was trained.
        path: The file.
        known: By key, values that are known to be right.

    Raises:
        CheckpointError: The model has other weights, or none of a name; each is named.
    """
    left_out = read_as(LeftOut, checkpoint.pop(LEFT_OUT), f"{path}: `{LEFT_OUT}`")
    values = _verified(left_out, weights, path, known or {})
    for place, keys in left_out.places.items():
        filled = {**checkpoint[place], **{key: values[key] for key in keys}}
        filled.pop(NOTE, None)
        order = [key for key in weights if key in filled]
        content = copy(checkpoint[place])
        content.clear()
        content.update({key: filled.pop(key) for key in order} | filled)
        checkpoint[place] = content


def merge_checkpoint(
    path: str | PathLike[str], source: nn.Module | Mapping[str, Any], output: str | PathLike[str] | None = None
) -> str:
    """Make a checkpoint that leaves out frozen weights a whole one, which everything loads that loads checkpoints.

    Args:
        path: A file that ``FTSCheckpoint(save_frozen_weights=False)`` has written.
        source: The model, made as the one was that was trained, or its state dictionary. It stays as it is.
        output: Where the whole file goes; in the place of the other one if not given.

    Returns:
        Where it is.

    Raises:
        CheckpointError: The file is no such checkpoint, or the model's weights are others than those left out.
    """
    checkpoint = _read(path)
    if not is_slim(checkpoint):
        message = f"expected a checkpoint that leaves out frozen weights, got {fspath(path)}, which is whole"
        raise CheckpointError(Problem(message, fix="Use it as it is."))
    fill_in(checkpoint, source.state_dict() if isinstance(source, nn.Module) else source, path)
    target = Path(path if output is None else output)
    target.parent.mkdir(parents=True, exist_ok=True)
    with draft_of(target) as file:
        torch.save(checkpoint, file)
        publish(file, target)
    return str(target)


def load_from_checkpoint(kind: type[M], path: str | PathLike[str], **arguments: Any) -> M:
    """Do what ``kind.load_from_checkpoint(path, ...)`` does, for a file that leaves out frozen weights as well.

    These are those that the module has when it has been made, and are verified. The module's ``on_load_checkpoint``
    meets a whole checkpoint.

    Args:
        kind: A ``LightningModule``'s class.
        path: The checkpoint.
        arguments: Those of ``load_from_checkpoint``.

    Raises:
        CheckpointError: The module that has been made has other weights than those that are left out.
    """

    def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        if is_slim(checkpoint):
            fill_in(checkpoint, self.state_dict(), path)
        kind.on_load_checkpoint(self, checkpoint)  # type: ignore[attr-defined]  # of Lightning

    members = {"on_load_checkpoint": on_load_checkpoint, "__module__": kind.__module__, "__doc__": kind.__doc__}
    filling = type(kind.__name__, (kind,), {**members, "__qualname__": kind.__qualname__})
    module: M = filling.load_from_checkpoint(path, **arguments)  # type: ignore[attr-defined]  # of Lightning
    module.__class__ = kind
    return module


def _read(path: str | PathLike[str]) -> dict[str, Any]:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        message = f"expected a checkpoint that can be read, got {fspath(path)} ({error})"
        raise CheckpointError(Problem(message, fix="Name a file that `FTSCheckpoint` has written.")) from error
    except Exception as error:  # what PyTorch raises for a file that is none of its own is of any kind
        message = f"expected a checkpoint of tensors and plain values, got {fspath(path)} ({error})"
        fix = "Allow the classes that it names, if it names some: torch.serialization.add_safe_globals([...])."
        raise CheckpointError(Problem(message, fix=fix)) from error
    if not isinstance(content, dict) or WEIGHTS not in content:
        message = f"expected a checkpoint with `{WEIGHTS}`, got {fspath(path)}"
        raise CheckpointError(Problem(message, fix="Name a file that `FTSCheckpoint` has written."))
    return content


def _verified(
    left_out: LeftOut, weights: Mapping[str, Any], path: object, known: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Give the values of what is left out, if they are those that were."""
    fix = (
        "Make the model as it was made for the training, from the same pre-trained weights; or resume from a whole "
        "checkpoint (`save_frozen_weights=True`)."
    )
    values: dict[str, Tensor] = dict(known)
    for key, dtype in left_out.dtypes.items():
        if key not in known and isinstance(weights.get(key), Tensor) and _is_plain(weights[key]):
            values[key] = weights[key].detach().to("cpu", getattr(torch, dtype), copy=True)
    found = tensor_fingerprints({key: value for key, value in values.items() if key not in known})
    absent = [key for key in left_out.fingerprints if key not in values]
    other = [key for key, value in left_out.fingerprints.items() if key in found and found[key] != value]
    problems = []
    if absent:
        problems.append(Problem(f"{path} leaves out weights that the model does not have: {listed(absent)}", fix=fix))
    if other:
        message = f"{path} leaves out frozen weights that are others in the model: {listed(other)}"
        problems.append(Problem(message, fix=fix))
    if problems:
        raise CheckpointError(problems)
    return values


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_meta


def _holds(content: Mapping[str, Any], key: str, owners: Mapping[str, Tensor]) -> bool:
    """Whether a checkpoint has the present values of a parameter under its key."""
    value, owner = content[key], owners.get(key)
    if owner is None or not isinstance(value, Tensor) or value.dtype != owner.dtype or value.shape != owner.shape:
        return False
    return value.data_ptr() == owner.data_ptr() or torch.equal(value.detach().to(owner.device), owner.detach())
