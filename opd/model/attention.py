"""V4's hybrid attention: a sliding window in every layer, beside it compressed entries (CSA or HCA) or none.

V4 report 2.3. One key vector per token serves all heads and is its own value. A compressor pools m tokens into one
entry; CSA (m = 4) overlaps its blocks and lets an indexer pick entries, HCA (m = 128) attends to all of its few.
Two ways through the same equations: `forward` over whole right-padded sequences, for training and scoring, and `extend`
against a cache, for chunked prefill and decoding. A query at t may use block i iff i < floor((t + 1) / m).

The softmax itself and its backward are in `sparse`.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opd.fp4 import fake_quantize
from opd.kernels import fused
from opd.model.cache import CompressorState, Extension, LayerCache
from opd.model.layers import GroupedLinear, RMSNorm, norm_rotate, rope_rotation, rotate
from opd.model.sparse import BLOCK_ELEMENTS, QUERY_BLOCK, Reach, entry_shares, sparse_attention, top_entries

Indexing = Literal["off", "dense", "sparse"]


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
        at.write_entries(state, rows[row], block, entries)

    def _pool(self, kv: Tensor, gate: Tensor, rotation: Tensor) -> Tensor:
        """Softmax-weighted sum over the candidates (dimension -2), then norm and RoPE."""
        weights = torch.softmax(gate, dim=-2, dtype=gate.dtype if gate.dtype == torch.float64 else torch.float32)
        pooled = (weights.to(kv.dtype) * kv).sum(-2)
        return norm_rotate(pooled, self.kv_norm.weight, self.kv_norm.eps, rotation)


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
        self.quantized = False  # MXFP4 queries and keys, as served; the rotation alone would change no score
        self.q_b_proj = nn.Linear(query_rank, heads * width, bias=False)
        self.scorer = IndexerScorer(hidden_size, heads)

    def queries(self, h_BTD: Tensor, latent_BTR: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """Index queries [B, T, Hi, C], rotated, and the heads' weights [B, T, Hi], in at least float32."""
        query = rotate(self.q_b_proj(latent_BTR).unflatten(-1, (self.heads, self.width)), rotation[..., None, :])
        query = self._rounded(query)
        weights = self.scorer.weights_proj(h_BTD) * (self.width * self.heads) ** -0.5
        return _widen(query), _widen(weights)

    def _pool(self, kv: Tensor, gate: Tensor, rotation: Tensor) -> Tensor:
        return self._rounded(super()._pool(kv, gate, rotation))

    def _rounded(self, x: Tensor) -> Tensor:
        """x in the Hadamard basis, which spreads outliers over all channels, and in MXFP4 (V4 report 5.2.1)."""
        if not self.quantized:
            return x
        return fake_quantize(torch.matmul(x, hadamard(self.width).to(x))).to(x.dtype)

    @torch.no_grad()
    def pick(self, h_BTD: Tensor, latent_BTR: Tensor, keys_BMC: Tensor, visible_BT: Tensor, rotation: Tensor) -> Tensor:
        """The entries each query attends to, int64 [B, T, topk]: the best of the visible ones by index score, -1 for
        a place that nothing fills. Blocked over queries: no more than BLOCK_ELEMENTS scores exist at a time."""
        batch, length, _ = h_BTD.shape
        query, weights = self.queries(h_BTD, latent_BTR, rotation)
        keys = _widen(keys_BMC)
        size = max(1, min(length, BLOCK_ELEMENTS // (4 * batch * self.heads * keys.shape[1])))
        picks = torch.empty(batch, length, min(self.topk, keys.shape[1]), dtype=torch.int64, device=keys.device)
        for begin in range(0, length, size):
            part = slice(begin, begin + size)
            scores = index_scores(query[:, part], weights[:, part], keys)
            hidden = torch.arange(keys.shape[1], device=keys.device) >= visible_BT[:, part, None]
            picks[:, part] = top_entries(scores.masked_fill_(hidden, -torch.inf), self.topk)
        return picks


@functools.cache
def hadamard(size: int) -> Tensor:
    """The orthonormal symmetric matrix of Sylvester's order, float32 [size, size]; `size` is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix * size**-0.5


def index_scores(query_BTHC: Tensor, weights_BTH: Tensor, keys_BMC: Tensor) -> Tensor:
    """sum_h w_h relu(q_h . k_m): [B, T, H, C], [B, T, H], [B, M, C] -> [B, T, M] (V4 report equation 16)."""
    batch, length, heads, width = query_BTHC.shape
    products = torch.bmm(query_BTHC.reshape(batch, length * heads, width), keys_BMC.mT).relu_()
    products = products.view(batch * length, heads, -1)
    return torch.bmm(weights_BTH.reshape(batch * length, 1, heads), products).view(batch, length, -1)


class IndexReport(NamedTuple):
    """What training the indexer of a layer needs and what it is judged by, over the real queries that may see more
    entries than they can pick.

    loss: sum over rows of the row's mean KL(attention shares || softmax of the index scores), nats; a row without such
    queries adds nothing. recall: [2], sum and number, over some of these queries, of the attention mass of the entries
    that the indexer picks as a share of the mass of the best ones there are; no gradient.
    """

    loss: Tensor
    recall: Tensor


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

    def forward(
        self,
        h_BTD: Tensor,
        rotation: Tensor,
        frequencies: Tensor,
        lengths: Tensor | None = None,
        indexing: Indexing = "off",
    ) -> tuple[Tensor, IndexReport | None]:
        """Whole sequences from position 0, right-padded: [B, T, D] -> [B, T, D].

        `indexing` trains the indexer on the real queries (`lengths` [B]): "dense" attends to every visible entry and
        compares over all of them (warm-up), "sparse" attends to the picks and compares over those. Inputs of the
        indexer are detached, so its loss moves the indexer alone. None where no query has more entries than top-k.
        """
        batch, length, _ = h_BTD.shape
        latent, query = self._queries(h_BTD, rotation)
        recent = self._keys(h_BTD, rotation)
        if self.compressor is None or length < self.compressor.ratio:
            mixed = sparse_attention(query, recent, None, self.sinks, Reach(self.window))
            return self._output(mixed, rotation), None
        entries = self.compressor.compress(h_BTD, frequencies)
        ratio = self.compressor.ratio
        visible = ((torch.arange(length, device=h_BTD.device) + 1) // ratio)[None]
        reach = Reach(self.window, visible=visible, ratio=ratio)
        indexer: Indexer | None = getattr(self.compressor, "indexer", None)
        report = None
        if indexer is not None and entries.shape[1] > indexer.topk:
            with torch.set_grad_enabled(indexing != "off" and torch.is_grad_enabled()):
                keys = indexer.compress(h_BTD.detach(), frequencies)
            sparse = reach._replace(
                picks=indexer.pick(h_BTD, latent, keys, visible.expand(batch, -1), rotation),
            )
            if indexing != "off":
                real = visible.new_full((batch,), length) if lengths is None else lengths
                compared = reach if indexing == "dense" else sparse
                attended = (query.detach(), recent.detach(), entries.detach(), self.sinks.detach())
                inputs = (h_BTD.detach(), latent.detach(), keys, rotation)
                counted = _choosing(indexer.topk, visible, real)
                report = IndexReport(
                    indexer_loss(indexer, inputs, attended, compared, counted),
                    indexer_recall(indexer.topk, attended, reach, sparse, counted),
                )
            if indexing != "dense":
                reach = sparse
        return self._output(sparse_attention(query, recent, entries, self.sinks, reach), rotation), report

    def extend(self, h_BTD: Tensor, rotation: Tensor, frequencies: Tensor, cache: LayerCache, at: Extension) -> Tensor:
        """New tokens of the sequences in `at.slots`, attending to the cache and to each other: [B, T, D].

        A decoding step reads its window, its picks and the index keys; nothing else of a CSA layer's cache.
        """
        latent, query = self._queries(h_BTD, rotation)
        new_keys = self._keys(h_BTD, rotation)
        dtype, blocks, picks = new_keys.dtype, 0, None
        visible = at.read_positions() + 1
        if self.compressor is not None and cache.compressor is not None:
            self.compressor.extend(h_BTD, cache.compressor, at, frequencies)
            indexer: Indexer | None = getattr(self.compressor, "indexer", None)
            if indexer is not None and cache.indexer is not None:
                indexer.extend(h_BTD, cache.indexer, at, frequencies)
            blocks = at.max_end // self.compressor.ratio
            visible = visible // self.compressor.ratio
            if indexer is not None and cache.indexer is not None and blocks > indexer.topk:
                keys = at.read_entries(cache.indexer, blocks, self.compressor.ratio, dtype)
                picks = indexer.pick(h_BTD, latent, keys, visible, rotation)
        is_in_place = cache.format.kind == "plain" and cache.window.dtype == dtype == self.sinks.dtype
        if new_keys.shape[1] == 1 and is_in_place and fused.usable(new_keys):
            mixed = fused.decode_attention(
                query[:, 0],
                new_keys[:, 0],
                cache.window,
                cache.compressor.entries if cache.compressor is not None and blocks else None,
                self.sinks,
                slots=at.slots,
                positions=at.starts,
                pages=at.pages,
                visible=visible[:, 0],
                picks=None if picks is None else picks[:, 0],
                most_visible=blocks,
            )[:, None]
        else:
            mixed = self._attend_to_copies(query, new_keys, cache, at, blocks, visible, picks)
        at.write_ring(cache.window, cache.format.encode(new_keys))
        return self._output(mixed, rotation)

    def _attend_to_copies(
        self,
        query: Tensor,
        new_keys: Tensor,
        cache: LayerCache,
        at: Extension,
        blocks: int,
        visible: Tensor,
        picks: Tensor | None,
    ) -> Tensor:
        """Attention to what is first read out of the cache: for chunks, packed layouts, where nothing is compiled."""
        dtype = new_keys.dtype
        past, first = at.read_ring(cache.window, cache.format, dtype)
        recent = torch.cat((past, new_keys), 1)
        reach, entries = Reach(self.window, past=past.shape[1], first=first), None
        if blocks and self.compressor is not None and cache.compressor is not None:
            ratio = self.compressor.ratio
            reach = reach._replace(visible=visible, ratio=ratio, base=at.max_end)
            if picks is not None and picks.shape[1] == 1:
                # Picks come first in their row, so what is gathered is a prefix: dense attention to a few entries.
                entries = at.read_picks(cache.compressor, picks[:, 0], dtype)
                reach = reach._replace(visible=(picks >= 0).sum(-1), ratio=1)
            else:
                entries = at.read_entries(cache.compressor, blocks, ratio, dtype)
                reach = reach._replace(picks=picks)
        return sparse_attention(query, recent, entries, self.sinks, reach)

    def _queries(self, h: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """The normalised query latent (the indexer reads it too) and the rotated, unit-RMS heads [B, T, H, C]."""
        latent = self.q_a_norm(self.q_a_proj(h))
        query = self.q_b_proj(latent).unflatten(-1, (self.heads, self.head_dim))
        return latent, norm_rotate(query, None, self.eps, rotation[..., None, :])

    def _keys(self, h: Tensor, rotation: Tensor) -> Tensor:
        """The tokens' own keys, which are their values too: [B, T, C]."""
        return norm_rotate(self.kv_proj(h), self.kv_norm.weight, self.kv_norm.eps, rotation)

    def _output(self, mixed_BTHC: Tensor, rotation: Tensor) -> Tensor:
        # Values carry their key's rotation; turning back by the query's position leaves the relative distance.
        turned = rotate(mixed_BTHC, rotation[..., None, :].conj())
        return self.o_b_proj(self.o_a_proj(turned.reshape(*turned.shape[:2], self.o_a_proj.groups, -1)))


Attended = tuple[Tensor, Tensor, Tensor, Tensor]  # query, recent keys, entries, sinks: what attention is made of


def indexer_loss(
    indexer: Indexer, inputs: tuple[Tensor, Tensor, Tensor, Tensor], attended: Attended, reach: Reach, counted: Tensor
) -> Tensor:
    """KL from how attention shares its mass among the entries to softmax(index scores): sum over rows of the row's
    mean over the queries that `counted` [B, T] names.

    The target is attention summed over heads and normalised over the entries compared, all visible ones or the picks
    (DeepSeek-V3.2 section 2.1; the rule of V4 is not published). `inputs`: the layer's input, the query latent, the
    index keys, the rotation. Queries go block by block and each block is computed again in the backward: memory is
    linear in length.
    """
    h, latent, keys, rotation = inputs
    length = h.shape[1]
    size = max(1, min(QUERY_BLOCK, BLOCK_ELEMENTS // (4 * len(h) * indexer.heads * keys.shape[1])))
    total = _widen(h).new_zeros(len(h))
    for begin in range(0, length, size):
        part = slice(begin, begin + size)
        if not bool(counted[:, part].any()):
            continue
        with torch.no_grad():
            target = entry_shares(*attended, reach, begin, min(begin + size, length))

        def divergence(h: Tensor, latent: Tensor, keys: Tensor, part: slice = part, target: Tensor = target) -> Tensor:
            query, weights = indexer.queries(h, latent, rotation[:, part])
            scores = index_scores(query, weights, _widen(keys))
            if reach.picks is not None:
                picks = reach.picks[:, part]
                scores = scores.gather(-1, picks.clamp(min=0)).masked_fill(picks < 0, -torch.inf)
            elif reach.visible is not None:
                hidden = torch.arange(keys.shape[1], device=keys.device) >= reach.visible[:, part, None]
                scores = scores.masked_fill(hidden, -torch.inf)
            log_share = torch.log_softmax(scores, -1).masked_fill(scores == -torch.inf, 0.0)
            kl = (torch.xlogy(target, target) - target * log_share).sum(-1)
            return kl.masked_fill(~counted[:, part], 0.0).sum(1)

        total = total + checkpoint(divergence, h[:, part], latent[:, part], keys, use_reentrant=False)
    return (total / counted.sum(1).clamp(min=1)).sum()


RECALL_QUERIES = 32  # the last columns of a batch: those with the most to choose from


@torch.no_grad()
def indexer_recall(topk: int, attended: Attended, dense: Reach, sparse: Reach, counted: Tensor) -> Tensor:
    """Share of the best top-k's attention mass that the picks have: [2], sum and number over the counted queries of the
    last RECALL_QUERIES columns that have any."""
    assert sparse.picks is not None
    end = int(counted.any(0).nonzero().max()) + 1 if bool(counted.any()) else 1
    begin = max(0, end - RECALL_QUERIES)
    counted = counted[:, begin:end]
    shares = entry_shares(*attended, dense, begin, end)
    picks = sparse.picks[:, begin:end]
    found = (shares.gather(-1, picks.clamp(min=0)) * (picks >= 0)).sum(-1)
    best = shares.topk(min(topk, shares.shape[-1]), dim=-1).values.sum(-1)
    ratio = found / best.clamp(min=torch.finfo(best.dtype).tiny)
    return torch.stack(((ratio * counted).sum(), counted.sum().to(ratio.dtype)))


def _choosing(topk: int, visible_BT: Tensor, lengths_B: Tensor) -> Tensor:
    """bool [B, T]: real queries that may see more entries than they can pick."""
    real = torch.arange(visible_BT.shape[1], device=visible_BT.device) < lengths_B[:, None]
    return real & (visible_BT > topk)


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
