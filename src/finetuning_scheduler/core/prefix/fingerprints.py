"""A sample is known by the content of what enters the prefix, row by row: a key of 16 bytes each.

On a CPU the bytes of a row are hashed with BLAKE2b. On other devices four dot products over 32-bit words, each kept
to its upper 32 bits ("multiply-shift", which is universal: Dietzfelbinger, STACS 1996), are taken where the data is, so
that 16 bytes a row travel and never the inputs. Two different rows agree in all four with a probability of 2^-128.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Mapping, Sequence, Set
from enum import Enum
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .tiers import buffer_of

Key: TypeAlias = bytes
KEY_BYTES = 16
_WORDS_OF_A_BATCH = 1 << 22  # taken at a time: bounds what a digest on a device needs besides its input
_WORDS_OF_A_ROW = 1 << 18


def row_keys(
    tensors: Sequence[object],
    row_dims: Sequence[int | None],
    *,
    masks: Sequence[Tensor | None] | None = None,
) -> list[Key]:
    """Return a key for each row of a batch: equal keys mean equal bits in all that the row consists of.

    What has no rows (a tensor without a row dimension, a plain Python value) counts in every key. Values count by
    their bits: 0.0 and -0.0 differ, equal NaNs do not. So do type and shape, apart from the number of rows.

    Args:
        tensors: The inputs: tensors, and plain values such as numbers, strings, ``None``, dtypes, devices and
            sequences, mappings and sets of them.
        row_dims: For each input the dimension along which its rows lie, or ``None``.
        masks: For each input ``None``, or what counts of it: a boolean tensor whose first dimension is the rows and
            whose others are, from the left, those of a row, each of the same size or 1. One of them, the positions,
            may be greater than 1. What is masked does not count, and neither do positions behind a row's last one that
            counts, so that a row keeps its key when it is padded to another width. An input without a row dimension
            counts for each row as far as the mask says.

    Raises:
        TypeError: An input is of a kind whose content cannot be read.
        ValueError: No input has rows, or they have different numbers of rows, or a mask does not fit.
    """
    masks = [None] * len(tensors) if masks is None else masks
    if not len(tensors) == len(row_dims) == len(masks):
        raise ValueError(f"expected one row dimension and mask each for {len(tensors)} inputs")
    count = _number_of_rows(tensors, row_dims)
    common = hashlib.blake2b(digest_size=KEY_BYTES)
    pieces: list[Callable[[int], bytes | memoryview]] = []
    devices = _DeviceDigests()
    for value, row_dim, mask in zip(tensors, row_dims, masks, strict=True):
        if not isinstance(value, Tensor):
            common.update(_encoded(value))
            continue
        readable = plain(value)
        common.update(f"tensor {readable.dtype} {row_dim is None} {mask is None} ".encode())
        if row_dim is None and mask is None:
            common.update(_header(readable.shape))
            _add_common(common, readable, devices)
            continue
        rows = readable.expand(count, *readable.shape) if row_dim is None else readable.movedim(row_dim, 0)
        pieces += _row_pieces(common, rows, mask, devices)
    digests = devices.read()
    common.update(digests.common)
    keys = []
    for row in range(count):
        key = common.copy()
        for piece in pieces:
            key.update(piece(row))
        for words in digests.rows:
            key.update(words[row])
        keys.append(key.digest())
    return keys


def tensor_key(tensor: Tensor) -> Key:
    """Return a key of a whole tensor, of the kinds that :func:`row_keys` reads."""
    return row_keys([tensor[None]], [0])[0]


def plain(tensor: Tensor) -> Tensor:
    """Return a tensor, without its graph, whose memory holds the values themselves.

    Raises:
        TypeError: It is of another kind: a subclass, sparse, quantised, nested or without memory.
    """
    readable = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    if not readable or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
        kind = type(tensor).__name__ if type(tensor) is not Tensor else f"{tensor.layout} {tensor.dtype}"
        raise TypeError(f"expected plain dense tensors, got one of kind {kind}")
    return tensor.detach().resolve_conj().resolve_neg()


@torch.no_grad()
def row_digests(rows: Tensor) -> Tensor:
    """Return 128 bits for each row, computed on the rows' device without waiting for it.

    Zero bytes at the end of a row do not count: its length has to be known otherwise.

    Args:
        rows: Bytes of the rows, an uint8 tensor [rows, bytes].

    Returns:
        An int64 tensor [rows, 2].
    """
    count, words = len(rows), _words(rows)
    sums = torch.zeros(count, 4, dtype=torch.int64, device=rows.device)
    step = min(_WORDS_OF_A_ROW, max(1, _WORDS_OF_A_BATCH // max(1, count)))
    for begin in range(0, words.shape[1], step):
        piece = words[:, begin : begin + step].to(torch.int64)
        factors = _factors(begin, piece.shape[1], rows.device)
        for number in range(4):
            sums[:, number] += (piece * factors[number]).sum(dim=1)
    sums = (sums + _factors(-1, 1, rows.device)[:, 0]) >> 32  # the upper half of each sum
    low = 0xFFFFFFFF
    return torch.stack([(sums[:, 0] << 32) | (sums[:, 1] & low), (sums[:, 2] << 32) | (sums[:, 3] & low)], dim=1)


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _words(rows: Tensor) -> Tensor:
    """View bytes as 32-bit words, filled up with zero bytes."""
    count, size = rows.shape
    if size % 4:
        filled = rows.new_zeros(count, size + 4 - size % 4)
        filled[:, :size] = rows
        rows = filled
    return rows.contiguous().view(torch.int32) if rows.numel() else rows.new_zeros(count, 0, dtype=torch.int32)


@lru_cache(maxsize=8)
def _factors(begin: int, count: int, device: torch.device) -> Tensor:
    """Return four 64-bit factors for each word, those of a word the same whatever the row's length: SplitMix64."""
    index = torch.arange(begin, begin + count, dtype=torch.int64, device=device) + 1
    counter = index * 4 + torch.arange(4, dtype=torch.int64, device=device)[:, None]
    mixed = counter * _signed(0x9E3779B97F4A7C15) + _signed(0xD1B54A32D192ED03)
    mixed = (mixed ^ _shifted(mixed, 30)) * _signed(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ _shifted(mixed, 27)) * _signed(0x94D049BB133111EB)
    return mixed ^ _shifted(mixed, 31)


def _signed(number: int) -> int:
    return number - (1 << 64)


def _shifted(values: Tensor, bits: int) -> Tensor:
    """Shift right as unsigned numbers are shifted."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


class _DeviceDigests:
    """Digests that lie on devices, read together: one transfer a device."""

    def __init__(self) -> None:
        self._digests: list[tuple[Tensor, bool]] = []
        self.common = b""
        self.rows: list[list[bytes]] = []

    def add(self, rows: Tensor, *, common: bool) -> None:
        """Take the bytes of rows, or of a tensor that counts for all of them as its only row."""
        self._digests.append((row_digests(rows), common))

    def read(self) -> _DeviceDigests:
        """Wait for the devices and fill in what they found."""
        for device in dict.fromkeys(digest.device for digest, _ in self._digests):
            there = [(digest, common) for digest, common in self._digests if digest.device == device]
            read = torch.cat([digest for digest, _ in there]).cpu()
            data = bytes(buffer_of(read))
            begin = 0
            for digest, common in there:
                pieces = [data[begin + 16 * row : begin + 16 * (row + 1)] for row in range(len(digest))]
                begin += 16 * len(digest)
                if common:
                    self.common += pieces[0]
                else:
                    self.rows.append(pieces)
        return self


def _number_of_rows(tensors: Sequence[object], row_dims: Sequence[int | None]) -> int:
    counts = []
    for value, row_dim in zip(tensors, row_dims, strict=True):
        if row_dim is None:
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"expected a tensor with rows, got {type(value).__name__}")
        counts.append(value.shape[row_dim])
    if not counts or len(set(counts)) > 1:
        raise ValueError(f"expected inputs with the same number of rows, got {counts}")
    return counts[0]


def _bytes(rows: Tensor) -> Tensor:
    """View rows as bytes [rows, bytes]."""
    flat = rows.reshape(len(rows), -1).contiguous()
    return flat.view(torch.uint8) if flat.numel() else flat.new_zeros(len(rows), 0, dtype=torch.uint8)


def _header(shape: Sequence[int]) -> bytes:
    return f"{list(shape)};".encode()


def _add_common(common: Any, tensor: Tensor, devices: _DeviceDigests) -> None:
    if not _on_cpu(tensor):
        devices.add(_bytes(tensor[None]), common=True)
        return
    dense = tensor.contiguous()
    common.update(buffer_of(dense))


def _row_pieces(
    common: Any, rows: Tensor, mask: Tensor | None, devices: _DeviceDigests
) -> list[Callable[[int], bytes | memoryview]]:
    """Say what counts of each row, besides what goes into the common part and to the devices."""
    if mask is None:
        common.update(_header(rows.shape[1:]))
        if not _on_cpu(rows):
            devices.add(_bytes(rows), common=False)
            return []
        return [_whole_rows(rows)]
    rows, positions = _positions_first(rows, mask)
    common.update(_header(rows.shape[2:]))
    each = math.prod(rows.shape[2:]) * rows.element_size()
    rows = _bytes(rows).reshape(*positions.shape, each) * positions[:, :, None]
    if not _on_cpu(rows):
        devices.add(_bytes(rows), common=False)
        devices.add(_bytes(positions), common=False)
        return []
    return [_counted_rows(rows, positions)]


def _whole_rows(rows: Tensor) -> Callable[[int], memoryview]:
    dense = rows.contiguous()
    buffer, size = buffer_of(dense), dense.numel() * dense.element_size() // max(1, len(dense))

    def piece(row: int, _keep: Tensor = dense) -> memoryview:
        return buffer[row * size : (row + 1) * size]

    return piece


def _counted_rows(rows: Tensor, positions: Tensor) -> Callable[[int], bytes]:
    width = positions.shape[1]
    numbers = torch.arange(1, width + 1)
    lengths = (positions * numbers).amax(dim=1).tolist() if width else [0] * len(rows)
    content, counted = _whole_rows(rows), _whole_rows(positions)
    each = rows.shape[2]

    def piece(row: int) -> bytes:
        length = lengths[row]
        return struct.pack("<q", length) + counted(row)[:length].tobytes() + content(row)[: length * each].tobytes()

    return piece


def _positions_first(rows: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Bring the masked dimension right behind the rows; return the mask as [rows, positions]."""
    sizes = mask.shape[1:]
    fits = mask.dtype is torch.bool and 1 < mask.dim() <= rows.dim() and len(mask) == len(rows)
    if not fits or any(size not in (1, whole) for size, whole in zip(sizes, rows.shape[1:], strict=False)):
        raise ValueError(f"expected a boolean mask for rows of {list(rows.shape)}, got {mask.dtype} {list(mask.shape)}")
    wide = [dimension for dimension, size in enumerate(sizes, start=1) if size != 1]
    if len(wide) > 1:
        raise ValueError(f"expected a mask over one dimension of a row, got one of shape {list(mask.shape)}")
    chosen = wide[0] if wide else next((d for d, size in enumerate(rows.shape[1 : mask.dim()], 1) if size == 1), 1)
    positions = mask.movedim(chosen, 1).flatten(1).to(rows.device)
    if positions.shape[1] != rows.shape[chosen]:
        positions = positions.expand(-1, rows.shape[chosen])
    return rows.movedim(chosen, 1), positions.contiguous()


def _encoded(value: object) -> bytes:
    """Write a plain value such that different values, types included, are written differently."""
    kind = type(value)
    if value is None or kind in (bool, int, complex, torch.dtype, torch.device, torch.layout, torch.memory_format):
        content = repr(value).encode()
    elif kind is float:
        content = struct.pack("<d", value)
    elif kind in (str, bytes):
        content = value.encode(errors="surrogatepass") if isinstance(value, str) else bytes(value)  # type: ignore[call-overload]
    elif isinstance(value, Enum):
        content = value.name.encode()
    elif isinstance(value, slice):
        content = b"".join(_encoded(each) for each in (value.start, value.stop, value.step))
    elif isinstance(value, Mapping):
        content = b"".join(_encoded(key) + _encoded(each) for key, each in value.items())
    elif isinstance(value, Sequence):
        content = b"".join(_encoded(each) for each in value)
    elif isinstance(value, Set):
        content = b"".join(sorted(_encoded(each) for each in value))
    else:
        raise TypeError(f"expected tensors and plain values, got {kind.__module__}.{kind.__qualname__}")
    name = f"{kind.__module__}.{kind.__qualname__}"
    return f"{name} {len(content)}:".encode() + content
