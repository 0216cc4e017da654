"""Attention of every query to its own few keys: a window of recent tokens, compressed entries, a sink.

The one idea: a band, a triangle and a gather are never one [queries, keys] matrix. Queries are taken block by block; a
block sees one slice of the window keys, and either a prefix of the entries (HCA, short CSA) or the entries picked for
each of its queries (CSA). What a block needs is computed again in the backward unless it is small enough to keep, so
memory is linear in length. One key vector serves all heads and is its own value (V4 report 2.3).

Left out: projections and positions (`attention`), where keys live between calls (`cache`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from opd.kernels import tiled

QUERY_BLOCK = 128  # queries of a block, at most; fewer when a block's scores would exceed BLOCK_ELEMENTS
BLOCK_ELEMENTS = 1 << 23
KEPT_ELEMENTS = 1 << 23  # attention weights of one call that are kept for the backward rather than computed again


class Reach(NamedTuple):
    """Which keys a call's queries may see. Recent key past + t is query t's own; it sees `window` keys up to that one.

    first: int64 [B], columns before it hold nothing; None: all hold something. visible: int64 [B or 1, T], a query may
    see entries 0 .. visible - 1. It never falls with t and is at most (base + t + 1) // ratio, which the host knows.
    picks: int64 [B, T, k], the entries a query attends to in place of all visible ones, -1 for none; or None.
    """

    window: int
    past: int = 0
    first: Tensor | None = None
    visible: Tensor | None = None
    ratio: int = 1
    base: int = 0
    picks: Tensor | None = None


class _Block(NamedTuple):
    """Queries begin .. end, the window columns low .. high they reach, the entries 0 .. entries - 1 they may see."""

    begin: int
    end: int
    low: int
    high: int
    entries: int


def _blocks(reach: Reach, length: int, rows: int, num_entries: int) -> list[_Block]:
    """`rows`: batch times heads. With picks no entry is in the dense part."""
    dense = num_entries if reach.picks is None else reach.picks.shape[-1]
    # A block of Q queries multiplies Q + window keys where each query sees `window`: Q near the window wastes least.
    size = min(QUERY_BLOCK, max(32, 2 * reach.window))
    size = max(1, min(size, BLOCK_ELEMENTS // max(1, rows * (reach.window + size + dense))))
    blocks = []
    for begin in range(0, length, size):
        end = min(begin + size, length)
        prefix = min(num_entries, (reach.base + end) // reach.ratio) if reach.picks is None else 0
        blocks.append(_Block(begin, end, max(0, reach.past + begin - reach.window + 1), reach.past + end, prefix))
    return blocks


def _keys(block: _Block, recent: Tensor, entries: Tensor | None) -> Tensor:
    """[B, 1 + S, C]: a zero key for the sink, the window's slice, the prefix of the entries."""
    parts = [recent[:, block.low : block.high]]
    if entries is not None and block.entries:
        parts.append(entries[:, : block.entries])
    return F.pad(torch.cat(parts, 1) if len(parts) > 1 else parts[0], (0, 0, 1, 0))


def _picked(block: _Block, reach: Reach, entries: Tensor | None) -> Tensor | None:
    """[B, Q, k, C], the entries picked for each query; index -1 reads entry 0, which the mask hides."""
    if reach.picks is None or entries is None:
        return None
    picks = reach.picks[:, block.begin : block.end]
    rows = torch.arange(len(entries), device=entries.device)[:, None, None] * entries.shape[1] + picks.clamp(min=0)
    return entries.flatten(0, 1)[rows.flatten()].view(*picks.shape, -1)


def _mask(block: _Block, reach: Reach, dtype: torch.dtype, device: torch.device) -> Tensor:
    """0 or minus infinity, [B or 1, Q, 1 + S + k]."""
    own = torch.arange(block.begin, block.end, device=device)[:, None] + reach.past
    columns = torch.arange(block.low, block.high, device=device)
    seen = ((columns <= own) & (columns > own - reach.window))[None]
    if reach.first is not None:
        seen = seen & (columns >= reach.first[:, None, None])
    parts = [torch.ones_like(seen[..., :1]), seen]
    if block.entries and reach.visible is not None:
        visible = reach.visible[:, block.begin : block.end, None]
        parts.append(torch.arange(block.entries, device=device) < visible)
    if reach.picks is not None:
        parts.append(reach.picks[:, block.begin : block.end] >= 0)
    batch = max(len(part) for part in parts)
    seen = torch.cat([part.expand(batch, -1, -1) for part in parts], -1)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)


def _weights(query: Tensor, keys: Tensor, picked: Tensor | None, mask: Tensor, sinks: Tensor) -> Tensor:
    """Softmax over sink, window, entries and picks, in at least float32: [B, Q, H, 1 + S + k]."""
    batch, length, heads, width = query.shape
    logits = torch.bmm(query.reshape(batch, length * heads, width), keys.mT).view(batch, length, heads, -1)
    if picked is not None:
        logits = torch.cat((logits, torch.matmul(query, picked.mT)), -1)
    logits = torch.add(mask[:, :, None], logits, alpha=width**-0.5)
    logits[..., 0] = sinks
    return torch.softmax(logits, -1)


class _SparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, recent: Tensor, entries: Tensor | None, sinks: Tensor, reach: Reach) -> Tensor:
        batch, length, heads, _ = query.shape
        blocks = _blocks(reach, length, batch * heads, 0 if entries is None else entries.shape[1])
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        kept: list[Tensor] = []
        room = KEPT_ELEMENTS if any(ctx.needs_input_grad) else 0
        for block in blocks:
            part = query[:, block.begin : block.end]
            keys, picked = _keys(block, recent, entries), _picked(block, reach, entries)
            weights = _weights(part, keys, picked, _mask(block, reach, _wide(query.dtype), query.device), sinks)
            room -= weights.numel()
            if room >= 0:
                kept.append(weights)
            narrow = weights.to(query.dtype)
            dense = keys.shape[1]
            mixed = torch.bmm(narrow[..., :dense].reshape(batch, -1, dense), keys).view(part.shape)
            if picked is not None:
                mixed += torch.matmul(narrow[..., dense:], picked)
            out[:, block.begin : block.end] = mixed
        ctx.reach, ctx.blocks = reach, blocks
        ctx.kept = kept if room >= 0 else []
        ctx.save_for_backward(query, recent, entries, sinks)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor, None]:
        (grad_out,) = grads
        query, recent, entries, sinks = ctx.saved_tensors
        reach: Reach = ctx.reach
        batch, _, _, width = query.shape
        scale = width**-0.5
        grad_query, grad_recent = torch.empty_like(query), torch.zeros_like(recent)
        grad_entries = None if entries is None else torch.zeros_like(entries)
        grad_sinks = torch.zeros_like(sinks, dtype=_wide(sinks.dtype))
        for index, block in enumerate(ctx.blocks):
            queries = slice(block.begin, block.end)
            part, grad = query[:, queries], grad_out[:, queries]
            keys, picked = _keys(block, recent, entries), _picked(block, reach, entries)
            if ctx.kept:
                weights = ctx.kept[index]
            else:
                weights = _weights(part, keys, picked, _mask(block, reach, _wide(query.dtype), query.device), sinks)
            dense = keys.shape[1]
            flat_part, flat_grad = part.reshape(batch, -1, width), grad.reshape(batch, -1, width)
            grad_weights = torch.bmm(flat_grad, keys.mT).view(*part.shape[:3], dense)
            if picked is not None:
                grad_weights = torch.cat((grad_weights, torch.matmul(grad, picked.mT)), -1)
            grad_logits = torch.ops.aten._softmax_backward_data(
                grad_weights.to(weights.dtype), weights, -1, weights.dtype
            )
            grad_sinks += grad_logits[..., 0].sum((0, 1))
            grad_logits = grad_logits.to(query.dtype).mul_(scale)
            narrow = weights.to(query.dtype)
            logits_dense = grad_logits[..., :dense].reshape(batch, -1, dense)
            of_query = torch.bmm(logits_dense, keys).view(part.shape)
            of_keys = torch.bmm(narrow[..., :dense].reshape(batch, -1, dense).mT, flat_grad)
            of_keys.baddbmm_(logits_dense.mT, flat_part)
            edge = 1 + block.high - block.low
            grad_recent[:, block.low : block.high] += of_keys[:, 1:edge]
            if grad_entries is not None and block.entries:
                grad_entries[:, : block.entries] += of_keys[:, edge:]
            if picked is not None and grad_entries is not None and reach.picks is not None:
                logits_picked, weights_picked = grad_logits[..., dense:], narrow[..., dense:]
                of_query += torch.matmul(logits_picked, picked)
                of_picked = torch.matmul(logits_picked.mT, part) + torch.matmul(weights_picked.mT, grad)
                rows = torch.arange(batch, device=query.device)[:, None, None] * grad_entries.shape[1]
                rows = (rows + reach.picks[:, queries].clamp(min=0)).flatten()
                grad_entries.view(-1, width).index_add_(0, rows, of_picked.reshape(-1, width))
            grad_query[:, queries] = of_query
        return grad_query, grad_recent, grad_entries, grad_sinks.to(sinks.dtype), None


def sparse_attention(query: Tensor, recent: Tensor, entries: Tensor | None, sinks: Tensor, reach: Reach) -> Tensor:
    """[B, T, H, C], [B, past + T, C], [B, M, C] or None, [H] -> [B, T, H, C].

    The sink is one more entry whose key and value are zero and whose logit is the sink: it takes probability and adds
    nothing. Softmax in at least float32. Keys that nobody may see must still be finite numbers.
    """
    if entries is not None and entries.shape[1] == 0:
        entries = None
    if tiled.usable(query, recent, entries, sinks):
        index = {"first": reach.first, "visible": reach.visible, "picks": reach.picks}
        return tiled.attention(query, recent, entries, sinks, window=reach.window, past=reach.past, **index)
    return _SparseAttention.apply(query, recent, entries, sinks, reach)


def entry_shares(
    query: Tensor, recent: Tensor, entries: Tensor, sinks: Tensor, reach: Reach, begin: int, end: int
) -> Tensor:
    """How queries begin .. end - 1 share their attention among the entries, heads together: [B, Q, M or k].

    Probabilities under the full softmax (window and sink included) summed over heads, then normalised to sum to 1; all
    zero for a query that sees none. In at least float32. With picks the last dimension runs over the picks; without
    them M is the number of entries that any of these queries may see.
    """
    size = min(entries.shape[1], (reach.base + end) // reach.ratio) if reach.picks is None else 0
    block = _Block(begin, end, max(0, reach.past + begin - reach.window + 1), reach.past + end, size)
    keys, picked = _keys(block, recent, entries), _picked(block, reach, entries)
    mask = _mask(block, reach, _wide(query.dtype), query.device)
    weights = _weights(query[:, begin:end], keys, picked, mask, sinks)
    mass = weights[..., 1 + block.high - block.low :].sum(2)
    return mass / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)


def top_entries(scores: Tensor, k: int) -> Tensor:
    """Indices int64 [..., k] of the k largest scores of the last dimension, -1 in place of minus infinity.

    Of equal scores the lower index comes first: a rule of the model, since rectified index scores are often equal. The
    result has the real picks in front, in an order that depends on the scores alone.
    """
    size = scores.shape[-1]
    if k >= size:
        picks = torch.arange(size, device=scores.device).expand(scores.shape)
        return torch.where(scores > -torch.inf, picks, -1)
    values, picks = scores.topk(k + 1, dim=-1)
    kth, next_one = values[..., k - 1], values[..., k]
    picks = picks[..., :k]
    # topk breaks ties as it likes: rows in which the last place is contested are decided again, by index.
    contested = (kth == next_one) & (kth > -torch.inf)
    if bool(contested.any()):
        rows = scores[contested]
        edge = kth[contested][:, None]
        above, level = rows > edge, rows == edge
        chosen = above | (level & (level.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
        picks = picks.clone()
        picks[contested] = chosen.nonzero()[:, 1].view(-1, k)
    return torch.where(values[..., :k] > -torch.inf, picks, -1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32
