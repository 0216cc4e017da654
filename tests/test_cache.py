"""The cache of decoding: pages against a plain model of who holds what, rows against a scalar FP8, and the same hidden
states however a sequence came to be where it is.

Cases on pages alone need no model: every token is a number of its own, so a value read from the wrong place shows. What
was never written is NaN. Two runs of a model that make the same calls are compared to the bit.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from opd.fp4 import fake_quantize, quantize
from opd.model import DeepseekV4
from opd.model.cache import Cache, CompressorState, Extension, LayerCache, Layout, OutOfPages, RowFormat, page_size
from opd.model.transformer import CSA, HCA, WINDOW_ONLY
from tests.test_model import TOLERANCE, alone, error, extend, poisoned_cache, random_model, run_in_pieces, tiny

PAGE = 8  # tokens of a page, in every cache here but the one of published size


def state_of_everything(cache: Cache) -> list[Any]:
    """All that a refused call must leave as it was; numbers as bytes, so that NaN equals NaN."""
    tensors = [tensor for layer in cache.layers for tensor in (*layer.per_slot(), *layer.paged())]
    bytes_ = [tensor.view(torch.uint8).numpy().tobytes() for tensor in tensors]
    return [cache.table.tolist(), cache.references.tolist(), list(cache.free), bytes_]


def num_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def used_pages(cache: Cache) -> int:
    return cache.num_pages - cache.free_pages


# ---- pages, without a model ------------------------------------------------------------------------------------------

RATIOS = ((4, 4), (8,))  # of each layer's compressor and indexer
OFFSET = 1 << 16  # between the numbers that one token has in two tensors


def bare_cache(num_slots: int, max_tokens: int, num_pages: int) -> Cache:
    """Rows of one float32 channel, windows of 5 and 11 tokens, everything NaN."""
    one = RowFormat("plain", 1, 0, torch.float32)

    def state(ratio: int, overlap: int) -> CompressorState:
        ring = torch.full((num_slots, overlap * ratio, 1), torch.nan)
        return CompressorState(ring, ring.clone(), torch.full((num_pages, PAGE // ratio, 1), torch.nan), one)

    cache = Cache(num_slots, max_tokens, PAGE, num_pages)
    for window, ratios in zip((5, 11), RATIOS, strict=True):
        states = [state(ratio, len(ratios)) for ratio in ratios]
        cache.layers.append(LayerCache(torch.full((num_slots, window, 1), torch.nan), one, *states))
    return cache


def rings_of(cache: Cache) -> list[Tensor]:
    return [tensor for layer in cache.layers for tensor in layer.per_slot()]


def states_of(cache: Cache) -> list[tuple[CompressorState, int]]:
    """Every compressor's state with its ratio."""
    return [
        pair
        for layer, ratios in zip(cache.layers, RATIOS, strict=True)
        for pair in zip(layer.states(), ratios, strict=True)
    ]


def write(cache: Cache, rows: list[tuple[int, int, list[int]]], padding: int = 0) -> None:
    """What a model does with rows (slot, start, new tokens): an entry is the number of the last token of its block."""
    lengths = [len(tokens) for _, _, tokens in rows]
    at = cache.extension(
        [slot for slot, _, _ in rows], [start for _, start, _ in rows], lengths, max(lengths) + padding
    )
    values = torch.full((len(rows), max(lengths) + padding, 1), torch.inf)  # a written padding would be seen
    for row, (_, _, tokens) in enumerate(rows):
        values[row, : len(tokens), 0] = torch.tensor(tokens, dtype=torch.float32)
    for number, ring in enumerate(rings_of(cache)):
        at.write_ring(ring, values + number * OFFSET)
    for number, (state, ratio) in enumerate(states_of(cache)):
        closed = [
            (row, block, tokens[(block + 1) * ratio - 1 - start] + number * OFFSET)
            for row, (_, start, tokens) in enumerate(rows)
            for block in range(start // ratio, (start + len(tokens)) // ratio)
        ]
        if closed:
            row, block, entries = torch.tensor(closed).T
            at.write_entries(state, row, block, entries[:, None].float())


def assert_holds(cache: Cache, sequences: dict[int, list[int]]) -> None:
    """Every slot reads as its own sequence, in every tensor, and nothing reads what was not written in it."""
    slots, ends = list(sequences), [len(tokens) for tokens in sequences.values()]
    if not slots:
        return
    starts = torch.tensor(ends)
    # A look that writes nothing, hence takes no page: the slots as they stand, no new token.
    pages = torch.as_tensor(cache.table[slots, : -(-max(ends) // PAGE)])
    at = Extension(torch.tensor(slots), starts, torch.zeros_like(starts), starts[:, None], max(ends), pages)
    one = cache.layers[0].format
    for number, ring in enumerate(rings_of(cache)):
        found, first = at.read_ring(ring, one, torch.float32)
        size = ring.shape[1]
        for row, tokens in enumerate(sequences.values()):
            recent = [float(token + number * OFFSET) for token in tokens[-size:]]
            assert int(first[row]) == size - len(recent)
            assert found[row, :, 0].tolist() == [0.0] * (size - len(recent)) + recent
    for number, (state, ratio) in enumerate(states_of(cache)):
        blocks = max(ends) // ratio
        expected = [
            [float(tokens[(block + 1) * ratio - 1] + number * OFFSET) for block in range(len(tokens) // ratio)]
            for tokens in sequences.values()
        ]
        if blocks:
            found = at.read_entries(state, blocks, ratio, torch.float32)[..., 0]
            assert found.tolist() == [entries + [0.0] * (blocks - len(entries)) for entries in expected]
            found = at.paged_rows(state, blocks).read(torch.float32)[..., 0]
            assert [row[: len(entries)] for row, entries in zip(found.tolist(), expected, strict=True)] == expected
            picks = [random.choices([-1, *range(len(entries))], k=6) for entries in expected]
            found = at.read_picks(state, torch.tensor(picks), torch.float32)[..., 0]
            assert found.tolist() == [
                [0.0 if pick < 0 else entries[pick] for pick in row]
                for row, entries in zip(picks, expected, strict=True)
            ]


@dataclass(slots=True)
class Holders:
    """A plain model of the cache: the tokens of every live slot, and a name for every page that it holds."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    pages: dict[int, list[int]] = field(default_factory=dict)
    names: Iterator[int] = field(default_factory=itertools.count)

    def pages_after(self, rows: Sequence[tuple[int, int, int]]) -> dict[int, list[int]]:
        """Pages once the rows (slot, start, length) are written: a page that is written is held by that slot only."""
        after = {slot: list(held) for slot, held in self.pages.items()} | {
            slot: [] for slot, start, _ in rows if not start
        }
        for slot, start, length in rows:
            own = after[slot]
            for page in range(start // PAGE, (start + length - 1) // PAGE + 1):
                others = {name for other, held in after.items() if other != slot for name in held}
                if page == len(own):
                    own.append(next(self.names))
                elif own[page] in others:
                    own[page] = next(self.names)
        return after

    def release(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self.tokens.pop(slot, None)
            self.pages.pop(slot, None)

    def check(self, cache: Cache) -> None:
        """Same sharing, name for number; references, free pages and contents follow from it."""
        pairs = set()
        for slot in range(cache.num_slots):
            held = self.pages.get(slot, [])
            assert (cache.table[slot, len(held) :] == -1).all()
            pairs |= set(zip(held, cache.table[slot, : len(held)].tolist(), strict=True))
        numbers = {number for _, number in pairs}
        assert len(pairs) == len(numbers) == len({name for name, _ in pairs})
        assert sorted([*cache.free, *numbers]) == list(range(cache.num_pages))
        holders = [sum(number in row for row in cache.table.tolist()) for number in range(cache.num_pages)]
        assert cache.references.tolist() == holders
        assert_holds(cache, self.tokens)


def num_names(pages: dict[int, list[int]]) -> int:
    return len({name for held in pages.values() for name in held})


@pytest.mark.parametrize("seed", range(8))
def test_a_random_walk_is_the_plain_model(seed: int) -> None:
    rng = random.Random(seed)
    num_slots, max_tokens, num_pages = rng.choice([(5, 37, 9), (7, 40, 14), (3, 61, 8), (6, 8, 4)])
    cache = bare_cache(num_slots, max_tokens, num_pages)
    holders = Holders()
    fresh_tokens = itertools.count(1)
    saved: list[tuple[list[Tensor], list[int]]] = []
    refused = copied = 0

    def try_pages(rows: Sequence[tuple[int, int, int]], change: Callable[[], None]) -> bool:
        """Makes the change if the model says that the pages suffice; else it must be refused without a trace."""
        nonlocal refused
        after = holders.pages_after(rows)
        if num_names(after) <= num_pages:
            change()
            holders.pages = after
            return True
        before = state_of_everything(cache)
        with pytest.raises(OutOfPages):
            change()
        assert state_of_everything(cache) == before
        refused += 1
        return False

    for _ in range(150):
        live = list(holders.tokens)
        match rng.choice(["extend"] * 6 + ["fork", "fork", "release", "snapshot", "restore"]):
            case "extend":
                rows = []
                for slot in rng.sample(range(num_slots), rng.randint(1, num_slots)):
                    start = 0 if rng.random() < 0.1 else len(holders.tokens.get(slot, []))
                    if start < max_tokens:
                        length = min(rng.choice([1, 1, 1, 2, 3, 7, 8, 9, 20]), max_tokens - start)
                        rows.append((slot, start, [next(fresh_tokens) for _ in range(length)]))
                padding = rng.choice([0, 0, 3])
                sizes = [(slot, start, len(tokens)) for slot, start, tokens in rows]
                entered = [(slot, start // PAGE) for slot, start, _ in sizes if start % PAGE]
                before = [holders.pages[slot][page] for slot, page in entered]
                if rows and try_pages(sizes, partial(write, cache, rows, padding)):
                    for slot, start, tokens in rows:
                        holders.tokens[slot] = (holders.tokens[slot] if start else []) + tokens
                    copied += before != [holders.pages[slot][page] for slot, page in entered]
            case "fork" if live:
                sources = rng.sample(live, 1)
                others = [slot for slot in range(num_slots) if slot not in sources]
                destinations = rng.sample(others, rng.randint(1, len(others)))
                cache.fork(sources * len(destinations), destinations)
                for slot in destinations:
                    holders.tokens[slot], holders.pages[slot] = (
                        list(held[sources[0]]) for held in (holders.tokens, holders.pages)
                    )
            case "release":
                slots = rng.sample(range(num_slots), rng.randint(1, num_slots))
                cache.release(slots)
                holders.release(slots)
            case "snapshot" if live:
                slot = rng.choice(live)
                saved.append((cache.snapshot(slot), list(holders.tokens[slot])))
            case "restore" if saved:
                slot = rng.randrange(num_slots)
                snapshot, tokens = rng.choice(saved)
                rows = [(slot, 0, len(tokens))]
                if try_pages(rows, partial(cache.restore, slot, snapshot, len(tokens))):
                    holders.tokens[slot] = list(tokens)
            case _:  # no slot to copy or to save, or nothing saved
                continue
        holders.check(cache)
    assert refused > 3 and copied > 3 and len(saved) > 3  # the walk went where it hurts
    cache.release(range(num_slots))
    assert cache.free_pages == num_pages and not cache.references.any() and (cache.table == -1).all()


def test_releases_in_every_order() -> None:
    """Four samples of a prompt, two of which have gone on, one of them over a page's border."""
    for order in itertools.permutations(range(4)):
        cache = bare_cache(4, 24, 12)
        prompt = list(range(1, 14))
        write(cache, [(2, 0, prompt)])
        cache.fork((2, 2, 2), (0, 1, 3))
        write(cache, [(1, 13, [100]), (3, 13, [101, 102, 103, 104])])
        sequences = {0: prompt, 1: [*prompt, 100], 2: prompt, 3: [*prompt, 101, 102, 103, 104]}
        assert used_pages(cache) == 2 + 1 + 2
        for slot in order:
            cache.release([slot])
            del sequences[slot]
            assert_holds(cache, sequences)
            # Whoever comes next takes what was given back, and disturbs nobody; here it leaves at once.
            write(cache, [(slot, 0, list(range(200, 224)))])
            assert_holds(cache, sequences)
            cache.release([slot])
        assert cache.free_pages == 12 and not cache.references.any()


def test_pages_are_asked_for_only_where_they_are_needed() -> None:
    """Calls that a careless count would refuse, each in a cache with not one page to spare."""
    cache = bare_cache(3, 24, 3)
    write(cache, [(0, 0, [1, 2, 3])])
    cache.fork([0, 0], [1, 2])
    write(cache, [(slot, 3, [10 + slot]) for slot in range(3)])  # three holders write: the last one needs no copy
    assert used_pages(cache) == 3
    assert_holds(cache, {slot: [1, 2, 3, 10 + slot] for slot in range(3)})

    cache = bare_cache(2, 24, 1)
    write(cache, [(0, 0, [1, 2, 3])])
    cache.fork([0], [1])
    with pytest.raises(OutOfPages, match="1 pages are needed, 0 of 1 are free"):
        write(cache, [(1, 3, [4])])
    assert_holds(cache, {0: [1, 2, 3], 1: [1, 2, 3]})

    cache = bare_cache(2, 24, 2)
    write(cache, [(0, 0, [1, 2, 3])])
    cache.fork([0], [1])
    write(cache, [(0, 3, [4]), (1, 0, [5])])  # slot 1 lets go of the page that slot 0 writes
    assert_holds(cache, {0: [1, 2, 3, 4], 1: [5]})

    cache = bare_cache(2, 24, 3)
    write(cache, [(0, 0, list(range(17)))])
    write(cache, [(0, 0, list(range(50, 60))), (1, 0, [7])])  # three pages come back, three are needed
    assert_holds(cache, {0: list(range(50, 60)), 1: [7]})
    with pytest.raises(OutOfPages, match="3 pages are needed, 2 of 3 are free"):
        write(cache, [(0, 0, list(range(20)))])
    assert_holds(cache, {0: list(range(50, 60)), 1: [7]})

    snapshot = cache.snapshot(0)
    cache.restore(0, snapshot, 10)  # into its own place, in a full cache
    assert_holds(cache, {0: list(range(50, 60)), 1: [7]})
    with pytest.raises(OutOfPages):
        cache.restore(1, snapshot, 10)
    assert_holds(cache, {0: list(range(50, 60)), 1: [7]})


def test_an_extension_that_cannot_be_leaves_no_trace() -> None:
    cache = bare_cache(3, 21, 9)
    write(cache, [(0, 0, list(range(1, 17))), (1, 0, [20])])
    cache.fork([0], [2])
    cache.release([0])
    before = state_of_everything(cache)
    with pytest.raises(ValueError, match="22 tokens does not fit a cache of 21"):
        cache.extension([1, 2], [1, 16], [1, 6])
    for start in (1, 8, 16):  # what slot 0 held is slot 2's now
        with pytest.raises(ValueError, match=f"slot 0 cannot go on at position {start}"):
            cache.extension([1, 0], [1, start], [1, 1])
    with pytest.raises(ValueError, match="slot 1 cannot go on at position 16"):
        cache.extension([2, 1], [16, 16], [1, 1])
    assert state_of_everything(cache) == before


def test_an_extension_does_not_follow_the_arrays_it_was_made_from() -> None:
    cache = bare_cache(3, 24, 9)
    write(cache, [(0, 0, [1, 2]), (1, 0, [3])])
    slots, starts, lengths = (torch.tensor(values).numpy() for values in ([0, 1], [2, 1], [1, 2]))
    at = cache.extension(slots, starts, lengths)
    starts += lengths
    slots[:], lengths[:] = 2, 7
    assert at.slots.tolist() == [0, 1] and at.starts.tolist() == [2, 1] and at.lengths.tolist() == [1, 2]
    assert at.positions.tolist() == [[2, 3], [1, 2]] and at.read_positions().tolist() == [[2, 2], [1, 2]]


def test_a_page_is_whole_entries_of_every_layer() -> None:
    assert page_size([4, 128, 4]) == 128 and page_size([3, 8]) == 24 and page_size([5]) == 5
    assert page_size([]) == 1 << 30


# ---- stored rows -----------------------------------------------------------------------------------------------------

WIDTHS = [(512, 64), (130, 2), (70, 6), (16, 4), (17, 4), (8, 8)]  # (channels, RoPE channels of them)


def fp8(width: int, rope_dim: int) -> RowFormat:
    return RowFormat("fp8", width, rope_dim, torch.float32)


def e4m3(value: float) -> float:
    """The nearest E4M3 number of a value of at most 448, ties to even."""
    exponent = max(math.frexp(abs(value))[1] - 1, -6)
    step = 2.0 ** (exponent - 3)
    return math.copysign(round(abs(value) / step) * step, value)


def slow_fp8(tile: list[float]) -> tuple[int, list[float]]:
    """Scale byte and values of one tile: the smallest power of two under which everything fits in 448."""
    amax = max(1e-4, *(abs(value) for value in tile))
    exponent = -126
    while 448.0 * 2.0**exponent < amax:
        exponent += 1
    return exponent + 127, [e4m3(value / 2.0**exponent) * 2.0**exponent for value in tile]


def hard_rows(width: int) -> Tensor:
    """[n, width] float32: sizes from far below the floor to the largest numbers, powers, 448 times powers and their
    neighbours, ties, zeros of both signs."""
    rows = [torch.randn(width) * 2.0**exponent for exponent in range(-60, 124, 3)]
    powers = [torch.full((width,), 2.0 ** (width % 7)) * torch.exp2(-torch.arange(width) % 18.0)]
    for exponent in (-22, -21, -3, 0, 1, 40, 118):
        edge = torch.tensor(448.0 * 2.0**exponent)
        for size in (edge, torch.nextafter(edge, torch.tensor(torch.inf)), torch.nextafter(edge, torch.tensor(0.0))):
            row = size * (torch.rand(width) * 2 - 1)
            row[::64] = size
            rows.append(row)
    ties = torch.randint(-56, 57, (width,)) * 8.0 + 4.0 * torch.randint(0, 2, (width,))
    zeros = [torch.zeros(width), -torch.zeros(width), torch.full((width,), 1e-4), torch.full((width,), -1e-38)]
    mixed = torch.randn(width) * torch.exp2(torch.randint(-12, 2, (width,)).float())
    return torch.stack([*rows, *powers, ties, *zeros, mixed])


def scales_of(row_format: RowFormat, rows: Tensor) -> Tensor:
    """Exponents [n, tiles] of the scales of stored rows."""
    begin = row_format.width + row_format.rope_dim
    return rows[:, begin : begin - (row_format.rope_dim - row_format.width) // 64].int() - 127


def test_stored_rows_have_the_published_sizes() -> None:
    assert fp8(512, 64).storage == (584, torch.uint8) and fp8(512, 64).num_bytes == 584
    assert RowFormat("fp4", 128, 64, torch.bfloat16).storage == (68, torch.uint8)
    assert RowFormat("fp4", 128, 64, torch.bfloat16).num_bytes == 68
    for width, size in ((512, 1024), (128, 256)):
        plain = RowFormat("plain", width, 64, torch.bfloat16)
        assert plain.storage == (width, torch.bfloat16) and plain.num_bytes == size
    for width, rope_dim in WIDTHS:
        tiles = math.ceil((width - rope_dim) / 64)
        size = fp8(width, rope_dim).num_bytes
        assert size % 8 == 0 and 0 <= size - (width + rope_dim + tiles) < 8
        assert fp8(width, rope_dim).encode(torch.randn(2, 3, width)).shape == (2, 3, size)
        assert fp8(width, rope_dim).encode(torch.randn(0, width)).shape == (0, size)


@pytest.mark.parametrize(("width", "rope_dim"), WIDTHS)
def test_fp8_rows_are_those_of_a_scalar_rounding(width: int, rope_dim: int) -> None:
    row_format, rows, plain = fp8(width, rope_dim), hard_rows(width), width - rope_dim
    stored = row_format.encode(rows)
    found = row_format.decode(stored, torch.float32)
    for row, values in enumerate(rows[:, :plain].tolist()):
        slow = [slow_fp8(values[begin : begin + 64]) for begin in range(0, plain, 64)]
        assert scales_of(row_format, stored[row : row + 1]).tolist() == [[byte - 127 for byte, _ in slow]]
        expected = torch.tensor([value for _, tile in slow for value in tile])
        assert torch.equal(found[row, :plain].view(torch.int32), expected.view(torch.int32))  # signs of zero too
    assert torch.equal(found[:, plain:], rows[:, plain:].bfloat16().float())
    assert not stored[:, plain + 2 * rope_dim + math.ceil(plain / 64) :].any()  # what fills a row up
    # A row alone, rows in a larger shape, and other dtypes on either side say the same.
    for row in (0, 7):
        assert torch.equal(row_format.decode(row_format.encode(rows[row]), torch.float32), found[row])
        assert torch.equal(row_format.decode(stored[row : row + 1], torch.float32), found[row : row + 1])
    assert torch.equal(row_format.decode(stored[None, :4].expand(2, -1, -1), torch.float32)[1], found[:4])
    assert torch.equal(row_format.decode(stored, torch.bfloat16).float(), found)
    assert torch.equal(row_format.encode(rows.bfloat16()), row_format.encode(rows.bfloat16().double()))


@pytest.mark.parametrize(("width", "rope_dim"), [(512, 64), (70, 6)])
def test_fp8_errors_are_half_a_place(width: int, rope_dim: int) -> None:
    row_format, plain = fp8(width, rope_dim), width - rope_dim
    rows = torch.randn(400, width).double() * torch.exp2(torch.randint(-10, 30, (400, 1)).double())
    rows = rows.float().double()
    stored = row_format.encode(rows)
    values, found = rows[:, :plain], row_format.decode(stored, torch.float64)[:, :plain]
    scale = torch.exp2(scales_of(row_format, stored).double()).repeat_interleave(64, 1)[:, :plain]
    normal = values.abs() >= 2.0**-6 * scale
    binade = torch.exp2(torch.floor(torch.log2(values.abs())))
    places = (found - values).abs() / binade
    assert float(places[normal].max()) <= 2.0**-4 and float(places[normal].max()) > 0.99 * 2.0**-4
    relative = ((found - values).abs() / values.abs())[normal]
    assert float(relative.max()) <= 1 / 17  # a half place of a value just above a power, halfway to the next number
    assert bool(((found - values).abs()[~normal] <= 2.0**-10 * scale[~normal]).all())
    tiles = torch.nn.functional.pad(values, (0, -plain % 64)).unflatten(1, (-1, 64)).abs().amax(-1)
    filled = tiles / torch.exp2(scales_of(row_format, stored).double())
    assert float(filled.max()) <= 448 and float(filled.min()) > 224  # a scale of half the size would not do


def test_fp8_is_exact_where_it_can_be() -> None:
    row_format = fp8(70, 6)
    for exponent in (-13, 0, 5, 100):
        powers = torch.exp2(torch.arange(64) % 18.0 - 9) * 2.0**exponent  # from E4M3's smallest to 2**8 of a scale
        signs = torch.randint(0, 2, (64,)) * 2.0 - 1
        rows = torch.cat((powers * signs, torch.randn(6)))[None]
        rows = torch.cat((rows, rows))
        rows[0, 3] = 448 * 2.0**exponent
        rows[1, :] = 448 * 2.0**exponent
        assert torch.equal(row_format.decode(row_format.encode(rows), torch.float32)[:, :64], rows[:, :64])
    for zero in (0.0, -0.0):
        stored = row_format.encode(torch.full((1, 70), zero))
        assert torch.equal(
            row_format.decode(stored, torch.float32).view(torch.int32), torch.full((1, 70), zero).view(torch.int32)
        )
        assert scales_of(row_format, stored).tolist() == [[-22]]  # that of the floor 1e-4


def test_what_is_not_finite_does_not_come_back_finite() -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        for row_format in (fp8(96, 6), RowFormat("fp4", 96, 6, torch.float32)):
            for channel in (3, 92):
                rows = torch.randn(2, 96)
                rows[0, channel] = bad
                found = row_format.decode(row_format.encode(rows), torch.float32)
                assert not found[0, channel].isfinite() and found[1].isfinite().all()


@pytest.mark.parametrize(
    ("row_format", "edge"),
    [*((fp8(width, rope_dim), 224.0) for width, rope_dim in WIDTHS), (RowFormat("fp4", 96, 4, torch.float32), 3.0)],
)
def test_a_stored_row_is_stored_again_as_it_is(row_format: RowFormat, edge: float) -> None:
    """In value always. In bytes unless a tile's largest number came down to half of what its scale can hold: then half
    the scale does, and from there on nothing moves."""
    rows = torch.cat((hard_rows(row_format.width), torch.randn(2000, row_format.width)))
    stored = row_format.encode(rows)
    values = row_format.decode(stored, torch.float32)
    again = row_format.encode(values)
    assert torch.equal(row_format.decode(again, torch.float32), values)
    assert torch.equal(row_format.encode(row_format.decode(again, torch.float32)), again)
    if row_format.kind == "fp8":
        plain, size, scales = row_format.width - row_format.rope_dim, 64, scales_of(row_format, stored)
    else:
        plain, size, scales = row_format.width, 32, stored[:, -row_format.width // 32 :].int() - 127
    tiles = torch.nn.functional.pad(values[:, :plain], (0, -plain % size)).unflatten(1, (-1, size)).abs().amax(-1)
    above_floor = tiles >= (1e-4 if row_format.kind == "fp8" else 6 * 2.0**-126)
    halved = ((tiles.double() == edge * torch.exp2(scales.double())) & above_floor).any(1)
    assert torch.equal((again != stored).any(1), halved)
    assert bool(halved.any()) == (plain > 0) and not bool(halved.all())


def test_index_keys_are_rounded_as_weights_are() -> None:
    row_format = RowFormat("fp4", 96, 4, torch.float32)
    rows = hard_rows(96)
    stored = row_format.encode(rows)
    packed = quantize(rows)
    assert torch.equal(stored[:, :48], packed.codes) and torch.equal(stored[:, 48:], packed.scales)
    assert torch.equal(row_format.decode(stored, torch.float32), fake_quantize(rows))
    assert torch.equal(row_format.decode(stored[4:5], torch.bfloat16).float(), fake_quantize(rows)[4:5])
    assert torch.equal(row_format.encode(rows.bfloat16()), row_format.encode(rows.bfloat16().float()))


# ---- with a model ----------------------------------------------------------------------------------------------------


def small_model(**changes: Any) -> DeepseekV4:
    """Two layers whose entries, index keys, rings and tails all matter, with pages of eight tokens."""
    fields = {
        "num_hidden_layers": 2, "layer_types": [CSA, HCA], "mlp_layer_types": ["moe", "moe"], "hc_mult": 2,
        "hc_sinkhorn_iters": 2, "n_routed_experts": 4, "index_head_dim": 32, "index_n_heads": 16,
    }  # fmt: skip
    return random_model(tiny(**{**fields, **changes}))


def random_tokens(length: int) -> Tensor:
    return torch.randint(40, (length,))


def pieces(model: DeepseekV4, cache: Cache, sequences: dict[int, Tensor], done: dict[int, int], seed: int = 0) -> Any:
    """`run_in_pieces` by a seed that fixes all calls, random padding included: [slot in order] hidden states."""
    torch.manual_seed(seed)
    return list(run_in_pieces(model, cache, sequences, random.Random(seed), done).values())


def page_bytes(cache: Cache) -> int:
    return num_bytes([tensor[0] for layer in cache.layers for tensor in layer.paged()])


def slot_bytes(cache: Cache) -> int:
    return num_bytes([tensor[0] for layer in cache.layers for tensor in layer.per_slot()])


@pytest.mark.parametrize("length", [1, 2, 4, 7, 8, 9, 12, 15, 16, 17])
@torch.no_grad()
def test_samples_share_the_pages_of_their_prompt_and_go_on_as_if_alone(length: int) -> None:
    model, slots = small_model(), [5, 0, 3, 2]
    prompt = random_tokens(length)
    sequences = {slot: torch.cat((prompt, random_tokens(random.randint(1, 18)))) for slot in slots}
    done = dict.fromkeys(slots, length)
    shared, separate = (poisoned_cache(model, 6, 37) for _ in range(2))
    for slot in slots:
        extend(model, separate, [(slot, 0, prompt)])
    extend(model, shared, [(5, 0, prompt)])
    shared.fork([5, 5, 5], [0, 3, 2])
    assert used_pages(shared) == math.ceil(length / PAGE) and used_pages(separate) == 4 * math.ceil(length / PAGE)
    found, expected = (pieces(model, cache, sequences, done) for cache in (shared, separate))
    for slot, ours, theirs in zip(slots, found, expected, strict=True):
        assert torch.equal(ours, theirs)
        assert error(ours, alone(model, sequences[slot])[length:]) < TOLERANCE

    common = length // PAGE
    private = [math.ceil(len(tokens) / PAGE) - common for tokens in sequences.values()]
    assert used_pages(shared) == common + sum(private)
    assert used_pages(separate) == 4 * common + sum(private)
    assert shared.num_bytes() == 6 * slot_bytes(shared) + shared.num_pages * page_bytes(shared)
    order = random.sample(slots, 4)
    for count, slot in enumerate(order):
        for cache in (shared, separate):
            cache.release([slot])
        left = {other: torch.cat((sequences[other], random_tokens(1))) for other in order[count + 1 :]}
        if left and count != 1:
            at = {other: len(sequences[other]) for other in left}
            found, expected = (pieces(model, cache, left, at) for cache in (shared, separate))
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
            sequences = left
    assert shared.free_pages == shared.num_pages and not shared.references.any()


@torch.no_grad()
def test_a_sequence_that_found_no_page_goes_on_when_another_is_released() -> None:
    model = small_model()
    first, other = random_tokens(30), random_tokens(8)
    second = torch.cat((first[:15], random_tokens(9)))
    caches = [poisoned_cache(model, 3, 32, num_pages=4) for _ in range(2)]
    for cache in caches:
        extend(model, cache, [(0, 0, first[:15]), (2, 0, other)])
        cache.fork([0], [1])
    tight = caches[0]
    before = state_of_everything(tight)
    for rows in (
        [(0, 15, first[15:16]), (2, 8, random_tokens(1))],  # a copy and a new page, and one is free
        [(1, 15, second[15:24])],
        [(2, 8, random_tokens(1)), (0, 15, first[15:16]), (1, 15, second[15:16])],
    ):
        with pytest.raises(OutOfPages, match="2 pages are needed, 1 of 4 are free"):
            extend(model, tight, rows)
        assert state_of_everything(tight) == before
    for cache in caches:
        cache.release([2])
    sequences = {0: first[:20], 1: second[:16]}
    found, expected = (pieces(model, cache, sequences, {0: 15, 1: 15}) for cache in caches)
    for ours, theirs, tokens in zip(found, expected, sequences.values(), strict=True):
        assert torch.equal(ours, theirs)
        assert error(ours, alone(model, tokens)[15:]) < TOLERANCE
    with pytest.raises(OutOfPages):
        extend(model, tight, [(1, 16, second[16:])])
    tight.release([0])
    (last,) = extend(model, tight, [(1, 16, second[16:])])
    assert error(last, alone(model, second)[16:]) < TOLERANCE


@pytest.mark.parametrize("layout", ["plain", "packed"])
@torch.no_grad()
def test_a_restored_snapshot_goes_on_as_if_nothing_had_been(layout: Layout) -> None:
    """In another slot, on other pages, after everything was overwritten; at every kind of length, the last one full."""
    model = small_model()
    lengths = [1, 2, 3, 4, 7, 8, 9, 13, 16, 17, 24, 36]
    max_tokens = 37  # not a multiple of the page
    sequences = [random_tokens(min(length + 12, max_tokens)) for length in lengths]
    undisturbed, cache = (poisoned_cache(model, len(lengths), max_tokens, None, layout) for _ in range(2))
    rows = [(slot, 0, tokens[:length]) for slot, (tokens, length) in enumerate(zip(sequences, lengths, strict=True))]
    for one in (undisturbed, cache):
        extend(model, one, rows)
    snapshots = [cache.snapshot(slot) for slot in range(len(lengths))]
    for snapshot, length in zip(snapshots, lengths, strict=True):
        assert num_bytes(snapshot) == slot_bytes(cache) + math.ceil(length / PAGE) * page_bytes(cache)

    others = {slot: random_tokens(max_tokens) for slot in range(len(lengths))}
    extend(model, cache, [(slot, 0, tokens) for slot, tokens in others.items()])
    cache.release(random.sample(range(len(lengths)), len(lengths)))
    for layer in cache.layers:
        for tensor in (*layer.per_slot(), *layer.paged()):
            tensor.fill_(torch.nan if tensor.is_floating_point() else 255)
    slots = random.sample(range(len(lengths)), len(lengths))
    assert slots != sorted(slots)
    for slot, snapshot, length in zip(slots, snapshots, lengths, strict=True):
        cache.restore(slot, snapshot, length)
    done = dict(zip(slots, lengths, strict=True))
    found = pieces(model, cache, dict(zip(slots, sequences, strict=True)), done)
    expected = pieces(model, undisturbed, dict(enumerate(sequences)), dict(enumerate(lengths)))
    for ours, theirs, tokens, length in zip(found, expected, sequences, lengths, strict=True):
        assert torch.equal(ours, theirs)
        if layout == "plain":
            assert error(ours, alone(model, tokens)[length:]) < TOLERANCE

    cache.restore(slots[0], snapshots[6], 9)  # a snapshot is not used up, and lets go of what was there
    (again,) = extend(model, cache, [(slots[0], 9, sequences[6][9:])])
    assert float((again - expected[6]).norm() / again.norm()) < (TOLERANCE if layout == "plain" else 0.1)
    cache.release(range(len(lengths)))
    assert cache.free_pages == cache.num_pages


@pytest.mark.parametrize("layout", ["plain", "packed"])
@torch.no_grad()
def test_what_was_never_written_is_never_read(layout: Layout) -> None:
    """Zeros in place of NaN would be the same run to the bit, whatever padding and shorter rows read."""
    model = small_model(layer_types=[CSA, WINDOW_ONLY])
    sequences = {slot: random_tokens(length) for slot, length in ((3, 1), (0, 3), (4, 9), (1, 21))}
    poisoned = poisoned_cache(model, 5, 21, None, layout)
    found = pieces(model, poisoned, sequences, {})
    expected = pieces(model, model.new_cache(5, 21, None, layout), sequences, {})
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@dataclass(slots=True, frozen=True)
class Rounded:
    """Stores float32 numbers that have been through a packed format and back."""

    packed: RowFormat
    kind: str = "rounded"

    def encode(self, values: Tensor) -> Tensor:
        return self.packed.decode(self.packed.encode(values), torch.float32)

    def decode(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        return rows.to(dtype)


@torch.no_grad()
def test_the_packed_layout_rounds_what_is_stored_and_nothing_else() -> None:
    model = small_model(head_dim=72, num_hidden_layers=3, layer_types=[CSA, HCA, CSA], mlp_layer_types=["moe"] * 3,
                        partial_rotary_factor=4 / 72)  # fmt: skip
    sequences = {slot: random_tokens(length) for slot, length in ((2, 30), (0, 8), (1, 17))}
    packed, rounded = poisoned_cache(model, 3, 32, None, "packed"), poisoned_cache(model, 3, 32)
    for ours, theirs in zip(packed.layers, rounded.layers, strict=True):
        theirs.format = cast(RowFormat, Rounded(ours.format))
        for state, twin in zip(ours.states(), theirs.states(), strict=True):
            twin.format = cast(RowFormat, Rounded(state.format))
            assert state.kv.dtype == state.gate.dtype == torch.float32
    found, expected = (pieces(model, cache, sequences, {}) for cache in (packed, rounded))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@torch.no_grad()
def test_the_packed_layout_stays_close_to_the_plain_one() -> None:
    """Relative distance of hidden states, with all entries picked and all experts chosen: a choice that flips is not a
    matter of degree. The bound is half of what FP8 may do to one number. In the plain layout chunking does not matter;
    in the packed one a call reads its own tokens as they are and older ones in FP8, so it stays within the same bound.
    """
    model = small_model(index_topk=100, num_experts_per_tok=4)
    sequences = {slot: random_tokens(length) for slot, length in ((0, 33), (1, 40))}
    expected = [alone(model, tokens) for tokens in sequences.values()]
    distances = []
    for seed in range(4):
        plain = pieces(model, poisoned_cache(model, 2, 40), sequences, {}, seed)
        packed = pieces(model, poisoned_cache(model, 2, 40, None, "packed"), sequences, {}, seed)
        for row, hidden in enumerate(expected):
            assert error(plain[row], hidden) < TOLERANCE
            distances.append(float((packed[row] - hidden).norm() / hidden.norm()))
    assert min(distances) > 1e-3 and max(distances) < 2.0**-5


@pytest.mark.parametrize("layout", ["plain", "packed"])
@torch.no_grad()
def test_index_keys_that_are_in_mxfp4_already_are_stored_as_they_are(layout: Layout) -> None:
    config = small_model().config
    model = DeepseekV4(config, fp4_index=True)
    model.load_state_dict(small_model().state_dict())
    cache = poisoned_cache(model, 1, 40, None, layout)
    attention, exact = model.blocks[0].self_attn, []
    indexer = getattr(attention.compressor, "indexer", None)
    assert indexer is not None
    with pytest.MonkeyPatch().context() as patch:
        compress = indexer.compress
        patch.setattr(indexer, "compress", lambda *inputs: exact.append(compress(*inputs)) or exact[-1])
        tokens = random_tokens(40)
        whole = alone(model, tokens)
    seen = torch.cat(pieces(model, cache, {0: tokens}, {}))
    state = cache.layers[0].indexer
    assert state is not None and state.entries.dtype == torch.uint8 and state.entries.shape[-1] == 17
    order = torch.as_tensor(cache.table[0])
    keys = state.format.decode(state.entries[order].flatten(0, 1), torch.float32)
    assert error(keys, exact[0][0]) < TOLERANCE and torch.equal(fake_quantize(keys), keys)
    if layout == "plain":
        assert error(seen, whole) < TOLERANCE


def test_packed_index_keys_need_whole_blocks() -> None:
    with pytest.raises(ValueError, match="index_head_dim=24 is not a multiple of 32"):
        small_model(index_head_dim=24).new_cache(1, 8, layout="packed")


# ---- size ------------------------------------------------------------------------------------------------------------

FLASH, PRO = (2, 21, 20), (0, 30, 31)  # layers: window only, CSA, HCA


def test_sizes_are_the_published_ones() -> None:
    """V4 report 3.5: bytes per token of Flash and Pro, and of what is kept per sequence whatever its length."""
    kinds = [WINDOW_ONLY, CSA, HCA]
    model = small_model(
        num_hidden_layers=3, layer_types=kinds, mlp_layer_types=["moe"] * 3, head_dim=512, index_head_dim=128,
        partial_rotary_factor=0.125, sliding_window=128, compress_rates={CSA: 4, HCA: 128},
        max_position_embeddings=1 << 20,
    ).bfloat16()  # fmt: skip
    for layout, per_token in (("packed", (3514.25, 5031.4375)), ("plain", (6880.0, 9848.0))):
        cache = model.new_cache(2, 257, layout=cast(Layout, layout))
        assert cache.page_tokens == 128 and cache.num_pages == 2 * 3 and cache.table.shape == (2, 3)
        window_only, csa, hca = cache.layers
        assert csa.compressor is not None and csa.indexer is not None and hca.compressor is not None
        assert (csa.compressor.per_page, csa.indexer.per_page, hca.compressor.per_page) == (32, 32, 1)
        assert not window_only.states() and hca.indexer is None
        page = [num_bytes([tensor[0] for tensor in layer.paged()]) for layer in cache.layers]
        for layers, expected in zip((FLASH, PRO), per_token, strict=True):
            assert sum(count * size for count, size in zip(layers, page, strict=True)) / 128 == expected
        if layout == "packed":
            assert page == [0, 32 * (584 + 68), 584]
            windows = [num_bytes([layer.window[0]]) for layer in cache.layers]
            tails = [num_bytes([tensor[0] for tensor in layer.per_slot()[1:]]) for layer in cache.layers]
            assert windows == [128 * 584] * 3 and tails == [0, 65_536 + 16_384, 524_288]
            for layers, window, tail in ((FLASH, 3_214_336, 12_206_080), (PRO, 4_559_872, 18_710_528)):
                assert sum(count * size for count, size in zip(layers, windows, strict=True)) == window
                assert sum(count * size for count, size in zip(layers, tails, strict=True)) == tail
        # Per slot the same whatever a sequence may grow to; the rest are pages of 128 tokens.
        for max_tokens, pages in ((1, 1), (128, 1), (129, 2), (1000, 8)):
            other = model.new_cache(2, max_tokens, layout=cast(Layout, layout))
            assert slot_bytes(other) == slot_bytes(cache) and page_bytes(other) == sum(page)
            assert other.num_bytes() == 2 * slot_bytes(cache) + 2 * pages * sum(page)
        assert model.new_cache(2, 1000, 3, cast(Layout, layout)).num_bytes() == 2 * slot_bytes(cache) + 3 * sum(page)


@torch.no_grad()
def test_a_snapshot_grows_by_pages_only() -> None:
    model = small_model()
    cache = model.new_cache(1, 40)
    tokens = random_tokens(40)
    sizes = []
    for end in range(40):
        extend(model, cache, [(0, end, tokens[end : end + 1])])
        sizes.append(num_bytes(cache.snapshot(0)))
    assert [size - slot_bytes(cache) for size in sizes] == [(end // PAGE + 1) * page_bytes(cache) for end in range(40)]
    assert page_bytes(cache) == 4 * (2 * (16 + 32) + 16)
    assert slot_bytes(cache) == 4 * (2 * 8 * 16 + 2 * 8 * 2 * (16 + 32) + 2 * 8 * 16)
