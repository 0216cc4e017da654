"""What turns blocks of tokens into entries: a softmax over gates, channel by channel, then norm and RoPE.

V4 report 2.3.1 and 2.3.2. The same module serves CSA (overlapping blocks of 4 tokens), its indexer at another width,
and HCA (blocks of 128). Whole sequences are compressed at once, cached ones as their blocks close.

Left out: which entries a query attends to (`indexer`, `attention`) and where they live between calls (`cache`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opd.kernels import fused
from opd.kernels.products import Linear, linears
from opd.model.cache import CompressorState, Extension
from opd.model.layers import RMSNorm, norm_rotate, rope_rotation


class Compressor(nn.Module):
    """Pools blocks of `ratio` tokens into entries of `width`, by a softmax over gates, channel by channel.

    With overlap every token contributes two series: the first `width` channels go to the next block's entry (carry),
    the last to its own block's. Block 0 has no carry. Entries are normalised and rotated at their first token's
    position.
    """

    def __init__(self, hidden_size: int, width: int, ratio: int, overlap: bool, eps: float) -> None:
        super().__init__()
        self.width, self.ratio, self.overlap = width, ratio, overlap
        series = 2 if overlap else 1
        self.kv_proj = Linear(hidden_size, series * width, bias=False)
        self.gate_proj = Linear(hidden_size, series * width, bias=False)
        self.position_bias = nn.Parameter(torch.zeros(ratio, series * width))
        self.kv_norm = RMSNorm(width, eps)

    @property
    def ring_tokens(self) -> int:
        return self.ratio * (2 if self.overlap else 1)

    def compress(self, h_BTD: Tensor, frequencies: Tensor) -> Tensor:
        """All complete blocks of sequences that start at position 0: [B, T, D] -> [B, floor(T / m), C]."""
        kv, gate = linears(h_BTD, self.kv_proj, self.gate_proj)
        return self.pool(kv, gate, frequencies)

    def pool(self, kv: Tensor, gate: Tensor, frequencies: Tensor) -> Tensor:
        """The same from what the two projections make of the sequences, [B, T, S] each."""
        batch, blocks = kv.shape[0], kv.shape[1] // self.ratio
        rotation = rope_rotation(torch.arange(blocks, device=kv.device) * self.ratio, frequencies)
        if fused.usable(kv) and kv.dtype == self.position_bias.dtype:
            return self._entries(fused.pool(kv, gate, self.position_bias, self.overlap), rotation)
        kv, gate = (x[:, : blocks * self.ratio].reshape(batch, blocks, self.ratio, x.shape[-1]) for x in (kv, gate))
        gate = gate + self.position_bias
        if self.overlap:
            # The carry series of block i - 1 joins block i; nothing joins block 0, so its gates are minus infinity.
            carry_kv = F.pad(kv[:, :-1, :, : self.width], (0, 0, 0, 0, 1, 0))
            carry_gate = F.pad(gate[:, :-1, :, : self.width], (0, 0, 0, 0, 1, 0), value=-torch.inf)
            kv = torch.cat((carry_kv, kv[..., self.width :]), dim=2)
            gate = torch.cat((carry_gate, gate[..., self.width :]), dim=2)
        return self._pool(kv, gate, rotation)

    def extend(self, h_BTD: Tensor, state: CompressorState, at: Extension, frequencies: Tensor) -> None:
        """Adds the new tokens to the ring and stores the entries of the blocks they complete."""
        kv, gate = self.kv_proj(h_BTD), self.gate_proj(h_BTD)
        if fused.usable(kv) and kv.dtype == state.kv.dtype == self.position_bias.dtype:
            rings = state.kv, state.gate
            row, block, pooled = fused.compress_step(
                kv, gate, self.position_bias, *rings, at.slots, at.starts, at.lengths, self.overlap
            )
            if row.numel():
                at.write_entries(
                    state, row, block, self._entries(pooled, rope_rotation(block * self.ratio, frequencies))
                )
            return
        gate = gate + self.position_bias[at.positions % self.ratio]
        first = at.starts // self.ratio
        closing = (at.starts + at.lengths) // self.ratio - first
        rows = closing.nonzero()[:, 0]
        if rows.numel():
            self._close_blocks(rows, kv[rows], gate[rows], first[rows], closing[rows], state, at, frequencies)
        at.write_ring(state.kv, kv)
        at.write_ring(state.gate, gate)

    def _close_blocks(
        self,
        rows: Tensor,
        kv: Tensor,
        gate: Tensor,
        first: Tensor,
        closing: Tensor,
        state: CompressorState,
        at: Extension,
        frequencies: Tensor,
    ) -> None:
        ring, m = self.ring_tokens, self.ratio
        slots, starts = at.slots[rows], at.starts[rows]
        # Chronological view of ring and new tokens: index j holds position starts - ring + j.
        order = (starts[:, None] + torch.arange(ring, device=kv.device)) % ring
        kv = torch.cat((state.kv[slots[:, None], order].to(kv.dtype), kv), dim=1)
        gate = torch.cat((state.gate[slots[:, None], order].to(gate.dtype), gate), dim=1)
        row, offset = (torch.arange(int(closing.max()), device=kv.device) < closing[:, None]).nonzero(as_tuple=True)
        block = first[row] + offset
        own = (block * m - starts[row] + ring)[:, None] + torch.arange(m, device=kv.device)
        if self.overlap:
            kv_own, gate_own = kv[row[:, None], own, self.width :], gate[row[:, None], own, self.width :]
            kv_carry, gate_carry = kv[row[:, None], own - m, : self.width], gate[row[:, None], own - m, : self.width]
            is_first = (block == 0)[:, None, None]
            # Whatever an earlier occupant left in the ring must not reach block 0, not even times zero (it may be NaN).
            kv_carry = kv_carry.masked_fill(is_first, 0.0)
            gate_carry = gate_carry.masked_fill(is_first, -torch.inf)
            kv, gate = torch.cat((kv_carry, kv_own), dim=1), torch.cat((gate_carry, gate_own), dim=1)
        else:
            kv, gate = kv[row[:, None], own], gate[row[:, None], own]
        entries = self._pool(kv, gate, rope_rotation(block * m, frequencies))
        at.write_entries(state, rows[row], block, entries)

    def _pool(self, kv: Tensor, gate: Tensor, rotation: Tensor) -> Tensor:
        """Softmax-weighted sum over the candidates (dimension -2), as an entry."""
        weights = torch.softmax(gate, dim=-2, dtype=gate.dtype if gate.dtype == torch.float64 else torch.float32)
        return self._entries((weights.to(kv.dtype) * kv).sum(-2), rotation)

    def _entries(self, pooled: Tensor, rotation: Tensor) -> Tensor:
        """Pooled blocks, normalised and rotated at their first token's position."""
        return norm_rotate(pooled, self.kv_norm.weight, self.kv_norm.eps, rotation)
