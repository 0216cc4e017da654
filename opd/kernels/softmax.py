"""Softmaxes over a tile of logits in bits on the CPU, in two passes over it: sums that merge, and gradients.

What a chain of tensor operations takes ten passes for; beside fast products those would be half of a loss's time. The
sums are those of `opd.softmax`, which has the equations.

Left out: other dtypes and devices, for which callers have tensor operations, and the loops (`softmax_kernels.h`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opd.kernels.library import operators


def usable(tile: Tensor) -> bool:
    """Whether tiles like this one can go through this file."""
    return tile.is_cpu and tile.dtype == torch.float32 and tile.is_contiguous() and operators() is not None


def sums(z: Tensor) -> tuple[Tensor, ...]:
    """Of logits [n, v]: largest, mass, moment [n] each. z becomes relative to each row's largest."""
    ops: Any = operators()
    return ops.softmax_sums(z).unbind()


def pair_sums(z: Tensor, u: Tensor) -> tuple[Tensor, ...]:
    """Of two sides [n, v]: largest, mass and moment of z and u in turn, sum of 2^z (z - u), of 2^u (u - z), and whether
    some entry is the largest of both; [n] each. Both become relative to each row's largest."""
    ops: Any = operators()
    return ops.pair_sums(z, u).unbind()


def gradient(z: Tensor, top: Tensor, slope: Tensor, out: Tensor) -> Tensor:
    """slope 2^(z - top): [n, v], [n], [n] into `out`, which may be z."""
    ops: Any = operators()
    ops.softmax_gradient(z, top.contiguous(), slope.contiguous(), out)
    return out


def pair_gradient(z: Tensor, u: Tensor, numbers: Tensor, with_teacher: bool, out: Tensor) -> Tensor:
    """2^z (slope (z - u - offset) + constant) - 2^u teacher, into `out`, which may be z or u.

    numbers [6, n]: what is first taken off z and off u, offset, slope, constant, teacher; the last counts only
    `with_teacher`.
    """
    ops: Any = operators()
    ops.pair_gradient(z, u, numbers.contiguous(), with_teacher, out)
    return out
