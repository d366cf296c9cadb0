"""What was added comes back for any batch, bit by bit, or nothing does."""

from __future__ import annotations

import gc
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finetuning_scheduler.core.prefix import tiers
from finetuning_scheduler.core.prefix.store import PrefixStore

ROWS = 12
KEYS = [bytes([row]) * 16 for row in range(ROWS)]
ORDER = [3, 0, 11, 3, 7]
PADDED = {"position_dims": [1, None, 2, None]}


@pytest.fixture(params=["memory", "files", "both", "shared"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., PrefixStore]]:
    """Make stores that keep rows in each place, and close them."""
    stores: list[PrefixStore] = []
    kinds: dict[str, dict[str, Any]] = {
        "memory": {},
        "files": {"budget": 0},
        "both": {"budget": 600},
        "shared": {"shared": "us"},
    }

    def made(**more: Any) -> PrefixStore:
        stores.append(PrefixStore(directory=tmp_path, **{**kinds[request.param], **more}))
        return stores[-1]

    yield made
    for store in stores:
        store.close()
        assert store.failure is None
    assert list(tmp_path.iterdir()) == []


def identical(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same in every bit, and in how they lie in memory."""
    lie = [[step for size, step in zip(each.shape, each.stride(), strict=True) if size > 1] for each in (one, other)]
    alike = lie[0] == lie[1] and (one.dtype, one.shape, one.device) == (other.dtype, other.shape, other.device)
    return alike and one.tolist().__repr__() == other.tolist().__repr__()


def kinds_of_tensors() -> dict[str, tuple[Tensor, int | None]]:
    def random_(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(0))

    odd = random_(ROWS, 4)
    odd[0], odd[1, 0] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]), float("-inf")
    return {
        "floats": (random_(ROWS, 4, 3), 0),
        "odd numbers": (odd, 0),
        "doubles": (random_(ROWS, 3).double(), 0),
        "bfloat16": (random_(ROWS, 3).bfloat16(), 0),
        "half": (random_(ROWS, 3).half(), 0),
        "complex": (torch.complex(random_(ROWS, 3), random_(ROWS, 3)), 0),
        "conjugated": (torch.complex(random_(ROWS, 3), random_(ROWS, 3)).conj(), 0),
        "booleans": (random_(ROWS, 7) > 0, 0),
        "integers": (torch.randint(-(1 << 62), 1 << 62, (ROWS, 3)), 0),
        "bytes": (torch.randint(0, 256, (ROWS, 5), dtype=torch.uint8), 0),
        "a number a row": (random_(ROWS), 0),
        "nothing a row": (random_(ROWS, 0, 3), 0),
        "images, channels last": (random_(ROWS, 3, 4, 5).to(memory_format=torch.channels_last), 0),
        "rows in the second dimension": (random_(2, ROWS, 3), 1),
        "rows in the last dimension": (random_(2, 3, ROWS), -1),
        "sequence first, seen batch first": (random_(4, ROWS, 3).transpose(0, 1), 0),
        "a table": (random_(5, 3), None),
        "a transposed table": (random_(5, 3).t(), None),
        "a number": (torch.tensor(3.0), None),
    }


def chosen(tensor: Tensor, row_dim: int | None, order: Sequence[int]) -> Tensor:
    """What a batch of some rows has, in the memory format of the whole."""
    if row_dim is None:
        return tensor
    physical = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    dense = tensor.resolve_conj().permute(physical)
    picked = dense.index_select(physical.index(row_dim % tensor.dim()), torch.tensor(order)).contiguous()
    return picked.permute([physical.index(dim) for dim in range(tensor.dim())])


@pytest.mark.parametrize("kind", kinds_of_tensors())
def test_rows_come_back_in_any_batch(kind: str, make: Callable[..., PrefixStore]) -> None:
    tensor, row_dim = kinds_of_tensors()[kind]
    store = make()
    store.add("train", KEYS, [tensor], [row_dim])
    for order in (range(ROWS), ORDER, [5]):
        found = store.get("train", [KEYS[row] for row in order])
        assert found is not None
        assert identical(found[0], chosen(tensor, row_dim, order))


def test_all_tensors_of_a_batch_come_back_together(make: Callable[..., PrefixStore]) -> None:
    store, tensors = make(), kinds_of_tensors()
    store.add("train", KEYS, [tensor for tensor, _ in tensors.values()], [dim for _, dim in tensors.values()])
    found = store.get("train", [KEYS[row] for row in ORDER])
    assert found is not None
    for found_tensor, (tensor, row_dim) in zip(found, tensors.values(), strict=True):
        assert identical(found_tensor, chosen(tensor, row_dim, ORDER))


def test_rows_are_added_batch_by_batch_and_once(make: Callable[..., PrefixStore]) -> None:
    store, rows = make(), torch.randn(ROWS, 40)
    for begin in range(0, ROWS, 4):
        batch = slice(begin, begin + 4)
        assert store.has("train", KEYS[batch]) == [False] * 4
        store.add("train", KEYS[batch], [rows[batch]], [0])
    kept = store.bytes + store.spilled_bytes
    store.add("train", [KEYS[5], KEYS[5], KEYS[0]], [torch.zeros(3, 40)], [0])
    assert store.bytes + store.spilled_bytes == kept == ROWS * 160
    store.add("train", [b"new" * 5 + b"1", KEYS[1]], [torch.ones(2, 40)], [0])
    found = store.get("train", [*KEYS, b"new" * 5 + b"1"])
    assert found is not None
    assert torch.equal(found[0], torch.cat([rows, torch.ones(1, 40)]))


def test_a_row_twice_in_a_batch_is_kept_as_it_was_first(make: Callable[..., PrefixStore]) -> None:
    store = make()
    store.add("train", [KEYS[0], KEYS[1], KEYS[0]], [torch.tensor([1.0, 2.0, 3.0])], [0])
    found = store.get("train", [KEYS[0], KEYS[1], KEYS[0]])
    assert found is not None
    assert found[0].tolist() == [1, 2, 1]


def test_nothing_comes_back_unless_everything_is_there(make: Callable[..., PrefixStore]) -> None:
    store = make()
    assert store.get("train", KEYS) is None
    assert store.get("train", []) is None
    store.add("train", KEYS[:-1], [torch.zeros(ROWS - 1, 2)], [0])
    assert store.get("train", KEYS) is None
    assert store.has("train", KEYS) == [True] * (ROWS - 1) + [False]
    assert store.get("validate", KEYS[:-1]) is None
    assert store.has("validate", KEYS) == [False] * ROWS


DIFFERENT = {
    "shapes": ([torch.zeros(1, 2)], [torch.zeros(1, 3)]),
    "types": ([torch.zeros(1, 2)], [torch.zeros(1, 2, dtype=torch.float64)]),
    "numbers of tensors": ([torch.zeros(1, 2)], [torch.zeros(1, 2)] * 2),
    "tables": ([torch.zeros(1, 2), torch.zeros(3)], [torch.zeros(1, 2), torch.ones(3)]),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_rows_of_batches_that_differ_are_not_mixed(what: str, make: Callable[..., PrefixStore]) -> None:
    store = make()
    for key, tensors in zip(KEYS[:2], DIFFERENT[what], strict=True):
        store.add("train", [key], tensors, [0 if len(tensor) == 1 else None for tensor in tensors])
    assert store.has("train", KEYS[:2]) == [True, True]
    assert store.get("train", KEYS[:2]) is None
    for key, tensors in zip(KEYS[:2], DIFFERENT[what], strict=True):
        found = store.get("train", [key])
        assert found is not None
        assert all(torch.equal(one, other) for one, other in zip(found, tensors, strict=True))


def test_tensors_of_one_batch_share_no_memory(make: Callable[..., PrefixStore]) -> None:
    store = make()
    store.add("train", KEYS, [torch.zeros(ROWS, 2), torch.zeros(ROWS, 3), torch.zeros(4)], [0, 0, None])
    for keys in (KEYS[:1], KEYS):
        found = store.get("train", keys)
        assert found is not None
        assert len({tensor.untyped_storage().data_ptr() for tensor in found}) == 3


def test_what_comes_back_is_a_copy_of_a_copy(make: Callable[..., PrefixStore]) -> None:
    store, rows, table = make(), torch.zeros(ROWS, 2), torch.zeros(3)
    store.add("train", KEYS, [rows, table], [0, None])
    for tensor in (rows, table):
        tensor += 1
    for _ in range(2):
        found = store.get("train", KEYS)
        assert found is not None
        for tensor in found:
            assert not tensor.any()
            tensor += 1


def test_graphs_and_modes_of_inference_leave_ordinary_tensors(make: Callable[..., PrefixStore]) -> None:
    store = make()
    with torch.inference_mode():
        store.add("train", KEYS, [torch.zeros(ROWS, 2)], [0])
    store.add("validate", KEYS, [torch.zeros(ROWS, 2, requires_grad=True) * 2], [0])
    store.add("train", [b"n" * 16], [torch.zeros(1, 2)], [0])
    for split in ("train", "validate"):
        with torch.inference_mode(split == "train"):
            found = store.get(split, KEYS)
        assert found is not None
        assert not found[0].requires_grad
        assert not found[0].is_inference()
        (torch.ones(2, requires_grad=True) * found[0]).sum().backward()


def test_a_device_in_force_does_not_matter(make: Callable[..., PrefixStore]) -> None:
    store, rows = make(), torch.randn(ROWS, 2)
    with torch.device("meta"):
        store.add("train", KEYS, [rows, rows], [0, None])
        found = store.get("train", KEYS)
    assert found is not None
    assert all(torch.equal(tensor, rows) for tensor in found)


# --- padding ----------------------------------------------------------------------------------------------------------


def padded_batch(lengths: Sequence[int], width: int) -> list[Tensor]:
    """Hidden states, a number a row, a mask with positions last, and a table of the width."""
    hidden = torch.stack([torch.full((width, 3), float(length)) for length in lengths])
    mask = torch.stack([(torch.arange(width) < length)[None] for length in lengths])
    return [hidden, torch.tensor(lengths), mask, torch.arange(width)]


def test_rows_of_any_width_come_back_in_any_width(make: Callable[..., PrefixStore]) -> None:
    store = make()
    for lengths in ([1, 4], [2, 6], [5, 3]):
        keys = [KEYS[length] for length in lengths]
        store.add("train", keys, padded_batch(lengths, max(lengths)), [0, 0, 0, None], lengths=lengths, **PADDED)
    for lengths, width in (([3, 1, 4], 4), ([6, 1], 6), ([2], 5)):
        found = store.get("train", [KEYS[length] for length in lengths], width=width)
        assert found is not None
        hidden, numbers, mask, table = padded_batch(lengths, width)
        assert torch.equal(found[0], hidden * mask.transpose(1, 2))
        assert torch.equal(found[1], numbers)
        assert torch.equal(found[2], mask)
        assert torch.equal(found[3], table)


def test_widths_that_are_too_small_or_unknown_give_nothing(make: Callable[..., PrefixStore]) -> None:
    store = make()
    store.add("train", KEYS[:2], padded_batch([1, 4], 4), [0, 0, 0, None], lengths=[1, 4], **PADDED)
    store.add("validate", KEYS[:2], padded_batch([1, 4], 4)[:1], [0], lengths=[1, 4], position_dims=[1])
    assert store.get("train", KEYS[:1], width=5) is None  # no batch was 5 wide: its table is not known
    assert store.get("train", KEYS[:2], width=3) is None
    assert store.get("validate", KEYS[:1], width=3) is None
    assert store.get("validate", KEYS[:2]) is None


def test_a_table_that_the_width_does_not_tell_is_not_guessed(make: Callable[..., PrefixStore]) -> None:
    store = make()
    for key, table in zip(KEYS, (torch.zeros(2), torch.ones(2)), strict=False):
        store.add("train", [key], [torch.zeros(1, 4), table], [0, None], lengths=[4], position_dims=[1, None])
    assert store.get("train", KEYS[:1], width=4) is None


def test_padding_is_not_kept(make: Callable[..., PrefixStore]) -> None:
    store = make()
    store.add("train", KEYS[:2], [torch.ones(2, 1000, 4)], [0], lengths=[1, 2], position_dims=[1])
    assert store.bytes + store.spilled_bytes == 3 * 16


# --- types ------------------------------------------------------------------------------------------------------------


def test_floats_are_rounded_to_the_stores_type_and_nothing_else_is(make: Callable[..., PrefixStore]) -> None:
    store = make(dtype=torch.bfloat16)
    rows, integers, table = torch.randn(ROWS, 64), torch.arange(ROWS) + (1 << 40), torch.randn(5)
    store.add("train", KEYS, [rows, integers, table], [0, 0, None])
    found = store.get("train", KEYS)
    assert found is not None
    assert identical(found[0], rows.bfloat16().float())
    assert identical(found[1], integers)
    assert identical(found[2], table.bfloat16().float())
    assert store.bytes + store.spilled_bytes < ROWS * 64 * 3


# --- memory and files -------------------------------------------------------------------------------------------------


def files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def test_files_take_what_is_beyond_the_budget(tmp_path: Path) -> None:
    store, rows = PrefixStore(budget=5 * 400, directory=tmp_path), torch.randn(ROWS, 100)
    for row in range(ROWS):
        store.add("train", [KEYS[row]], [rows[row : row + 1]], [0])
        assert store.bytes <= 5 * 400
    assert store.bytes + store.spilled_bytes == ROWS * 400
    assert store.spilled_bytes == 7 * 400
    found = store.get("train", KEYS[::-1])
    assert found is not None
    assert torch.equal(found[0], rows.flip(0))


@pytest.mark.parametrize("budget", [None, 1 << 20])
def test_no_directory_is_made_as_long_as_there_is_memory(budget: int | None, tmp_path: Path) -> None:
    store = PrefixStore(budget=budget, directory=tmp_path)
    store.add("train", KEYS, [torch.zeros(ROWS, 2)], [0])
    assert list(tmp_path.iterdir()) == []
    assert (store.bytes, store.spilled_bytes) == (ROWS * 16, 0)


def test_segments_grow_and_all_of_them_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tiers, "_FIRST_SEGMENT", 256)
    store, rows = PrefixStore(budget=1 << 16, directory=tmp_path), torch.randn(200, 6)
    keys = [row.to_bytes(16, "big") for row in range(200)]
    for begin in range(0, 200, 8):
        batch = slice(begin, begin + 8)
        store.add("train", keys[batch], [rows[batch, : 4 + 2 * (begin % 16 == 0)]], [0])
    wide = [row for row in range(200) if row // 8 % 2 == 0]
    random.Random(0).shuffle(wide)
    found = store.get("train", [keys[row] for row in wide])
    assert found is not None
    assert torch.equal(found[0], rows[wide])
    assert store.spilled_bytes == 0


def test_memory_that_is_refused_is_taken_from_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tiers, "free_memory", lambda device: 1 << 62)
    store, rows = PrefixStore(directory=tmp_path), torch.randn(ROWS, 2)
    monkeypatch.setattr(tiers, "_FIRST_SEGMENT", 1 << 58)
    store.add("train", KEYS, [rows], [0])
    found = store.get("train", KEYS)
    assert found is not None
    assert torch.equal(found[0], rows)
    assert (store.bytes, store.spilled_bytes) == (0, ROWS * 16)


@pytest.mark.parametrize("budget", [0, 400, None])
def test_dropping_gives_back_the_place_of_one_split(budget: int | None, tmp_path: Path) -> None:
    store = PrefixStore(budget=budget, directory=tmp_path)
    for split in ("a", "b"):
        store.add(split, KEYS, [torch.full((ROWS, 4), float(ord(split)))], [0])
    kept = store.bytes + store.spilled_bytes
    store.drop("a")
    store.drop("never there")
    assert store.bytes + store.spilled_bytes == kept / 2
    assert store.get("a", KEYS) is None
    found = store.get("b", KEYS)
    assert found is not None
    assert found[0].unique().tolist() == [ord("b")]
    assert len([path for path in files(tmp_path) if path.suffix == ".rows"]) == (0 if budget is None else 1)
    store.add("a", KEYS, [torch.zeros(ROWS, 3)], [0])
    found = store.get("a", KEYS)
    assert found is not None
    assert found[0].shape == (ROWS, 3)


def test_what_is_dropped_is_given_back_to_the_budget(tmp_path: Path) -> None:
    store = PrefixStore(budget=ROWS * 16, directory=tmp_path)
    for _ in range(5):
        store.add("a", KEYS, [torch.zeros(ROWS, 4)], [0])
        assert (store.bytes, store.spilled_bytes) == (ROWS * 16, 0)
        store.drop("a")


@pytest.mark.parametrize("how", ["closed", "forgotten"])
def test_files_end_with_the_store(how: str, tmp_path: Path) -> None:
    store = PrefixStore(budget=0, directory=tmp_path / "made")
    store.add("train", KEYS, [torch.zeros(ROWS, 2)], [0])
    assert len(files(tmp_path)) == 2
    if how == "closed":
        store.close()
        assert store.get("train", KEYS) is None
        assert store.spilled_bytes == 0
    else:
        del store
        gc.collect()
    assert files(tmp_path) == []


def test_the_default_directory_is_the_systems(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = PrefixStore(budget=0)
    store.add("train", KEYS, [torch.zeros(ROWS, 2)], [0])
    assert len(files(tmp_path)) == 2
    store.close()
    assert list(tmp_path.iterdir()) == []


# --- what fails -------------------------------------------------------------------------------------------------------


def assert_given_up(store: PrefixStore, reason: str) -> None:
    assert store.failure is not None
    assert reason in store.failure
    assert store.get("train", KEYS) is None
    assert store.has("train", KEYS) == [False] * ROWS
    store.add("train", KEYS, [torch.zeros(ROWS, 2)], [0])
    assert store.has("train", KEYS) == [False] * ROWS
    assert (store.bytes, store.spilled_bytes) == (0, 0)


def refuse_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: int, begin: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)


def nearly_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 1 << 40, 1 << 30))


@pytest.mark.parametrize("disk", [refuse_allocation, nearly_full])
def test_a_full_disk(
    disk: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = PrefixStore(budget=100, directory=tmp_path)
    store.add("train", KEYS[:2], [torch.zeros(2, 2)], [0])
    disk(monkeypatch)
    store.add("train", KEYS[2:], [torch.zeros(ROWS - 2, 2)], [0])
    assert_given_up(store, "No space left")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shared", [None, "us"])
def test_a_directory_that_cannot_be_made(shared: str | None, tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")
    store = PrefixStore(budget=0, directory=tmp_path / "a file" / "below", shared=shared)
    store.add("train", KEYS, [torch.zeros(ROWS, 2)], [0])
    assert_given_up(store, "Not a directory")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    store = PrefixStore(budget=0, directory=tmp_path)
    store.add("train", KEYS, [torch.zeros(ROWS, 2)], [0])
    assert_given_up(store, "Permission denied")


def test_a_file_that_was_cut_short(tmp_path: Path) -> None:
    store = PrefixStore(budget=0, directory=tmp_path)
    store.add("train", KEYS, [torch.zeros(ROWS, 2)], [0])
    (rows,) = (path for path in files(tmp_path) if path.suffix == ".rows")
    os.truncate(rows, 40)
    assert store.get("train", KEYS[:2]) is not None
    assert store.get("train", KEYS) is None
    assert_given_up(store, "ends within a record")


def test_files_that_were_removed_stay_readable_as_long_as_they_are_open(tmp_path: Path) -> None:
    store = PrefixStore(budget=0, directory=tmp_path)
    store.add("train", KEYS, [torch.zeros(ROWS, 2)], [0])
    for path in tmp_path.iterdir():
        shutil.rmtree(path)
    assert store.get("train", KEYS) is not None
    store.add("validate", KEYS, [torch.zeros(ROWS, 2)], [0])
    assert_given_up(store, "No such file")


def test_a_directory_that_was_removed_before_it_was_read(tmp_path: Path) -> None:
    store = PrefixStore(directory=tmp_path, shared="us")
    store.add("train", KEYS[:1], [torch.zeros(1, 2)], [0])
    for path in tmp_path.iterdir():
        shutil.rmtree(path)
    assert store.get("train", KEYS) is None
    assert_given_up(store, "No such file")


@pytest.mark.parametrize("tensor", [torch.zeros(ROWS, 2).to_sparse(), torch.zeros(ROWS, 2, device="meta")], ids=str)
def test_a_tensor_that_cannot_be_kept(tensor: Tensor, tmp_path: Path) -> None:
    store = PrefixStore(directory=tmp_path)
    store.add("train", KEYS, [tensor], [0])
    assert_given_up(store, "expected plain dense tensors")


@pytest.mark.parametrize("reading", [False, True])
def test_no_memory_for_a_batch(reading: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    store = PrefixStore(directory=tmp_path)
    if reading:
        store.add("train", KEYS, [torch.zeros(ROWS, 2)], [0])
    monkeypatch.setattr("finetuning_scheduler.core.prefix.split._gathered", refuse)
    monkeypatch.setattr("finetuning_scheduler.core.prefix.records.Layout.write", refuse)
    store.get("train", KEYS)
    store.add("train", KEYS, [torch.zeros(ROWS, 2)], [0])
    assert_given_up(store, "CUDA out of memory")


# --- processes that share ---------------------------------------------------------------------------------------------


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[list[PrefixStore]]:
    """Stores as two processes of a node have them; each finds the other's rows in files only."""
    stores = [PrefixStore(directory=tmp_path, shared="us") for _ in range(2)]
    yield stores
    for store in stores:
        store.close()
        assert store.failure is None
    assert list(tmp_path.iterdir()) == []


def test_rows_of_another_process_are_found(ranks: list[PrefixStore]) -> None:
    rows, table, images = torch.randn(ROWS, 4), torch.randn(2, 3).t(), torch.randn(ROWS, 3, 4, 4)
    images = images.to(memory_format=torch.channels_last)
    for number, store in enumerate(ranks):
        mine = slice(number * 6, number * 6 + 6)
        store.add("train", KEYS[mine], [rows[mine], table, images[mine]], [0, None, 0])
    for store in ranks:
        assert store.has("train", KEYS) == [True] * ROWS
        found = store.get("train", [KEYS[row] for row in ORDER])
        assert found is not None
        for found_tensor, (tensor, dim) in zip(found, [(rows, 0), (table, None), (images, 0)], strict=True):
            assert identical(found_tensor, chosen(tensor, dim, ORDER))
        assert store.spilled_bytes < ROWS * 1000


def test_padded_rows_of_another_process_are_found(ranks: list[PrefixStore]) -> None:
    for store, lengths in zip(ranks, ([1, 4], [2, 6]), strict=True):
        keys = [KEYS[length] for length in lengths]
        store.add("train", keys, padded_batch(lengths, max(lengths)), [0, 0, 0, None], lengths=lengths, **PADDED)
    for store in ranks:
        found = store.get("train", [KEYS[2], KEYS[1]], width=4)
        assert found is not None
        hidden, _, mask, table = padded_batch([2, 1], 4)
        assert torch.equal(found[0], hidden * mask.transpose(1, 2))
        assert torch.equal(found[3], table)


def test_a_row_that_is_there_is_not_written_by_another(ranks: list[PrefixStore]) -> None:
    ranks[0].add("train", KEYS, [torch.zeros(ROWS, 4)], [0])
    ranks[1].add("train", KEYS, [torch.zeros(ROWS, 4)], [0])
    assert [store.spilled_bytes for store in ranks] == [ROWS * 16, 0]


def test_what_was_dropped_is_not_found_by_a_process_that_reads_late(ranks: list[PrefixStore]) -> None:
    ranks[0].add("train", KEYS, [torch.zeros(ROWS, 4)], [0])  # not read by the other one
    ranks[1].drop("train")
    assert ranks[1].has("train", KEYS) == [False] * ROWS
    ranks[0].drop("train")
    ranks[0].add("train", KEYS, [torch.ones(ROWS, 4)], [0])
    found = ranks[1].get("train", KEYS)
    assert found is not None
    assert found[0].unique().tolist() == [1]


def test_the_first_to_drop_takes_nothing_from_the_others(ranks: list[PrefixStore]) -> None:
    ranks[0].add("train", KEYS, [torch.zeros(ROWS, 4)], [0])
    assert ranks[1].get("train", KEYS[:1]) is not None
    ranks[0].drop("train")
    assert ranks[1].get("train", KEYS) is not None


def test_an_index_whose_rows_are_gone_is_left_alone(ranks: list[PrefixStore], tmp_path: Path) -> None:
    ranks[0].add("train", KEYS, [torch.zeros(ROWS, 4)], [0])
    for path in files(tmp_path):
        if path.suffix == ".rows":
            path.unlink()
    assert ranks[1].get("train", KEYS) is None
    ranks[1].add("train", KEYS, [torch.ones(ROWS, 4)], [0])
    assert ranks[1].get("train", KEYS) is not None


@pytest.mark.parametrize("cut", [1, 10, 200])
def test_half_a_line_of_an_index_is_not_read(cut: int, ranks: list[PrefixStore], tmp_path: Path) -> None:
    ranks[0].add("train", KEYS[:3], [torch.zeros(3, 4)], [0])
    (index,) = (path for path in files(tmp_path) if path.suffix == ".index")
    whole = index.read_bytes()
    more = whole.replace(KEYS[0].hex().encode(), KEYS[9].hex().encode())
    index.write_bytes(whole + more[:-cut])
    assert ranks[1].has("train", KEYS) == [True] * 3 + [False] * (ROWS - 3)
    index.write_bytes(whole + more)
    assert ranks[1].has("train", [KEYS[9]]) == [True]


def test_other_sessions_are_not_read(tmp_path: Path) -> None:
    ours, theirs = PrefixStore(directory=tmp_path, shared="us"), PrefixStore(directory=tmp_path, shared="them")
    ours.add("train", KEYS, [torch.zeros(ROWS, 4)], [0])
    assert theirs.has("train", KEYS) == [False] * ROWS
    ours.close()
    theirs.close()
    assert list(tmp_path.iterdir()) == []


# --- free memory ------------------------------------------------------------------------------------------------------


def test_a_quarter_of_what_is_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tiers, "free_memory", lambda device: 4 * 5 * 400)
    store = PrefixStore(directory=tmp_path)
    store.add("train", KEYS, [torch.zeros(ROWS, 100)], [0])
    assert (store.bytes, store.spilled_bytes) == (5 * 400, 7 * 400)


MACHINES: dict[str, tuple[dict[str, str], int]] = {
    "as the kernel says": ({"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   5 kB\n"}, 5 * 1024),
    "less in a container": (
        {"/proc/meminfo": "MemAvailable: 5 kB\n", "memory.max": "4000\n", "memory.current": "1000\n"}, 3000
    ),
    "no limit in a container": (
        {"/proc/meminfo": "MemAvailable: 5 kB\n", "memory.max": "max\n", "memory.current": "1000\n"}, 5 * 1024
    ),
    "an older container": (
        {"/proc/meminfo": "MemAvailable: 5 kB\n", "memory.limit_in_bytes": "2000", "memory.usage_in_bytes": "2500"}, 0
    ),
    "nothing is known": ({}, 1 << 32),
}  # fmt: skip


@pytest.mark.parametrize("name", MACHINES)
def test_free_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    contents, free = MACHINES[name]

    def read(path: Path, **_: object) -> str:
        for ending, content in contents.items():
            if str(path).endswith(ending):
                return content
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.delattr(os, "sysconf")
    assert tiers.free_memory(torch.device("cpu")) == free
