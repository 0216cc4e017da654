"""Attention to windows and entries on the CPU, forward and backward, as one recorded step in float32.

The one idea is in `tiled_attention.cpp`: queries meet their keys tile by tile and no logit is kept, so time is that of
the products and memory is that of queries, keys and one number per query and head.

Left out: other dtypes and devices (`opd.model.sparse`, whose equations these are) and the step of decoding (`fused`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opd.kernels.library import operators


def usable(*tensors: Tensor | None) -> bool:
    """Whether tensors like these (None: not given) can go through this file."""
    given = [tensor for tensor in tensors if tensor is not None]
    fits = all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in given)
    return fits and operators() is not None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, recent: Tensor, entries: Tensor | None, sinks: Tensor, *reach: Any) -> Tensor:
        ops: Any = operators()
        query, recent = query.contiguous(), recent.contiguous()
        entries = None if entries is None else entries.contiguous()
        out, log_sums = ops.tiled_attention(query, recent, entries, sinks, *reach)
        ctx.save_for_backward(query, recent, entries, sinks, out, log_sums, *reach[:3])
        ctx.sizes = reach[3:]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ops: Any = operators()
        query, recent, entries, sinks, out, log_sums, *index = ctx.saved_tensors
        grad = grads[0].contiguous()
        along = torch.linalg.vecdot(grad, out)
        of_query, of_recent, of_entries = ops.tiled_attention_backward(
            grad, query, recent, entries, log_sums, along, *index, *ctx.sizes
        )
        # The sink's value is zero, so its logit only takes from what the others' values give.
        of_sinks = -((sinks - log_sums).exp() * along).sum((0, 1))
        return of_query, of_recent, of_entries, of_sinks, *[None] * 5


def attention(
    query: Tensor,
    recent: Tensor,
    entries: Tensor | None,
    sinks: Tensor,
    *,
    first: Tensor | None,
    visible: Tensor | None,
    picks: Tensor | None,
    window: int,
    past: int,
) -> Tensor:
    """As `opd.model.sparse.sparse_attention`, whose `Reach` has these fields."""
    first, visible, picks = (None if index is None else index.contiguous() for index in (first, visible, picks))
    return _Attention.apply(query, recent, entries, sinks, first, visible, picks, window, past)
