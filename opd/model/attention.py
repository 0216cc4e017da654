"""V4's hybrid attention: a sliding window in every layer, beside it compressed entries (CSA or HCA) or none.

V4 report 2.3. One key vector per token serves all heads and is its own value. A compressor pools m tokens into one
entry; CSA (m = 4) overlaps its blocks and lets an indexer pick entries, HCA (m = 128) attends to all of its few.
Two ways through the same equations: `forward` over whole right-padded sequences, for training and scoring, and `extend`
against a cache, for chunked prefill and decoding. A query at t may use block i iff i < floor((t + 1) / m).

Left out: the entries (`compressor`), their choice (`indexer`), the softmax itself and its backward (`sparse`).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from opd.kernels import fused
from opd.kernels.products import Linear, linears
from opd.model.cache import Extension, LayerCache
from opd.model.compressor import Compressor
from opd.model.indexer import Indexer, IndexReport, choosing, indexer_loss, indexer_recall
from opd.model.layers import GroupedLinear, RMSNorm, norm_rotate, rotate
from opd.model.sparse import Reach, sparse_attention

Indexing = Literal["off", "dense", "sparse"]


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
        self.q_a_proj = Linear(hidden_size, query_rank, bias=False)
        self.q_a_norm = RMSNorm(query_rank, eps)
        self.q_b_proj = Linear(query_rank, heads * head_dim, bias=False)
        self.kv_proj = Linear(hidden_size, head_dim, bias=False)
        self.kv_norm = RMSNorm(head_dim, eps)
        self.o_a_proj = GroupedLinear(heads * head_dim // groups, group_rank, groups)
        self.o_b_proj = Linear(groups * group_rank, hidden_size, bias=False)
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
        layers = [self.q_a_proj, self.kv_proj]
        compressor = self.compressor if self.compressor is not None and length >= self.compressor.ratio else None
        if compressor is not None:
            layers += [compressor.kv_proj, compressor.gate_proj]
        down, key, *to_pool = linears(h_BTD, *layers)
        latent, query = self._queries_of(down, rotation)
        recent = self._keys_of(key, rotation)
        if compressor is None:
            mixed = sparse_attention(query, recent, None, self.sinks, Reach(self.window))
            return self._output(mixed, rotation), None
        entries = compressor.pool(to_pool[0], to_pool[1], frequencies)
        ratio = compressor.ratio
        visible = ((torch.arange(length, device=h_BTD.device) + 1) // ratio)[None]
        reach = Reach(self.window, visible=visible, ratio=ratio)
        indexer: Indexer | None = getattr(compressor, "indexer", None)
        report = None
        if indexer is not None and entries.shape[1] > indexer.topk:
            with torch.set_grad_enabled(indexing != "off" and torch.is_grad_enabled()):
                keys = indexer.compress(h_BTD.detach(), frequencies)
            sparse = reach._replace(picks=indexer.pick(h_BTD, latent, keys, visible, rotation))
            if indexing != "off":
                real = visible.new_full((batch,), length) if lengths is None else lengths
                compared = reach if indexing == "dense" else sparse
                attended = (query.detach(), recent.detach(), entries.detach(), self.sinks.detach())
                inputs = (h_BTD.detach(), latent.detach(), keys, rotation)
                counted = choosing(indexer.topk, visible, real)
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
                picks = indexer.pick(h_BTD, latent, at.paged_rows(cache.indexer, blocks), visible, rotation)
        is_in_place = cache.format.kind == "plain" and cache.window.dtype == dtype == self.sinks.dtype
        if is_in_place and fused.usable(new_keys):
            mixed = fused.decode_attention(
                query,
                new_keys,
                cache.window,
                cache.compressor.entries if cache.compressor is not None and blocks else None,
                self.sinks,
                slots=at.slots,
                starts=at.starts,
                lengths=at.lengths,
                pages=at.pages,
                visible=visible,
                picks=picks,
                most_visible=blocks,
            )
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
        """Attention to what is first read out of the cache: for packed layouts, and where nothing is compiled."""
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
        return self._queries_of(self.q_a_proj(h), rotation)

    def _queries_of(self, down: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """The normalised query latent (the indexer reads it too) and the rotated, unit-RMS heads [B, T, H, C]."""
        latent = self.q_a_norm(down)
        query = self.q_b_proj(latent).unflatten(-1, (self.heads, self.head_dim))
        return latent, norm_rotate(query, None, self.eps, rotation[..., None, :])

    def _keys(self, h: Tensor, rotation: Tensor) -> Tensor:
        return self._keys_of(self.kv_proj(h), rotation)

    def _keys_of(self, key: Tensor, rotation: Tensor) -> Tensor:
        """The tokens' own keys, which are their values too: [B, T, C]."""
        return norm_rotate(key, self.kv_norm.weight, self.kv_norm.eps, rotation)

    def _output(self, mixed_BTHC: Tensor, rotation: Tensor) -> Tensor:
        # Values carry their key's rotation; turning back by the query's position leaves the relative distance.
        turned = rotate(mixed_BTHC, rotation[..., None, :].conj())
        return self.o_b_proj(self.o_a_proj(turned.reshape(*turned.shape[:2], self.o_a_proj.groups, -1)))
