"""V4's hybrid attention: a sliding window in every layer, beside it compressed entries (CSA or HCA) or none.

V4 report 2.3. One key vector per token serves all heads and is its own value. A compressor pools m tokens into one
entry; CSA (m = 4) overlaps its blocks and lets an indexer pick entries, HCA (m = 128) attends to all of its few.
Two ways through the same equations: `forward` over whole right-padded sequences, for training and scoring, and `extend`
against a cache, for chunked prefill and decoding. A query at t may use block i iff i < floor((t + 1) / m).

This file masks a dense score matrix: exact, quadratic in length. Blocked sparse attention is not in it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opd.model.cache import CompressorState, Extension, LayerCache
from opd.model.layers import GroupedLinear, RMSNorm, rope_rotation, rotate, unit_rms


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
        self.kv_proj = nn.Linear(hidden_size, series * width, bias=False)
        self.gate_proj = nn.Linear(hidden_size, series * width, bias=False)
        self.position_bias = nn.Parameter(torch.zeros(ratio, series * width))
        self.kv_norm = RMSNorm(width, eps)

    @property
    def ring_tokens(self) -> int:
        return self.ratio * (2 if self.overlap else 1)

    def compress(self, h_BTD: Tensor, frequencies: Tensor) -> Tensor:
        """All complete blocks of sequences that start at position 0: [B, T, D] -> [B, floor(T / m), C]."""
        batch, blocks = h_BTD.shape[0], h_BTD.shape[1] // self.ratio
        whole = h_BTD[:, : blocks * self.ratio]
        kv = self.kv_proj(whole).view(batch, blocks, self.ratio, -1)
        gate = self.gate_proj(whole).view(batch, blocks, self.ratio, -1) + self.position_bias
        if self.overlap:
            # The carry series of block i - 1 joins block i; nothing joins block 0, so its gates are minus infinity.
            carry_kv = F.pad(kv[:, :-1, :, : self.width], (0, 0, 0, 0, 1, 0))
            carry_gate = F.pad(gate[:, :-1, :, : self.width], (0, 0, 0, 0, 1, 0), value=-torch.inf)
            kv = torch.cat((carry_kv, kv[..., self.width :]), dim=2)
            gate = torch.cat((carry_gate, gate[..., self.width :]), dim=2)
        starts = torch.arange(blocks, device=h_BTD.device) * self.ratio
        return self._pool(kv, gate, rope_rotation(starts, frequencies))

    def extend(self, h_BTD: Tensor, state: CompressorState, at: Extension, frequencies: Tensor) -> None:
        """Adds the new tokens to the ring and stores the entries of the blocks they complete."""
        kv = self.kv_proj(h_BTD)
        gate = self.gate_proj(h_BTD) + self.position_bias[at.positions % self.ratio]
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
        state.entries[slots[row], block] = entries.to(state.entries.dtype)

    def _pool(self, kv: Tensor, gate: Tensor, rotation: Tensor) -> Tensor:
        """Softmax-weighted sum over the candidates (dimension -2), then norm and RoPE."""
        weights = torch.softmax(gate, dim=-2, dtype=gate.dtype if gate.dtype == torch.float64 else torch.float32)
        return rotate(self.kv_norm((weights.to(kv.dtype) * kv).sum(-2)), rotation)


class IndexerScorer(nn.Module):
    """Per-token weight of each indexer head; a module of its own because the published parameter name has it."""

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.weights_proj = nn.Linear(hidden_size, heads, bias=False)


class Indexer(Compressor):
    """Lightning indexer: its own overlapped compressor at index width, and scores that pick the top-k entries.

    A subclass, against the house rule, because the published parameter names put the compressor's tensors directly on
    the indexer. Equal scores go to the lower block first: that rule is part of the model.
    """

    def __init__(self, hidden_size: int, query_rank: int, heads: int, width: int, ratio: int, topk: int, eps: float):
        super().__init__(hidden_size, width, ratio, overlap=True, eps=eps)
        self.heads, self.topk = heads, topk
        self.q_b_proj = nn.Linear(query_rank, heads * width, bias=False)
        self.scorer = IndexerScorer(hidden_size, heads)

    def select(
        self, h_BTD: Tensor, query_BTR: Tensor, keys_BMC: Tensor, visible_BTM: Tensor, rotation: Tensor
    ) -> Tensor:
        """The entries each query attends to, bool [B, T, M]: the top-k of the visible ones by index score."""
        batch, length, _ = h_BTD.shape
        query = rotate(self.q_b_proj(query_BTR).view(batch, length, self.heads, self.width), rotation)
        scores = torch.relu(torch.einsum("bthc,bmc->bthm", query.float(), keys_BMC.float()))
        weights = self.scorer.weights_proj(h_BTD).float() * (self.width * self.heads) ** -0.5
        scores = torch.einsum("bth,bthm->btm", weights, scores).masked_fill(~visible_BTM, -torch.inf)
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., : self.topk]
        return torch.zeros_like(visible_BTM).expand_as(scores).scatter(-1, best, True) & visible_BTM


class Attention(nn.Module):
    """One layer's attention. `rotation` arguments hold e^(i theta) at the queries' positions, [.., T, rope_dim / 2]."""

    def __init__(
        self,
        *,
        hidden_size: int,
        heads: int,
        head_dim: int,
        query_rank: int,
        groups: int,
        group_rank: int,
        window: int,
        eps: float,
        compressor: Compressor | None,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.window, self.eps = heads, head_dim, window, eps
        self.q_a_proj = nn.Linear(hidden_size, query_rank, bias=False)
        self.q_a_norm = RMSNorm(query_rank, eps)
        self.q_b_proj = nn.Linear(query_rank, heads * head_dim, bias=False)
        self.kv_proj = nn.Linear(hidden_size, head_dim, bias=False)
        self.kv_norm = RMSNorm(head_dim, eps)
        self.o_a_proj = GroupedLinear(heads * head_dim // groups, group_rank, groups)
        self.o_b_proj = nn.Linear(groups * group_rank, hidden_size, bias=False)
        self.sinks = nn.Parameter(torch.zeros(heads))
        self.compressor = compressor

    def forward(self, h_BTD: Tensor, rotation: Tensor, frequencies: Tensor) -> Tensor:
        """Whole sequences from position 0, right-padded: [B, T, D] -> [B, T, D]."""
        length = h_BTD.shape[1]
        positions = torch.arange(length, device=h_BTD.device)
        query_rank, query = self._queries(h_BTD, rotation)
        keys = rotate(self.kv_norm(self.kv_proj(h_BTD)), rotation)
        visible = window_mask(positions[None], positions[None], self.window)
        if self.compressor is not None and length >= self.compressor.ratio:
            entries = self.compressor.compress(h_BTD, frequencies)
            usable = block_mask(positions[None], entries.shape[1], self.compressor.ratio)
            indexer = getattr(self.compressor, "indexer", None)
            if indexer is not None and entries.shape[1] > indexer.topk:
                index_keys = indexer.compress(h_BTD, frequencies)
                usable = indexer.select(h_BTD, query_rank, index_keys, usable, rotation[..., None, :])
                visible = visible.expand(len(h_BTD), -1, -1)
            keys, visible = torch.cat((keys, entries), dim=1), torch.cat((visible, usable), dim=-1)
        return self._output(attend(query, keys, visible, self.sinks), rotation)

    def extend(self, h_BTD: Tensor, rotation: Tensor, frequencies: Tensor, cache: LayerCache, at: Extension) -> Tensor:
        """New tokens of the sequences in `at.slots`, attending to the cache and to each other: [B, T, D]."""
        query_rank, query = self._queries(h_BTD, rotation)
        new_keys = rotate(self.kv_norm(self.kv_proj(h_BTD)), rotation)
        ring, ring_positions = at.read_ring(cache.window)
        key_positions = torch.cat((ring_positions, at.positions), dim=1)
        keys = [ring.to(new_keys.dtype), new_keys]
        visible = [window_mask(at.positions, key_positions, self.window)]
        if self.compressor is not None and cache.compressor is not None:
            self.compressor.extend(h_BTD, cache.compressor, at, frequencies)
            indexer = getattr(self.compressor, "indexer", None)
            if indexer is not None and cache.indexer is not None:
                indexer.extend(h_BTD, cache.indexer, at, frequencies)
            blocks = at.max_end // self.compressor.ratio
            if blocks:
                usable = block_mask(at.read_positions(), blocks, self.compressor.ratio)
                if indexer is not None and cache.indexer is not None and blocks > indexer.topk:
                    index_keys = cache.indexer.entries[at.slots, :blocks].to(h_BTD.dtype)
                    usable = indexer.select(h_BTD, query_rank, index_keys, usable, rotation[..., None, :])
                keys.append(cache.compressor.entries[at.slots, :blocks].to(new_keys.dtype))
                visible.append(usable)
        at.write_ring(cache.window, new_keys)
        return self._output(attend(query, torch.cat(keys, 1), torch.cat(visible, -1), self.sinks), rotation)

    def _queries(self, h: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """The normalised query latent (the indexer reads it too) and the rotated, unit-RMS heads [B, T, H, C]."""
        latent = self.q_a_norm(self.q_a_proj(h))
        query = unit_rms(self.q_b_proj(latent).unflatten(-1, (self.heads, self.head_dim)), self.eps)
        return latent, rotate(query, rotation[..., None, :])

    def _output(self, mixed_BTHC: Tensor, rotation: Tensor) -> Tensor:
        # Values carry their key's rotation; turning back by the query's position leaves the relative distance.
        turned = rotate(mixed_BTHC, rotation[..., None, :].conj())
        return self.o_b_proj(self.o_a_proj(turned.reshape(*turned.shape[:2], self.o_a_proj.groups, -1)))


def window_mask(query_positions: Tensor, key_positions: Tensor, window: int) -> Tensor:
    """bool [B, T, S]: the key is one of the `window` tokens up to and including the query. Negative keys never are."""
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    return (distance >= 0) & (distance < window) & (key_positions >= 0)[:, None, :]


def block_mask(query_positions: Tensor, blocks: int, ratio: int) -> Tensor:
    """bool [B, T, blocks]: block i is complete when query t is read, i < floor((t + 1) / ratio)."""
    index = torch.arange(blocks, device=query_positions.device)
    return index < ((query_positions + 1) // ratio)[..., None]


def attend(query_BTHC: Tensor, keys_BSC: Tensor, visible_BTS: Tensor, sinks_H: Tensor) -> Tensor:
    """Attention of all heads to one shared key-value vector per entry, with a learned sink per head.

    [B, T, H, C], [B, S, C], bool [B or 1, T, S], [H] -> [B, T, H, C]. The sink is one more entry whose key and value
    are zero and whose logit is the sink: it takes probability and adds nothing. Softmax in at least float32.
    """
    batch, length, heads, width = query_BTHC.shape
    # Keys nobody may see can hold anything (unwritten cache); zero times NaN would still be NaN.
    readable = visible_BTS.any(1).to(torch.bool)[..., None]
    keys = F.pad(torch.where(readable, keys_BSC, torch.zeros((), dtype=keys_BSC.dtype)), (0, 0, 0, 1))
    logits = torch.bmm(query_BTHC.reshape(batch, length * heads, width), keys.transpose(1, 2))
    logits = logits.view(batch, length, heads, -1)
    wide = logits.dtype if logits.dtype == torch.float64 else torch.float32
    blocked = torch.zeros(visible_BTS.shape, dtype=wide, device=keys.device).masked_fill_(~visible_BTS, -torch.inf)
    bias = torch.cat(
        (
            blocked[:, :, None].expand(-1, -1, heads, -1),
            sinks_H.to(wide)[None, None, :, None].expand(len(blocked), length, -1, -1),
        ),
        dim=-1,
    )
    weights = torch.softmax(torch.add(bias, logits, alpha=width**-0.5), dim=-1).to(keys.dtype)
    return torch.bmm(weights.view(batch, length * heads, -1), keys).view(query_BTHC.shape)
