"""What decoding remembers, per slot: a ring of recent keys, compressor tails, compressed entries (V4 report 3.5).

Every tensor's first dimension is the slot, so that requests at different positions advance together and a prompt's
state is handed to the other samples of its group by one copy. Sizes are fixed at construction: nothing grows while
decoding. Slots are not cleared on reuse; positions decide what is visible.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True)
class CompressorState:
    """One compressor's memory. R is 2m tokens with overlap (CSA), m without (HCA)."""

    kv: Tensor  # [slots, R, series * C], ring by position
    gate: Tensor  # [slots, R, series * C], position bias added
    entries: Tensor  # [slots, max blocks, C]


@dataclass(slots=True)
class LayerCache:
    window: Tensor  # [slots, sliding_window, C], ring by position, rotated
    compressor: CompressorState | None = None
    indexer: CompressorState | None = None

    def tensors(self) -> list[Tensor]:
        states = [state for state in (self.compressor, self.indexer) if state is not None]
        return [self.window, *(tensor for state in states for tensor in (state.kv, state.gate, state.entries))]


@dataclass(slots=True)
class Cache:
    """The layers' caches for `num_slots` sequences of at most `max_tokens`."""

    num_slots: int
    max_tokens: int
    layers: list[LayerCache] = field(default_factory=list)

    def copy(self, source: Tensor, destination: Tensor) -> None:
        """State of slots `source` into slots `destination` (int64 [k] each; no slot may be in both)."""
        for layer in self.layers:
            for tensor in layer.tensors():
                tensor[destination] = tensor[source]

    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for layer in self.layers for tensor in layer.tensors())


@dataclass(slots=True, frozen=True)
class Extension:
    """Where a call of `extend` stands: row b continues slot slots[b] at position starts[b] with lengths[b] new tokens.

    `max_end` is max(starts + lengths), known to the caller without asking the device.
    """

    slots: Tensor  # int64 [B]
    starts: Tensor  # int64 [B]
    lengths: Tensor  # int64 [B], each 1 .. T
    positions: Tensor  # int64 [B, T] = starts + 0 .. T - 1; entries past a row's length are padding
    max_end: int

    def read_positions(self) -> Tensor:
        """`positions` with padding moved back to its row's last token: padding may see no more than that, since what
        lies beyond was not written in this sequence."""
        if self.positions.shape[1] == 1:
            return self.positions
        return torch.minimum(self.positions, (self.starts + self.lengths - 1)[:, None])

    def write_ring(self, ring: Tensor, values: Tensor) -> None:
        """Stores the last ring-size real tokens' `values` [B, T, ...] at position % ring size."""
        size = ring.shape[1]
        if values.shape[1] == 1:
            ring[self.slots, self.positions[:, 0] % size] = values[:, 0].to(ring.dtype)
            return
        ends = (self.starts + self.lengths)[:, None]
        rows, columns = ((self.positions < ends) & (self.positions >= ends - size)).nonzero(as_tuple=True)
        ring[self.slots[rows], self.positions[rows, columns] % size] = values[rows, columns].to(ring.dtype)

    def read_ring(self, ring: Tensor) -> tuple[Tensor, Tensor]:
        """A ring's contents [B, R, ...] in storage order, and the position of each [B, R] (negative: never written)."""
        size = ring.shape[1]
        last = self.starts[:, None] - 1
        age = (last - torch.arange(size, device=ring.device)) % size
        return ring[self.slots], last - age
