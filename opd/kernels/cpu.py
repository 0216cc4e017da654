"""The CPU's products with packed FP4 weights: the bytes they read, and the library's call that makes them.

Where there is no library `paths` is empty, and `opd.fp4` multiplies in plain torch. Left out: what an FP4 tensor is
(`opd.fp4`), the library (`library`), and the products themselves (`fp4_linear.cpp`, whose head states the layout and
the order of additions).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from opd.kernels.library import operators

TILE = 32  # output features that lie side by side
GROUP = 8  # inputs whose codes fill the 32 bits of a lane

NEUTRAL_SCALE = 1  # of the features that fill up the last tile: finite in both formats

log = logging.getLogger(__name__)


def tiled(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Published bytes, codes uint8 [E, N, K / 2] and scales uint8 [E, N, K / B], as the library reads them.

    -> codes uint8 [E, tiles, K / 8, 32, 4], scales uint8 [E, tiles, K / B, 32], with N filled up to whole tiles. Where
    there is a library, large codes lie in large pages, if the system has any: one row reads them a tenth to a third
    faster.
    """
    experts, features, half_inputs = codes.shape
    groups = half_inputs * 2 // GROUP
    padding = -features % TILE
    # Published byte i of a group holds inputs 2 i and 2 i + 1. Byte j now holds even ones (j < 2), then odd ones.
    nibbles = torch.stack((codes & 15, codes >> 4), -2).view(experts, features, 2, groups, 2, 2)
    lanes = (nibbles[..., 0] | nibbles[..., 1] << 4).movedim(2, 3).reshape(experts, features, groups, 4)
    lanes = functional.pad(lanes, (0, 0, 0, 0, 0, padding))
    scales = functional.pad(scales, (0, 0, 0, padding), value=NEUTRAL_SCALE)
    lanes = lanes.view(experts, -1, TILE, groups, 4).transpose(2, 3)
    ops: Any = operators()
    lanes = lanes.contiguous() if ops is None else ops.in_large_pages(lanes)
    return lanes, scales.view(experts, -1, TILE, scales.shape[-1]).transpose(2, 3).contiguous()


def untiled(codes: Tensor, scales: Tensor, num_features: int) -> tuple[Tensor, Tensor]:
    """The inverse of `tiled`, N being `num_features`."""
    experts, tiles, groups = codes.shape[:3]
    features = tiles * TILE
    lanes = codes.transpose(2, 3).reshape(experts, features, groups, 2, 2)
    nibbles = torch.stack((lanes & 15, lanes >> 4), -1).movedim(3, -1).reshape(experts, features, groups * 4, 2)
    published = nibbles[..., 0] | nibbles[..., 1] << 4
    scales = scales.transpose(2, 3).reshape(experts, features, -1)
    return published[:, :num_features].contiguous(), scales[:, :num_features].contiguous()


def linear(
    x: Tensor, codes: Tensor, scales: Tensor, sizes: Sequence[int], num_features: int, path: str | None = None
) -> Tensor:
    """x [R, K], rows sorted by expert, times each one's weight, transposed: [R, num_features] of x's dtype.

    `codes` and `scales` as `tiled` gives them, `sizes` the rows of each of the E experts, `path` one of `paths()`, by
    default the first. x is float32 or bfloat16 and sums are float32. A row's result does not depend, in any bit, on the
    other rows, on `sizes`, or on the number of threads. Raises ValueError for shapes that do not fit each other, and
    RuntimeError where there is no library.
    """
    available = paths()
    if not available:
        raise RuntimeError("there is no compiled library on this machine; opd.fp4 multiplies without it")
    ops: Any = operators()
    return ops.fp4_linear(x.contiguous(), codes, scales, list(sizes), num_features, path or available[0])


@functools.cache
def paths() -> tuple[str, ...]:
    """Ways of computing that this processor has, best first; empty where there is no library."""
    ops = operators()
    if ops is None:
        return ()
    found = tuple(ops.fp4_paths())
    log.info("FP4 weights are multiplied by path %s of %s", found[0], ", ".join(found))
    return found
