"""What decoding remembers: a ring of recent keys and compressor tails per slot, compressed entries in pages.

V4 report 3.5. A page covers `page_tokens` positions of one sequence in every layer at once: its CSA entries, its index
keys, its HCA entries. Slots hold page numbers, so samples of one prompt share its pages until one of them writes: the
page that is written next is then copied first. The ring and the tails are small, of fixed size, and copied outright.

Two layouts. "plain" stores the model's dtype, and MXFP4 for index keys that are in it anyway. "packed" is the deployed
one: keys and entries with FP8 channels and BF16 RoPE channels, index keys in MXFP4, tails in float32 (report 3.5, the
released kernels). Page numbers are decided on the host, in numpy; everything else stays on the device. Slots are not
cleared on reuse: positions decide what is visible.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from opd.fp4 import BLOCK, dequantize, quantize
from opd.kernels.library import operators
from opd.types import Fp4Tensor

Layout = Literal["plain", "packed"]

FP8_TILE = 64  # channels that share one scale
FP8_MAX = 448.0
FP8_FLOOR = 1e-4  # of a tile's largest magnitude: an all-zero tile gets a small scale, not a zero one


class OutOfPages(RuntimeError):
    """No free page is left: the caller must release a sequence before it extends this one."""


@dataclass(slots=True, frozen=True)
class RowFormat:
    """How one row of `width` channels, the last `rope_dim` of them rotated, is stored.

    kind plain: `width` numbers of `dtype`. kind fp8: E4M3 for the channels before the RoPE ones, in tiles of 64, then
    BF16 for the RoPE ones, then one UE8M0 byte per tile, padded to 8 bytes (584 for 448 + 64). kind fp4: MXFP4 codes,
    then one UE8M0 byte per 32 channels (68 for 128).
    """

    kind: Literal["plain", "fp8", "fp4"]
    width: int
    rope_dim: int
    dtype: torch.dtype

    @property
    def storage(self) -> tuple[int, torch.dtype]:
        """(numbers, dtype) of a stored row."""
        match self.kind:
            case "plain":
                return self.width, self.dtype
            case "fp8":
                size = self.width + self.rope_dim + -(-(self.width - self.rope_dim) // FP8_TILE)
                return -(-size // 8) * 8, torch.uint8
            case "fp4":
                return self.width // 2 + self.width // BLOCK, torch.uint8

    @property
    def num_bytes(self) -> int:
        size, dtype = self.storage
        return size * dtype.itemsize

    def encode(self, values: Tensor) -> Tensor:
        """[..., width] of any float dtype -> [..., stored size]."""
        size, dtype = self.storage
        match self.kind:
            case "plain":
                return values.to(dtype)
            case "fp4":
                values = values.float()
                broken = ~values.isfinite().unflatten(-1, (-1, BLOCK)).all(-1)
                packed = quantize(values.nan_to_num(0.0, 0.0, 0.0))
                return torch.cat((packed.codes, packed.scales.masked_fill(broken, 255)), -1)  # 255 is NaN
            case "fp8":
                plain = self.width - self.rope_dim
                tiles = self._tiles(values[..., :plain].float())
                amax = tiles.abs().amax(-1, keepdim=True).clamp(min=FP8_FLOOR)
                # amax / 448 = m * 2**e with 1/2 <= m < 1, so e is ceil(log2(amax / 448)) but for a power of two, whose
                # m is 1/2. log2 itself may be off by one place: a tile must fit, and must not waste a bit.
                mantissa, exponent = torch.frexp(amax / FP8_MAX)
                scales = exponent - (mantissa == 0.5).int() + 127
                scales.masked_fill_(~amax.isfinite(), 255)  # NaN: an infinity must not be read as 448
                scaled = (tiles * _power_of_two(254 - scales)).flatten(-2)[..., :plain].to(torch.float8_e4m3fn)
                rope = values[..., plain:].to(torch.bfloat16).contiguous().view(torch.uint8)
                row = torch.cat((scaled.view(torch.uint8), rope, scales.squeeze(-1).to(torch.uint8)), -1)
                return torch.nn.functional.pad(row, (0, size - row.shape[-1]))

    def decode(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """[..., stored size] -> [..., width] of `dtype`."""
        match self.kind:
            case "plain":
                return rows.to(dtype)
            case "fp4":
                codes, scales = rows.split([self.width // 2, self.width // BLOCK], -1)
                shape = (*rows.shape[:-1], self.width)
                return dequantize(Fp4Tensor(codes=codes, scales=scales.contiguous(), shape=shape)).to(dtype)
            case "fp8":
                plain, tiles = self.width - self.rope_dim, -(-(self.width - self.rope_dim) // FP8_TILE)
                elements, rope, scales, _ = rows.split(
                    [plain, 2 * self.rope_dim, tiles, rows.shape[-1] - plain - 2 * self.rope_dim - tiles], -1
                )
                values = self._tiles(elements.contiguous().view(torch.float8_e4m3fn).float())
                values = (values * _power_of_two(scales).unsqueeze(-1)).flatten(-2)[..., :plain]
                # A copy in any case: two bytes can be read as one number only where they start at an even place.
                rope = rope.clone(memory_format=torch.contiguous_format).view(torch.bfloat16)
                return torch.cat((values.to(dtype), rope.to(dtype)), -1)

    def _tiles(self, values: Tensor) -> Tensor:
        """[..., plain channels] -> [..., tiles, 64], the last one filled up with zeros."""
        return torch.nn.functional.pad(values, (0, -values.shape[-1] % FP8_TILE)).unflatten(-1, (-1, FP8_TILE))


@dataclass(slots=True)
class CompressorState:
    """One compressor's memory. R is 2m tokens with overlap (CSA), m without (HCA)."""

    kv: Tensor  # [slots, R, series * C], ring by position
    gate: Tensor  # [slots, R, series * C], position bias added
    entries: Tensor  # [pages, entries per page, stored size]
    format: RowFormat

    @property
    def per_page(self) -> int:
        return self.entries.shape[1]


class PagedRows(NamedTuple):
    """The first `blocks` entries of every row of a call, where they lie. Those that a row has not completed hold
    anything."""

    entries: Tensor  # [pages, entries per page, stored size]
    pages: Tensor  # int64 [B, pages of `blocks`]: entry i of row b is on pages[b, i // per page]; -1 for none
    format: RowFormat
    blocks: int

    def read(self, dtype: torch.dtype) -> Tensor:
        """A copy, decoded: [B, blocks, width]."""
        rows = self.entries[self.pages.clamp(min=0)].flatten(1, 2)[:, : self.blocks]
        return self.format.decode(rows, dtype)


@dataclass(slots=True)
class LayerCache:
    window: Tensor  # [slots, sliding_window, stored size], ring by position, rotated
    format: RowFormat
    compressor: CompressorState | None = None
    indexer: CompressorState | None = None

    def states(self) -> list[CompressorState]:
        return [state for state in (self.compressor, self.indexer) if state is not None]

    def per_slot(self) -> list[Tensor]:
        """Tensors whose first dimension is the slot."""
        return [self.window, *(tensor for state in self.states() for tensor in (state.kv, state.gate))]

    def paged(self) -> list[Tensor]:
        """Tensors whose first dimension is the page."""
        return [state.entries for state in self.states()]


@dataclass(slots=True)
class Cache:
    """The layers' caches for `num_slots` sequences of at most `max_tokens`, on `num_pages` pages that they share."""

    num_slots: int
    max_tokens: int
    page_tokens: int
    num_pages: int
    layers: list[LayerCache] = field(default_factory=list)
    table: np.ndarray = field(init=False)  # int64 [slots, pages of max_tokens], -1 for none
    references: np.ndarray = field(init=False)  # int64 [pages], slots that hold the page
    free: list[int] = field(init=False)  # page numbers; the last one is taken next
    own: np.ndarray = field(init=False)  # int64 [2, slots]: from where to where lies a page that is the slot's alone
    _per_slot: list[Tensor] = field(init=False, default_factory=list)  # of all layers, once they are needed

    def __post_init__(self) -> None:
        self.own = np.zeros((2, self.num_slots), dtype=np.int64)
        self.table = np.full((self.num_slots, -(-self.max_tokens // self.page_tokens)), -1, dtype=np.int64)
        self.references = np.zeros(self.num_pages, dtype=np.int64)
        self.free = list(range(self.num_pages - 1, -1, -1))

    def extension(
        self,
        slots: Sequence[int] | np.ndarray,
        starts: Sequence[int] | np.ndarray,
        lengths: Sequence[int] | np.ndarray,
        width: int | None = None,
        ahead: int = 0,
    ) -> Extension:
        """Where a call of `extend` stands: slot slots[b] goes on at position starts[b] with lengths[b] >= 1 new tokens.

        `width` is the padded number of columns, at least the longest row. Takes the pages the new tokens need, and
        copies a shared one before it is written. A slot that starts at 0 lets go of what it held. Whoever takes a page
        when most are free takes those of the next `ahead` tokens too, and so do all of the call: many a later call then
        has nothing to take. They are held, shared and saved like the others, with nothing in them. Raises ValueError
        past `max_tokens` and for a slot without the page of what comes before its start, OutOfPages when there is no
        page, in each case with nothing changed.
        """
        slots, starts, lengths = (np.asarray(values, dtype=np.int64) for values in (slots, starts, lengths))
        ends = starts + lengths
        max_end = int(ends.max())
        if max_end > self.max_tokens:
            raise ValueError(f"a sequence of {max_end} tokens does not fit a cache of {self.max_tokens}")
        self._reserve(slots, starts, ends, ahead)
        width = int(lengths.max()) if width is None else width
        device = self.layers[0].window.device
        # A copy, in one transfer: on the CPU `as_tensor` would share the caller's arrays, which move on before this is
        # used up.
        rows = torch.as_tensor(np.array((slots, starts, lengths)), device=device)
        at_slots, at_starts, at_lengths = rows.unbind()
        positions = at_starts[:, None]
        return Extension(
            slots=at_slots,
            starts=at_starts,
            lengths=at_lengths,
            positions=positions if width == 1 else positions + torch.arange(width, device=device),
            max_end=max_end,
            pages=torch.as_tensor(self.table[slots, : -(-max_end // self.page_tokens)], device=device),
        )

    def _reserve(self, slots: np.ndarray, starts: np.ndarray, ends: np.ndarray, ahead: int) -> None:
        # A decoding step touches nothing here unless a row enters a page or writes to one it shares.
        begin, end = self.own[:, slots]
        outside = (starts < begin) | (ends > end)
        if not outside.any():
            return
        if ahead:
            further = np.minimum(ends + ahead, self.max_tokens)
            wanted = int((-(-further // self.page_tokens) - starts // self.page_tokens).sum())
            if len(self.free) > self.num_pages // 2 + wanted:
                ends = further
                outside |= ends > end
        rows = np.flatnonzero(outside)
        slots, starts, ends = slots[rows], starts[rows], ends[rows]
        first, last = starts // self.page_tokens, (ends - 1) // self.page_tokens
        before = self.table[slots, np.maximum(starts - 1, 0) // self.page_tokens]
        lost = (starts > 0) & (before < 0)
        if lost.any():
            slot, start = slots[lost][0], starts[lost][0]
            raise ValueError(f"slot {slot} cannot go on at position {start}: it does not hold what comes before")
        fresh = (starts == 0) & (self.table[slots, first] >= 0)
        if int((last - first).sum()) + len(rows) > len(self.free):
            self._check_room(slots, fresh, first, last)
        self.release(slots[fresh])
        self._take_pages(slots, first, last)
        # Whoever starts at 0 is given pages anew.
        self.own[:, slots] = np.maximum(first * self.page_tokens, 1), (last + 1) * self.page_tokens

    def _check_room(self, slots: np.ndarray, fresh: np.ndarray, first: np.ndarray, last: np.ndarray) -> None:
        """A rehearsal of what follows, so that nothing has changed if there are too few pages. Those that `fresh` slots
        give back count, and of the rows that write to one shared page the last holder keeps it."""
        returned = self.table[slots[fresh]]
        returned = returned[returned >= 0]
        references = self.references - np.bincount(returned, minlength=self.num_pages)
        available = len(self.free) + int((references[np.unique(returned)] == 0).sum())
        needed = 0
        for row, slot in enumerate(slots):
            pages = self.table[slot, first[row] : last[row] + 1]
            if fresh[row]:
                needed += len(pages)
                continue
            held = pages >= 0
            shared = held & (references[pages] > 1)
            references[pages[shared]] -= 1
            needed += int((~held | shared).sum())
        if needed > available:
            raise OutOfPages(f"{needed} pages are needed, {available} of {self.num_pages} are free")

    def _take_pages(self, slots: np.ndarray, first: np.ndarray, last: np.ndarray) -> None:
        """Pages first .. last for every slot, its alone; what is on shared ones is copied."""
        counts = last - first + 1
        owners, pages = np.repeat(slots, counts), np.repeat(first - (counts.cumsum() - counts), counts)
        pages += np.arange(len(pages))
        held = self.table[owners, pages]
        empty = np.flatnonzero(held < 0)
        if len(empty):
            taken = self.free[: -len(empty) - 1 : -1]
            del self.free[-len(empty) :]
            self.references[taken] = 1
            self.table[owners[empty], pages[empty]] = taken
        copies: list[tuple[int, int]] = []
        for at in np.flatnonzero((held >= 0) & (self.references[held] > 1)).tolist():
            old = held[at]
            if self.references[old] == 1:  # its last holder keeps it
                continue
            new = self.free.pop()
            self.references[old] -= 1
            self.references[new] = 1
            self.table[owners[at], pages[at]] = new
            copies.append((old, new))
        if copies:
            source, destination = torch.tensor(copies, device=self.layers[0].window.device).T
            copy_rows([tensor for layer in self.layers for tensor in layer.paged()], source, destination)

    def release(self, slots: Sequence[int] | np.ndarray) -> None:
        """Gives back the pages of slots whose sequences have ended; what they share with others stays."""
        for slot in slots:
            pages = self.table[slot]
            if pages[0] < 0:
                continue
            for page in pages[pages >= 0][::-1].tolist():
                self.references[page] -= 1
                if not self.references[page]:
                    self.free.append(page)
            pages.fill(-1)
            self.own[:, slot] = 0

    def fork(self, sources: Sequence[int], destinations: Sequence[int], also: Sequence[Tensor] = ()) -> None:
        """Slot destinations[i] goes on from the state of sources[i]: pages shared, ring and tails copied, and so is
        what contiguous tensors of the caller, `also`, have in the same row. No slot may be in both; a destination lets
        go of what it held."""
        if not len(sources):
            return
        self.release(destinations)
        for source, destination in zip(sources, destinations, strict=True):
            pages = self.table[source]
            self.table[destination] = pages
            self.references[pages[pages >= 0]] += 1
        self.own[:, [*sources, *destinations]] = 0
        device = self.layers[0].window.device
        source, destination = torch.as_tensor(sources, device=device), torch.as_tensor(destinations, device=device)
        self._per_slot = self._per_slot or [tensor for layer in self.layers for tensor in layer.per_slot()]
        copy_rows([*self._per_slot, *also], source, destination)

    def snapshot(self, slot: int) -> list[Tensor]:
        """Copies of everything `slot` holds, to be given to `restore` of a cache of the same shape."""
        held = torch.as_tensor(self.table[slot][self.table[slot] >= 0], device=self.layers[0].window.device)
        return [
            tensor
            for layer in self.layers
            for tensor in (*(t[slot].clone() for t in layer.per_slot()), *(t[held] for t in layer.paged()))
        ]

    def restore(self, slot: int, snapshot: Sequence[Tensor], tokens: int) -> None:
        """Puts a snapshot of a sequence of `tokens` >= 1 tokens into `slot`. Raises as `extension` does."""
        pages = -(-tokens // self.page_tokens)
        self.extension([slot], [0], [tokens])
        held = torch.as_tensor(self.table[slot][:pages], device=self.layers[0].window.device)
        saved = iter(snapshot)
        for layer in self.layers:
            for tensor in layer.per_slot():
                tensor[slot] = next(saved)
            for tensor in layer.paged():
                entries = next(saved)
                assert len(entries) >= pages, "a snapshot of fewer tokens"  # one page would be broadcast
                tensor[held] = entries[:pages]

    def num_bytes(self) -> int:
        tensors = [tensor for layer in self.layers for tensor in (*layer.per_slot(), *layer.paged())]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def free_pages(self) -> int:
        return len(self.free)


@dataclass(slots=True, frozen=True)
class Extension:
    """The rows of one call of `extend`, made by `Cache.extension`. `max_end` is max(starts + lengths)."""

    slots: Tensor  # int64 [B]
    starts: Tensor  # int64 [B]
    lengths: Tensor  # int64 [B], each 1 .. T
    positions: Tensor  # int64 [B, T] = starts + 0 .. T - 1; entries past a row's length are padding
    max_end: int
    pages: Tensor  # int64 [B, pages of max_end], -1 where the row has none

    def read_positions(self) -> Tensor:
        """`positions` with padding moved back to its row's last token: padding may see no more than that, since what
        lies beyond was not written in this sequence."""
        if self.positions.shape[1] == 1:
            return self.positions
        return torch.minimum(self.positions, (self.starts + self.lengths - 1)[:, None])

    def write_ring(self, ring: Tensor, values: Tensor) -> None:
        """Stores the last ring-size real tokens' rows `values` [B, T, ...] at position % ring size."""
        size = ring.shape[1]
        if values.shape[1] == 1:
            ring[self.slots, self.positions[:, 0] % size] = values[:, 0].to(ring.dtype)
            return
        ends = (self.starts + self.lengths)[:, None]
        rows, columns = ((self.positions < ends) & (self.positions >= ends - size)).nonzero(as_tuple=True)
        ring[self.slots[rows], self.positions[rows, columns] % size] = values[rows, columns].to(ring.dtype)

    def read_ring(self, ring: Tensor, row_format: RowFormat, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A ring's rows in the order of their positions, starts - R .. starts - 1: [B, R, width], and how many of the
        first columns were never written, int64 [B]; those read zero."""
        size = ring.shape[1]
        columns = torch.arange(size, device=ring.device)
        first = (size - self.starts).clamp(min=0)
        rows = ring[self.slots[:, None], (self.starts[:, None] + columns) % size]
        return row_format.decode(rows, dtype).masked_fill((columns < first[:, None])[..., None], 0.0), first

    def write_entries(self, state: CompressorState, rows: Tensor, blocks: Tensor, entries: Tensor) -> None:
        """Stores `entries` [k, C] as blocks `blocks` of this call's rows `rows` (int64 [k] each)."""
        page = self.pages[rows, blocks // state.per_page]
        state.entries[page, blocks % state.per_page] = state.format.encode(entries)

    def paged_rows(self, state: CompressorState, blocks: int) -> PagedRows:
        """The first `blocks` entries of every row in place."""
        return PagedRows(state.entries, self.pages[:, : -(-blocks // state.per_page)], state.format, blocks)

    def read_entries(self, state: CompressorState, blocks: int, ratio: int, dtype: torch.dtype) -> Tensor:
        """The first `blocks` entries of every row, [B, blocks, C]; those the row has not completed read zero."""
        rows = self.paged_rows(state, blocks).read(dtype)
        done = (self.starts + self.lengths) // ratio
        unwritten = torch.arange(blocks, device=rows.device) >= done[:, None]
        return rows.masked_fill(unwritten[..., None], 0.0)

    def read_picks(self, state: CompressorState, picks: Tensor, dtype: torch.dtype) -> Tensor:
        """Entries `picks` [B, k] of every row, [B, k, C]; -1 reads zero."""
        blocks = picks.clamp(min=0)
        page = self.pages.gather(1, blocks // state.per_page).clamp(min=0)
        rows = state.entries[page, blocks % state.per_page]
        return state.format.decode(rows, dtype).masked_fill((picks < 0)[..., None], 0.0)


def copy_rows(tensors: Sequence[Tensor], sources: Tensor, destinations: Tensor) -> None:
    """tensor[destinations] = tensor[sources] (int64 [n] each) for every one of the contiguous tensors."""
    if not tensors:
        return
    ops: Any = operators() if tensors[0].is_cpu else None
    if ops is not None:
        ops.copy_rows(tensors, sources.contiguous(), destinations.contiguous())
        return
    for tensor in tensors:
        tensor[destinations] = tensor[sources]


def _power_of_two(scale_bytes: Tensor) -> Tensor:
    """UE8M0 bytes of any integer dtype -> float32 2 ** (byte - 127), exactly; 255 is NaN."""
    return scale_bytes.to(torch.uint8).view(torch.float8_e8m0fnu).float()


def page_size(ratios: Sequence[int]) -> int:
    """Tokens of a page: the smallest number that whole entries of every layer fill; one huge page for none."""
    return math.lcm(*ratios) if ratios else 1 << 30
