"""The lightning indexer's choice on the CPU: scores that are made, compared and forgotten chunk by chunk.

Plain torch holds [queries, heads, keys] products for a block of queries and passes over them three times, and reads
the pages of a cache into one copy first. Here keys are read where they lie, and MXFP4 values are multiplied as whole
numbers.

Left out: the loops and the order of ties (`index.cpp`), and where queries, weights and keys come from (`opd.model`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opd.kernels.library import operators

ROW_DTYPES = (torch.float32, torch.bfloat16, torch.uint8)


def usable(x: Tensor, rows: Tensor) -> bool:
    """Whether queries made of x, widened to float32, and keys stored like these can go through this file."""
    fits = x.device.type == rows.device.type == "cpu" and x.dtype != torch.float64 and rows.dtype in ROW_DTYPES
    return fits and operators() is not None


def pick(
    query: Tensor, weights: Tensor, rows: Tensor, table: Tensor, visible: Tensor, k: int, *, is_mxfp4: bool
) -> Tensor:
    """The k entries of largest sum_h weights_h * relu(query_h . key) for every query, int64 [B, T, k].

    query float32 [B, T, H, C], weights [B, T, H]. rows [pages, per page, stored size]: keys as numbers, or as uint8
    rows of MXFP4 (codes, then scales). Entry i of row b lies on page table[b, i // per page], and query t may have
    those below visible[b, t] (int64 [B or 1, T]). Of equal scores the lower entry comes first. Entries are in ascending
    order, -1 follows where there are too few. `is_mxfp4`: queries and keys are MXFP4 values along C; others would be
    rounded.
    """
    ops: Any = operators()
    return ops.index_pick(
        query.contiguous(),
        weights.contiguous(),
        rows.contiguous(),
        table.contiguous(),
        visible.contiguous(),
        k,
        is_mxfp4,
    )
