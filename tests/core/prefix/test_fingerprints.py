"""Equal keys mean equal content, whatever the kind of input and wherever it is."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from finetuning_scheduler.core.prefix import fingerprints
from finetuning_scheduler.core.prefix.fingerprints import row_digests, row_keys

Keys = Callable[[Tensor], list[bytes]]


def hashed(rows: Tensor) -> list[bytes]:
    return row_keys([rows], [0])


def on_device(rows: Tensor) -> list[bytes]:
    """As a device does it, which knows nothing of a row's length."""
    flat = rows.reshape(len(rows), -1).contiguous()
    return [bytes(row.view(torch.uint8).tolist()) for row in row_digests(flat.view(torch.uint8))]


@pytest.fixture(params=[hashed, on_device])
def keys(request: pytest.FixtureRequest) -> Keys:
    return request.param  # type: ignore[no-any-return]


# --- rows -------------------------------------------------------------------------------------------------------------


def every_sign(columns: int) -> Tensor:
    return torch.tensor(list(itertools.product([1.0, -1.0], repeat=columns)))


DISTINCT = {
    "signs": every_sign(8),
    "signs in a long row": torch.cat([every_sign(8), torch.zeros(256, 1000), every_sign(8).flip(0)], dim=1),
    "permutations of a row": torch.tensor(list(itertools.permutations(range(6)))),
    "words that change places": torch.tensor([[1, 2, 0, 0], [2, 1, 0, 0], [0, 0, 1, 2], [0, 0, 2, 1]]),
    "one bit": torch.tensor([[1 << bit] for bit in range(63)] + [[0]]),
    "one bit somewhere": torch.eye(512),
    "a number somewhere": torch.diag(torch.full((300,), -1, dtype=torch.int32)),
    "high and low halves": torch.tensor([[1, 0], [1 << 32, 0], [0, 1], [0, 1 << 32]]),
    "neighbours": torch.arange(20_000)[:, None],
    "random": torch.rand(5000, 3, generator=torch.Generator().manual_seed(0)),
    "opposite": torch.stack([torch.ones(64), -torch.ones(64), torch.zeros(64)]),
    "small integers": torch.tensor(list(itertools.product(range(6), repeat=5)), dtype=torch.int8),
    "pairs that cancel out": torch.tensor([[a, -a] for a in range(-500, 500)]),
}


@pytest.mark.parametrize("name", DISTINCT)
def test_different_rows_have_different_keys(name: str, keys: Keys) -> None:
    rows = DISTINCT[name]
    assert len(set(keys(rows))) == len(rows)


@pytest.mark.parametrize("name", DISTINCT)
def test_each_of_the_four_words_alone_tells_most_rows_apart(name: str) -> None:
    rows = DISTINCT[name][:2000]
    words = row_digests(rows.reshape(len(rows), -1).contiguous().view(torch.uint8)).view(torch.int32)
    assert words.shape == (len(rows), 4)
    for number in range(4):
        assert len(set(words[:, number].tolist())) >= len(rows) - 1


def test_a_key_follows_its_row(keys: Keys) -> None:
    rows = torch.randn(50, 7, 3, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(50)
    all_keys = keys(rows)
    assert keys(rows[order]) == [all_keys[place] for place in order]
    assert [keys(row[None])[0] for row in rows] == all_keys


def test_digests_are_sums_of_products() -> None:
    words = torch.tensor([[3, -5, 7], [0, 0, 0]], dtype=torch.int32)
    factors = [[int(each) % (1 << 64) for each in row] for row in fingerprints._factors(0, 3, torch.device("cpu"))]
    added = [int(each) % (1 << 64) for each in fingerprints._factors(-1, 1, torch.device("cpu"))[:, 0]]
    for row, digest in zip(words.tolist(), row_digests(words.view(torch.uint8)), strict=True):
        expected = [
            (sum(word * factor for word, factor in zip(row, factors[number], strict=True)) + added[number]) % (1 << 64)
            >> 32
            for number in range(4)
        ]
        halves = [half for pair in digest.tolist() for half in (pair % (1 << 64) >> 32, pair % (1 << 32))]
        assert halves == expected


def test_factors_are_those_of_splitmix64() -> None:
    def mixed(counter: int) -> int:
        every = (1 << 64) - 1
        z = (counter * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03) & every
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & every
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & every
        return z ^ (z >> 31)

    factors = fingerprints._factors(5, 10, torch.device("cpu"))
    assert [[int(each) % (1 << 64) for each in row] for row in factors] == [
        [mixed((index + 1) * 4 + number) for index in range(5, 15)] for number in range(4)
    ]


def test_rows_are_read_in_pieces_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randint(0, 256, (5, 1003), dtype=torch.uint8)
    whole = row_digests(rows)
    for size in (1, 7, 64):
        monkeypatch.setattr(fingerprints, "_WORDS_OF_A_ROW", size)
        assert torch.equal(row_digests(rows), whole)


# --- types and layouts ------------------------------------------------------------------------------------------------

TYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
    torch.bool, torch.complex64, torch.complex128,
]  # fmt: skip


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_type_is_read_by_its_bits(dtype: torch.dtype, masked: bool) -> None:
    rows = torch.tensor([[0, 1, 1], [1, 0, 1], [1, 1, 0], [0, 1, 1]]).to(dtype)
    masks = [torch.ones(4, 3, dtype=torch.bool)] if masked else None
    first, second, third, fourth = row_keys([rows], [0], masks=masks)
    assert first == fourth
    assert len({first, second, third}) == 3
    assert row_keys([rows.flip(0)], [0], masks=masks) == [fourth, third, second, first]


def test_equal_numbers_of_other_types_or_shapes_differ() -> None:
    variants = [torch.zeros(2, 4).to(dtype) for dtype in TYPES]
    variants += [torch.zeros(2, 4, 1), torch.zeros(2, 2, 2), torch.zeros(2, 8), torch.zeros(2, 0), torch.zeros(2)]
    variants += [torch.zeros(2, 0, 3)]
    assert len({row_keys([rows], [0])[0] for rows in variants}) == len(variants)


def test_zeros_of_both_signs_differ_and_equal_nans_do_not(keys: Keys) -> None:
    nan = torch.tensor([0x7FC00000, 0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    same, again, other = keys(nan[:, None])
    assert same == again != other
    zero, minus = keys(torch.tensor([[0.0], [-0.0]]))
    assert zero != minus


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda rows: rows,
    "every other column": lambda rows: rows.repeat_interleave(2, dim=1)[:, ::2],
    "transposed": lambda rows: rows.transpose(1, 2).contiguous().transpose(1, 2),
    "channels last": lambda rows: rows[..., None].to(memory_format=torch.channels_last)[..., 0],
    "needs a gradient": lambda rows: rows.clone().requires_grad_(),
    "a parameter": lambda rows: nn.Parameter(rows),
    "a view into another": lambda rows: torch.cat([rows, rows])[4:],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_how_a_tensor_lies_in_memory_does_not_count(name: str) -> None:
    rows = torch.randn(4, 3, 5)
    assert row_keys([LAYOUTS[name](rows)], [0]) == row_keys([rows], [0])


def test_repeated_and_conjugated_views_are_read_as_they_are_seen() -> None:
    row = torch.randn(1, 3)
    assert len(set(row_keys([row.expand(4, 3)], [0]))) == 1
    numbers = torch.randn(4, 3, dtype=torch.complex64)
    assert row_keys([numbers.conj()], [0]) == row_keys([numbers.conj().resolve_conj()], [0])
    assert row_keys([numbers.conj()], [0]) != row_keys([numbers], [0])
    assert row_keys([numbers.conj().imag], [0]) == row_keys([-numbers.imag], [0])


def test_rows_may_lie_in_any_dimension() -> None:
    rows = torch.randn(4, 3, 5)
    assert row_keys([rows.movedim(0, 1)], [1]) == row_keys([rows], [0])
    assert row_keys([rows.movedim(0, 2)], [-1]) == row_keys([rows], [0])


@pytest.mark.parametrize("rows", [torch.empty(0, 3), torch.empty(0)])
def test_a_batch_without_rows_has_no_keys(rows: Tensor) -> None:
    assert row_keys([rows, 1], [0, None]) == []


# --- inputs together --------------------------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


PLAIN: list[Any] = [
    None, True, False, 0, 1, -1, 0.0, -0.0, 1.0, 1j, "", "1", "a", b"1", b"a", (), [], {}, (1,), [1], (1, 2), (12,),
    ("a", "b"), ("ab",), ("a", ("b",)), (("a",), "b"), {"a": 1}, {"a": 2}, {"b": 1}, {"a": 1, "b": 1}, frozenset({1}),
    torch.float32, torch.float64, torch.device("cpu"), torch.Size([1]), Colour.RED, Colour.BLUE, slice(1), slice(1, 2),
    range(2), range(3), float("nan"), float("inf"), "\ud800", 1 << 80,
]  # fmt: skip


def test_plain_values_count_with_their_types() -> None:
    rows = torch.zeros(1, 1)
    found = [row_keys([rows, value], [0, None])[0] for value in PLAIN]
    assert len(set(found)) == len(PLAIN)
    assert found == [row_keys([rows, value], [0, None])[0] for value in PLAIN]


def test_a_tensor_without_rows_counts_in_every_key() -> None:
    rows, table = torch.randn(3, 2), torch.randn(5)
    plain = row_keys([rows, table], [0, None])
    assert row_keys([rows, table.clone()], [0, None]) == plain
    for other in (table + 1, table[:, None], table.double(), -table):
        assert not set(row_keys([rows, other], [0, None])) & set(plain)


def test_the_order_of_inputs_counts() -> None:
    first, second = torch.randn(3, 2), torch.randn(3, 2)
    assert not set(row_keys([first, second], [0, 0])) & set(row_keys([second, first], [0, 0]))
    assert not set(row_keys([first, second[0]], [0, None])) & set(row_keys([second[0], first], [None, 0]))
    assert row_keys([first, second], [0, 0]) != row_keys([torch.stack([first, second], dim=1)], [0])


@dataclass
class Own:
    number: int = 0


UNREADABLE: dict[str, Callable[[], object]] = {
    "an object": object,
    "a dataclass": Own,
    "an object in a list": lambda: [Own()],
    "a generator": torch.Generator,
    "sparse": lambda: torch.zeros(2).to_sparse(),
    "meta": lambda: torch.zeros(2, device="meta"),
    "quantised": lambda: torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.quint8),
    "nested": lambda: torch.nested.as_nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged),
    "packed": lambda: nn.utils.rnn.pack_sequence([torch.zeros(2)]),
    "a subclass": lambda: torch.zeros(2).as_subclass(OwnTensor),
}


class OwnTensor(Tensor):
    pass


@pytest.mark.filterwarnings("ignore:.*quantize.*:UserWarning")
@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_read_is_refused(kind: str) -> None:
    with pytest.raises(TypeError, match=r"expected .* got"):
        row_keys([torch.zeros(2, 1), UNREADABLE[kind]()], [0, None])


@pytest.mark.parametrize(
    ("tensors", "row_dims", "message"),
    [
        ([torch.zeros(2), torch.zeros(3)], [0, 0], "the same number of rows, got"),
        ([torch.zeros(2)], [None], "the same number of rows, got"),
        ([torch.zeros(2), 1], [0, 0], "a tensor with rows, got int"),
        ([torch.zeros(2)], [0, 0], "one row dimension and mask each"),
    ],
)
def test_what_does_not_fit_together_is_refused(tensors: Sequence[Any], row_dims: Sequence[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        row_keys(tensors, row_dims)


# --- masks ------------------------------------------------------------------------------------------------------------


def masked(tokens: Sequence[Sequence[int]], mask: Sequence[Sequence[int]]) -> list[bytes]:
    return row_keys([torch.tensor(tokens)], [0], masks=[torch.tensor(mask, dtype=torch.bool)])


def test_what_is_masked_and_how_wide_a_batch_is_does_not_count() -> None:
    (narrow,) = masked([[5, 6, 0]], [[1, 1, 0]])
    assert masked([[5, 6, 9, 9, 9]], [[1, 1, 0, 0, 0]]) == [narrow]
    assert masked([[5, 6]], [[1, 1]]) == [narrow]


def test_where_it_is_masked_counts() -> None:
    variants = [
        masked([[5, 6, 7]], [[1, 1, 1]]),
        masked([[5, 6, 7]], [[1, 1, 0]]),
        masked([[5, 6, 7]], [[1, 0, 1]]),
        masked([[5, 6, 7]], [[0, 1, 1]]),
        masked([[6, 7, 5]], [[1, 1, 0]]),
        masked([[0, 5, 6]], [[0, 1, 1]]),
        masked([[5, 6, 0]], [[1, 1, 1]]),
        masked([[0, 0, 0]], [[1, 0, 0]]),
        masked([[0, 0, 0]], [[1, 1, 0]]),
        masked([[0, 0, 0]], [[0, 0, 0]]),
    ]
    assert len({key for (key,) in variants}) == len(variants)


@given(
    st.lists(st.tuples(st.integers(-3, 3), st.booleans()), max_size=9),
    st.lists(st.tuples(st.integers(-3, 3), st.booleans()), max_size=9),
    st.integers(0, 4),
)
def test_keys_are_equal_where_what_counts_is_equal(
    first: list[tuple[int, bool]], second: list[tuple[int, bool]], more: int
) -> None:
    def counted(row: list[tuple[int, bool]]) -> list[tuple[int, int]]:
        return [(place, token) for place, (token, counts) in enumerate(row) if counts]

    def key(row: list[tuple[int, bool]], width: int) -> bytes:
        filled = row + [(8, False)] * (width - len(row))
        tokens = torch.tensor([[token for token, _ in filled]], dtype=torch.int64).reshape(1, width)
        mask = torch.tensor([[counts for _, counts in filled]], dtype=torch.bool).reshape(1, width)
        return row_keys([tokens, mask.float()], [0, 0], masks=[mask, mask])[0]

    alike = counted(first) == counted(second)
    assert (key(first, len(first) + more) == key(second, len(second))) == alike


def test_masks_of_other_shapes() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    wide = torch.nn.functional.pad(mask, (0, 4))
    hidden = torch.randn(2, 3, 5)
    additive = torch.where(mask, 0.0, -1e9)[:, None, None, :]
    narrow = row_keys([hidden, additive], [0, 0], masks=[mask, mask[:, None, None, :]])
    wider = torch.where(wide, 0.0, -1e4)[:, None, None, :]
    padded = torch.nn.functional.pad(hidden, (0, 0, 0, 4), value=3.0)
    assert row_keys([padded, wider], [0, 0], masks=[wide, wide[:, None, None, :]]) == narrow
    columns = row_keys([hidden.transpose(1, 2)], [0], masks=[mask[:, None, :]])
    assert columns == row_keys([padded.transpose(1, 2)], [0], masks=[wide[:, None, :]])


def test_positions_without_rows_count_for_each_row_as_far_as_it_goes() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    tokens = torch.tensor([[4, 4, 0], [4, 4, 4]])
    narrow = row_keys([tokens, torch.arange(3)], [0, None], masks=[mask, mask])
    wide, more = torch.nn.functional.pad(mask, (0, 2)), torch.nn.functional.pad(tokens, (0, 2))
    assert row_keys([more, torch.arange(5)], [0, None], masks=[wide, wide]) == narrow
    assert row_keys([more, torch.arange(5)[None]], [0, None], masks=[wide, wide[:, None]]) != narrow
    other = row_keys([more, torch.tensor([0, 2, 1, 3, 4])], [0, None], masks=[wide, wide])
    assert not set(other) & set(narrow)


@pytest.mark.parametrize(
    "mask",
    [torch.ones(2, 3), torch.ones(2, 4, dtype=torch.bool), torch.ones(3, 3, dtype=torch.bool),
     torch.ones(2, dtype=torch.bool), torch.ones(2, 3, 5, dtype=torch.bool)],
)  # fmt: skip
def test_masks_that_do_not_fit_are_refused(mask: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected a .*mask"):
        row_keys([torch.zeros(2, 3, 5)], [0], masks=[mask])


# --- on a device, played by the CPU -----------------------------------------------------------------------------------


@pytest.fixture
def everything_is_elsewhere(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Take the way of a device for every tensor; return the shapes of what is transferred."""
    transferred: list[tuple[int, ...]] = []
    original = Tensor.cpu

    def cpu(tensor: Tensor) -> Tensor:
        transferred.append(tuple(tensor.shape))
        return original(tensor)

    monkeypatch.setattr(fingerprints, "_on_cpu", lambda tensor: False)
    monkeypatch.setattr(Tensor, "cpu", cpu)
    return transferred


def test_a_device_is_asked_once_a_batch_for_16_bytes_a_row(everything_is_elsewhere: list[tuple[int, ...]]) -> None:
    images, labels, table = torch.randn(8, 3, 32, 32), torch.arange(8), torch.randn(10)
    found = row_keys([images, labels, table, "nearest"], [0, 0, None, None])
    assert everything_is_elsewhere == [(8 + 8 + 1, 2)]
    assert len(set(found)) == 8
    order = torch.randperm(8)
    assert row_keys([images[order], labels[order], table, "nearest"], [0, 0, None, None]) == [found[i] for i in order]
    assert not set(row_keys([images, labels, table + 1, "nearest"], [0, 0, None, None])) & set(found)
    assert not set(row_keys([images, labels, table, "area"], [0, 0, None, None])) & set(found)


@pytest.mark.usefixtures("everything_is_elsewhere")
def test_masks_on_a_device() -> None:
    test_what_is_masked_and_how_wide_a_batch_is_does_not_count()
    test_where_it_is_masked_counts()
    test_masks_of_other_shapes()
    test_positions_without_rows_count_for_each_row_as_far_as_it_goes()


@pytest.mark.usefixtures("everything_is_elsewhere")
def test_types_and_shapes_on_a_device() -> None:
    test_equal_numbers_of_other_types_or_shapes_differ()
    for dtype, with_mask in itertools.product(TYPES, [False, True]):
        test_every_type_is_read_by_its_bits(dtype, with_mask)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_finds_the_same_digests() -> None:
    rows = torch.randint(0, 256, (50, 4099), dtype=torch.uint8)
    assert torch.equal(row_digests(rows.cuda()).cpu(), row_digests(rows))
