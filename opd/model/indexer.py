"""The lightning indexer of CSA: index scores, the entries they pick, and how the indexer learns from attention.

V4 report 2.3.1, DeepSeek-V3.2 section 2.1. Scoring is the one part of the model whose work grows with the square of the
length, so it is one compiled pass (`opd.kernels.index`) that holds no scores, and picks, once made, are numbers: the
backward needs nothing more. Where nothing is compiled the same is done block by block.

Left out: attention to what was picked (`attention`, `sparse`).
"""

from __future__ import annotations

import functools
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opd.fp4 import fake_quantize
from opd.kernels import index as compiled
from opd.kernels.products import Linear, linear
from opd.model.cache import PagedRows
from opd.model.compressor import Compressor
from opd.model.layers import rotate
from opd.model.sparse import BLOCK_ELEMENTS, QUERY_BLOCK, Reach, entry_shares, top_entries

QUERY_ELEMENTS = 1 << 21  # of index queries that exist at a time
# Products of them with keys that do, in plain torch; on a CPU they should stay in its cache.
SCORES = {True: 1 << 19, False: 1 << 21}
RECALL_QUERIES = 32  # the last columns of a batch: those with the most to choose from


class IndexerScorer(nn.Module):
    """Per-token weight of each indexer head; a module of its own because the published parameter name has it."""

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.weights_proj = Linear(hidden_size, heads, bias=False)


class Indexer(Compressor):
    """Lightning indexer: its own overlapped compressor at index width, and scores that pick the top-k entries.

    A subclass, against the house rule, because the published parameter names put the compressor's tensors directly on
    the indexer. Equal scores go to the lower block first: that rule is part of the model.
    """

    def __init__(self, hidden_size: int, query_rank: int, heads: int, width: int, ratio: int, topk: int, eps: float):
        super().__init__(hidden_size, width, ratio, overlap=True, eps=eps)
        self.heads, self.topk = heads, topk
        self.quantized = False  # MXFP4 queries and keys, as served; the rotation alone would change no score
        self.q_b_proj = Linear(query_rank, heads * width, bias=False)
        self.scorer = IndexerScorer(hidden_size, heads)

    def queries(self, h_BTD: Tensor, latent_BTR: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """Index queries [B, T, Hi, C], rotated, and the heads' weights [B, T, Hi], in at least float32."""
        query = rotate(self.q_b_proj(latent_BTR).unflatten(-1, (self.heads, self.width)), rotation[..., None, :])
        query = self._rounded(query)
        weights = self.scorer.weights_proj(h_BTD) * (self.width * self.heads) ** -0.5
        return _widen(query), _widen(weights)

    def _entries(self, pooled: Tensor, rotation: Tensor) -> Tensor:
        return self._rounded(super()._entries(pooled, rotation))

    def _rounded(self, x: Tensor) -> Tensor:
        """x in the Hadamard basis, which spreads outliers over all channels, and in MXFP4 (V4 report 5.2.1)."""
        if not self.quantized:
            return x
        return fake_quantize(linear(x, hadamard(self.width).to(x))).to(x.dtype)

    @torch.no_grad()
    def pick(
        self, h_BTD: Tensor, latent_BTR: Tensor, keys: Tensor | PagedRows, visible: Tensor, rotation: Tensor
    ) -> Tensor:
        """The entries each query attends to, int64 [B, T, min(topk, M)]: the best by index score of the first `visible`
        ones (int64 [B or 1, T]), -1 for a place that nothing fills. `keys`: [B, M, C], or M of them in pages. Queries
        and scores exist block by block, the latter for the prefix of the keys that a block may see."""
        batch, length, _ = h_BTD.shape
        if isinstance(keys, Tensor):
            rows, table, size = keys, torch.arange(batch, device=keys.device)[:, None], keys.shape[1]
        else:
            rows, table, size = keys.entries, keys.pages, keys.blocks
        topk = min(self.topk, size)
        # Queries that see no more than they may pick have nothing to choose: they come first, and need no scores.
        few = int((visible <= topk).all(0).long().cumprod(0).sum())
        places = torch.arange(topk, device=rows.device)
        picks = torch.where(places < visible[..., None], places, -1).expand(batch, -1, -1).contiguous()
        visible = visible.expand(batch, -1)
        is_compiled = compiled.usable(h_BTD, rows)
        wide = None if is_compiled else _widen(keys if isinstance(keys, Tensor) else keys.read(h_BTD.dtype))
        queries = QUERY_ELEMENTS // (batch * self.heads * self.width)
        if wide is not None:
            queries = min(queries, SCORES[wide.device.type == "cpu"] // (batch * self.heads * size))
        for begin in range(few, length, max(1, queries)):
            part = slice(begin, begin + max(1, queries))
            query, weights = self.queries(h_BTD[:, part], latent_BTR[:, part], rotation[:, part])
            seen = visible[:, part]
            if wide is None:
                picks[:, part] = compiled.pick(query, weights, rows, table, seen, topk, is_mxfp4=self.quantized)
                continue
            most = int(seen.max())
            scores = index_scores(query, weights, wide[:, :most])
            hidden = torch.arange(most, device=wide.device) >= seen[..., None]
            best = top_entries(scores.masked_fill_(hidden, -torch.inf), topk)
            picks[:, part] = F.pad(best, (0, topk - best.shape[-1]), value=-1)
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
    batch, length, _ = h.shape
    compared = keys.shape[1] if reach.picks is None else reach.picks.shape[-1]
    size = max(1, min(QUERY_BLOCK, BLOCK_ELEMENTS // (4 * batch * indexer.heads * compared)))
    total = _widen(h).new_zeros(batch)
    for begin in range(0, length, size):
        part = slice(begin, min(begin + size, length))
        if not bool(counted[:, part].any()):
            continue
        with torch.no_grad():
            target = entry_shares(*attended, reach, begin, part.stop)

        def divergence(h: Tensor, latent: Tensor, keys: Tensor, part: slice = part, target: Tensor = target) -> Tensor:
            query, weights = indexer.queries(h, latent, rotation[:, part])
            if reach.picks is None:
                scores = index_scores(query, weights, _widen(keys[:, : target.shape[-1]]))
                unseen = (
                    torch.arange(scores.shape[-1], device=keys.device) >= cast(Tensor, reach.visible)[:, part, None]
                )
            else:
                picks = reach.picks[:, part]
                rows = torch.arange(batch, device=keys.device)[:, None, None] * keys.shape[1] + picks.clamp(min=0)
                picked = _widen(keys.flatten(0, 1).index_select(0, rows.flatten())).view(*picks.shape, -1)
                products = torch.matmul(query, picked.mT).relu()
                scores, unseen = torch.matmul(weights[:, :, None], products)[:, :, 0], picks < 0
            scores = scores.masked_fill(unseen, -torch.inf)
            log_share = torch.log_softmax(scores, -1).masked_fill(unseen, 0.0)
            kl = (torch.xlogy(target, target) - target * log_share).sum(-1)
            return kl.masked_fill(~counted[:, part], 0.0).sum(1)

        total = total + checkpoint(divergence, h[:, part], latent[:, part], keys, use_reentrant=False)
    return (total / counted.sum(1).clamp(min=1)).sum()


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


def choosing(topk: int, visible_BT: Tensor, lengths_B: Tensor) -> Tensor:
    """bool [B, T]: real queries that may see more entries than they can pick."""
    real = torch.arange(visible_BT.shape[1], device=visible_BT.device) < lengths_B[:, None]
    return real & (visible_BT > topk)


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
