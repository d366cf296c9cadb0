"""Names, shapes and types of the tensors in a file or folder, without their values."""

from __future__ import annotations

import json
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..core.schedule.wording import listed
from ..errors import Problem, ScheduleError
from .outline import ModelOutline, TensorFacts, guessed_order, is_buffer

MAX_HEADER = 100_000_000  # bytes, as in the format's own library
_TORCH_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
_STATE_KEYS = ("state_dict", "model_state_dict", "model", "module", "net")
_DTYPES = {
    "BOOL": "bool",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "C64": "complex64",
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
}
_ORDER = "The file says no order of the parameters: it was guessed from their names."


def read_file(path: Path) -> ModelOutline:
    """Outline the model whose tensors a file holds.

    Raises:
        ScheduleError: It cannot be read, or is something else.
    """
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise _refused(path, f"but it cannot be read: {error.strerror or error}", "check the path") from error
    if start.startswith(b"version https://git-lfs"):
        raise _refused(path, "got a pointer of Git LFS", "fetch the file itself: git lfs pull")
    if path.name.endswith(".index.json"):
        return _outline(path, _sharded(path), ordered=False)
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return _outline(path, safetensors_header(path), ordered=False)
    if start.startswith((b"PK", b"\x80")) or path.suffix in _TORCH_SUFFIXES:
        return _checkpoint(path)
    fix = f"name a file that ends in .safetensors, {', '.join(_TORCH_SUFFIXES)}, or a folder with one"
    raise _refused(path, "got something else", fix)


def read_folder(path: Path) -> ModelOutline:
    """Outline the model whose tensors the files of a folder hold.

    Raises:
        ScheduleError: There is no such file, or one of them cannot be read.
    """
    for pattern in ("*.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json"):
        if found := sorted(path.glob(pattern)):
            return read_file(found[0])
    if shards := sorted(path.glob("*.safetensors")):
        tensors = {name: facts for shard in shards for name, facts in safetensors_header(shard).items()}
        return _outline(path, tensors, ordered=False)
    others = [file for file in sorted(path.iterdir()) if file.suffix in _TORCH_SUFFIXES and file.is_file()]
    if len(others) == 1:
        return read_file(others[0])
    if others:
        names = listed([file.name for file in others], limit=5)
        raise _refused(path, f"got several in this folder: {names}", f"name one of them, such as {others[-1]}")
    wanted = "model.safetensors, *.safetensors.index.json, or one checkpoint"
    raise _refused(path, "got a folder without any", f"name a folder with {wanted}")


def safetensors_header(path: Path) -> dict[str, TensorFacts]:
    """Read names, shapes and types from the header of a safetensors file; no weights are read.

    Raises:
        ScheduleError: It is no such file.
    """
    header = _header(path)
    header.pop("__metadata__", None)
    try:
        return {name: _facts(entry) for name, entry in header.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise _broken(path, "a tensor without type or shape") from error


def _header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        start = file.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= size <= MAX_HEADER:
            raise _broken(path, f"{size:,} bytes of it" if len(start) == 8 else f"a file of {len(start)} bytes")
        content = file.read(size)
    if len(content) < size:
        raise _broken(path, f"{len(content):,} of its {size:,} bytes: the file is cut off")
    try:
        header = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _broken(path, "something that is no JSON") from error
    if not isinstance(header, dict):
        raise _broken(path, "JSON that is no object")
    return header


def _facts(entry: Mapping[str, Any]) -> TensorFacts:
    shape = tuple(entry["shape"])
    if not all(isinstance(length, int) and length >= 0 for length in shape):
        raise ValueError(shape)
    kind = str(entry["dtype"])
    return TensorFacts(shape, _DTYPES.get(kind, kind.lower()))


def _sharded(path: Path) -> dict[str, TensorFacts]:
    """Read the headers of all the files that an index names."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted({str(shard) for shard in weight_map.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _refused(path, "got an index without a `weight_map`", "fetch the model again") from error
    missing = [shard for shard in shards if not (path.parent / shard).is_file()]
    if missing:
        message = f"but of the {len(shards)} files that it names, these are not there: {listed(missing, limit=3)}"
        raise _refused(path, message, "fetch them, too")
    tensors: dict[str, TensorFacts] = {}
    for shard in shards:
        file = path.parent / shard
        tensors |= safetensors_header(file) if file.suffix == ".safetensors" else _saved(file)[0]
    return tensors


def _checkpoint(path: Path) -> ModelOutline:
    """Outline the model in a checkpoint of PyTorch or Lightning; its state dictionary has the order of the modules."""
    tensors, tied = _saved(path)
    return _outline(path, tensors, ordered=True, tied=tied)


def _saved(path: Path) -> tuple[dict[str, TensorFacts], dict[str, str]]:
    state = _state_dict(_loaded(path))
    if not state:
        raise _refused(path, "got a file without tensors by name", "name a file with the model's state_dict")
    tensors: dict[str, TensorFacts] = {}
    tied: dict[str, str] = {}
    names: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if place in names and place[0]:
            tied[name] = names[place]
        else:
            names[place] = name
            tensors[name] = TensorFacts(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
    return tensors, tied


def _loaded(path: Path) -> Any:
    """Load a checkpoint without its values and without running anything that it names."""
    import torch

    from ..core.foreign import stand_ins

    try:
        with stand_ins(path):
            # mapped, not read; a file of the format before zip archives cannot be mapped
            mapped = zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu" if mapped else "meta", weights_only=True, mmap=mapped)
    except Exception as error:  # whatever reading a file of any content raises
        reason = (str(error).splitlines() or [""])[0].partition(". ")[0]
        message = f"but it cannot be read: {type(error).__name__}: {reason[:200]}"
        raise _refused(path, message, "check that it is whole, and a checkpoint") from error


def _state_dict(loaded: Any) -> dict[str, Any]:
    """Find the tensors by name in what a checkpoint holds."""
    from torch import Tensor

    if not isinstance(loaded, Mapping):
        return {}
    inner = next((loaded[key] for key in _STATE_KEYS if isinstance(loaded.get(key), Mapping)), loaded)
    return {name: value for name, value in inner.items() if isinstance(name, str) and isinstance(value, Tensor)}


def _outline(
    path: Path, tensors: Mapping[str, TensorFacts], *, ordered: bool, tied: Mapping[str, str] | None = None
) -> ModelOutline:
    buffers = {name: facts for name, facts in tensors.items() if is_buffer(name, facts)}
    names: list[str] = [name for name in tensors if name not in buffers]
    if not names:
        raise _refused(path, "got one without parameters", "name a file with the weights of a model")
    names = names if ordered else guessed_order(names)
    notes = list(_notes(buffers, ordered=ordered))
    parameters = {name: tensors[name] for name in names}
    return ModelOutline(_title(path), str(path), parameters, dict(tied or {}), buffers, notes=tuple(notes))


def _notes(buffers: Mapping[str, TensorFacts], *, ordered: bool) -> Iterator[str]:
    if not ordered:
        yield _ORDER
    if buffers:
        yield f"Taken for buffers by name and type: {listed(list(buffers), limit=3)}."


def _title(path: Path) -> str:
    """Make a name that can be a class's."""
    stem = path.name.partition(".")[0]
    if stem in ("model", "pytorch_model", "") or re.fullmatch(r"model-\d+-of-\d+", stem):
        stem = path.resolve().parent.name
    return re.sub(r"\W", "_", stem) or "model"


def _broken(path: Path, got: str) -> ScheduleError:
    return ScheduleError(Problem(f"expected the header of a safetensors file, got {got}", "fetch it again", str(path)))


def _refused(path: Path, message: str, fix: str) -> ScheduleError:
    return ScheduleError(Problem(f"expected a file with the tensors of a model, {message}", fix, str(path)))
