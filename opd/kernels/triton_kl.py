"""CUDA's comparison of student and teacher, by Triton: both head products and all sums of a tile in one kernel.

The one idea: a program multiplies out a block of both logits and reduces it while it is in registers, so logits are in
no memory at all, and what is written are the mergeable sums of `opd.divergence`. Backward, the same products end in the
gradient of a tile of logits, which the ordinary products with states and heads take from there. bfloat16 states and
heads meet on tensor cores, where their products are exact and sums float32; float32 ones are multiplied without TF32.

Imported only where triton is. Numbers are in bits, as in `opd.logits`, by the same scale. Left out: targets, the
Jensen-Shannon mixture, float64, and merging.
"""

# pyright: reportMissingImports=false, reportMissingParameterType=false, reportIndexIssue=false
# Triton is not installed where there is no CUDA, and parameters of its functions have types of its own.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# In this order: largest student and teacher logits, masses, moments, reverse and forward sums, agreement.
NUM_SUMS = 9
TOKENS, ENTRIES, STEP = 64, 64, 64  # of a block: rows, columns, and what is multiplied at once of the width
SPLITS = 16  # parts of the vocabulary that are reduced side by side


@triton.jit
def _logits(states, head, rows, columns, is_row, is_column, width, scale, STEP: tl.constexpr):
    """states [., width] @ head [., width].T of some rows and columns, times `scale`, in float32."""
    total = tl.zeros((rows.shape[0], columns.shape[0]), dtype=tl.float32)
    for start in range(0, width, STEP):
        inner = start + tl.arange(0, STEP)
        is_inner = inner < width
        x = tl.load(
            states + rows.to(tl.int64)[:, None] * width + inner[None, :],
            mask=is_row[:, None] & is_inner[None, :],
            other=0.0,
        )
        w = tl.load(
            head + columns.to(tl.int64)[:, None] * width + inner[None, :],
            mask=is_column[:, None] & is_inner[None, :],
            other=0.0,
        )
        total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
    return total * scale


@triton.jit
def _sum_kernel(
    student_states,  # [N, student_width]
    student_head,  # [V, student_width]
    teacher_states,  # [N, teacher_width]
    teacher_head,  # [V, teacher_width]
    sums,  # float32 [NUM_SUMS, splits, N]
    num_tokens,
    vocab_size,
    student_width,
    teacher_width,
    scale,
    part_size,
    TOKENS: tl.constexpr,
    ENTRIES: tl.constexpr,
    STEP: tl.constexpr,
):
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    is_row = rows < num_tokens
    first = tl.program_id(1) * part_size
    z_top = tl.full((TOKENS,), float("-inf"), dtype=tl.float32)
    u_top = tl.full((TOKENS,), float("-inf"), dtype=tl.float32)
    zero = tl.zeros((TOKENS,), dtype=tl.float32)
    z_mass, u_mass, z_moment, u_moment, reverse, forward, agree = zero, zero, zero, zero, zero, zero, zero
    for start in range(first, min(first + part_size, vocab_size), ENTRIES):
        columns = start + tl.arange(0, ENTRIES)
        is_column = (columns < vocab_size) & (columns < first + part_size)
        z = _logits(student_states, student_head, rows, columns, is_row, is_column, student_width, scale, STEP)
        u = _logits(teacher_states, teacher_head, rows, columns, is_row, is_column, teacher_width, scale, STEP)
        z_new = tl.maximum(z_top, tl.max(tl.where(is_column[None, :], z, float("-inf")), axis=1))
        u_new = tl.maximum(u_top, tl.max(tl.where(is_column[None, :], u, float("-inf")), axis=1))
        # Nothing has been summed while the largest is -inf.
        z_shift = tl.where(z_top == float("-inf"), 0.0, z_top - z_new)
        u_shift = tl.where(u_top == float("-inf"), 0.0, u_top - u_new)
        z = tl.where(is_column[None, :], z - z_new[:, None], 0.0)
        u = tl.where(is_column[None, :], u - u_new[:, None], 0.0)
        p = tl.where(is_column[None, :], tl.exp2(z), 0.0)
        q = tl.where(is_column[None, :], tl.exp2(u), 0.0)
        z_scale, u_scale = tl.exp2(z_shift), tl.exp2(u_shift)
        step = z_shift - u_shift
        reverse = z_scale * (reverse + z_mass * step) + tl.sum(p * (z - u), axis=1)
        forward = u_scale * (forward - u_mass * step) + tl.sum(q * (u - z), axis=1)
        z_moment = z_scale * (z_moment + z_mass * z_shift) + tl.sum(p * z, axis=1)
        u_moment = u_scale * (u_moment + u_mass * u_shift) + tl.sum(q * u, axis=1)
        z_mass = z_scale * z_mass + tl.sum(p, axis=1)
        u_mass = u_scale * u_mass + tl.sum(q, axis=1)
        both = tl.max(tl.where(is_column[None, :] & (z + u == 0.0), 1.0, 0.0), axis=1)
        agree = tl.maximum(tl.where((z_shift == 0.0) & (u_shift == 0.0), agree, 0.0), both)
        z_top, u_top = z_new, u_new
    stride = tl.num_programs(1) * num_tokens
    at = sums + tl.program_id(1) * num_tokens + rows
    tl.store(at, z_top, mask=is_row)
    tl.store(at + stride, u_top, mask=is_row)
    tl.store(at + 2 * stride, z_mass, mask=is_row)
    tl.store(at + 3 * stride, u_mass, mask=is_row)
    tl.store(at + 4 * stride, z_moment, mask=is_row)
    tl.store(at + 5 * stride, u_moment, mask=is_row)
    tl.store(at + 6 * stride, reverse, mask=is_row)
    tl.store(at + 7 * stride, forward, mask=is_row)
    tl.store(at + 8 * stride, agree, mask=is_row)


@triton.jit
def _gradient_kernel(
    student_states,  # [n, student_width]
    student_head,  # [v, student_width]
    teacher_states,  # [n, teacher_width]
    teacher_head,  # [v, teacher_width]
    per_row,  # float32 [6, n]
    gradient,  # float32 [n, v]
    num_tokens,
    vocab_size,
    student_width,
    teacher_width,
    scale,
    TOKENS: tl.constexpr,
    ENTRIES: tl.constexpr,
    STEP: tl.constexpr,
):
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    is_row, is_column = rows < num_tokens, columns < vocab_size
    z_top = tl.load(per_row + rows, mask=is_row, other=0.0)
    u_top = tl.load(per_row + num_tokens + rows, mask=is_row, other=0.0)
    offset = tl.load(per_row + 2 * num_tokens + rows, mask=is_row, other=0.0)
    slope = tl.load(per_row + 3 * num_tokens + rows, mask=is_row, other=0.0)
    constant = tl.load(per_row + 4 * num_tokens + rows, mask=is_row, other=0.0)
    teacher_slope = tl.load(per_row + 5 * num_tokens + rows, mask=is_row, other=0.0)
    z = _logits(student_states, student_head, rows, columns, is_row, is_column, student_width, scale, STEP)
    u = _logits(teacher_states, teacher_head, rows, columns, is_row, is_column, teacher_width, scale, STEP)
    z, u = z - z_top[:, None], u - u_top[:, None]
    value = tl.exp2(z) * (slope[:, None] * ((z - u) - offset[:, None]) + constant[:, None])
    value -= tl.exp2(u) * teacher_slope[:, None]
    tl.store(
        gradient + rows.to(tl.int64)[:, None] * vocab_size + columns[None, :],
        value,
        mask=is_row[:, None] & is_column[None, :],
    )


def sums(
    student_hidden: Tensor, student_head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, scale: float
) -> Tensor:
    """float32 [NUM_SUMS, parts, N]: for parts of the vocabulary, in order, the sums of every token.

    hidden [N, width] and head [V, width] of each side, all of one dtype, float32 or bfloat16; logits in bits are their
    product times `scale`.
    """
    tensors = [tensor.contiguous() for tensor in (student_hidden, student_head, teacher_hidden, teacher_head)]
    num_tokens, vocab_size = len(student_hidden), len(student_head)
    part_size = ENTRIES * triton.cdiv(triton.cdiv(vocab_size, ENTRIES), SPLITS)
    num_parts = triton.cdiv(vocab_size, part_size)
    found = torch.empty(NUM_SUMS, num_parts, num_tokens, device=student_hidden.device)
    if num_tokens:
        _sum_kernel[(triton.cdiv(num_tokens, TOKENS), num_parts)](
            *tensors,
            found,
            num_tokens,
            vocab_size,
            student_hidden.shape[1],
            teacher_hidden.shape[1],
            scale,
            part_size,
            TOKENS=TOKENS,
            ENTRIES=ENTRIES,
            STEP=STEP,
            num_warps=4,
        )
    return found


def logit_gradient(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    scale: float,
    per_row: Tensor,
    out: Tensor,
) -> Tensor:
    """out float32 [n, v] = 2^z (slope (z - u - offset) + constant) - 2^u teacher_slope.

    hidden and head as for `sums`, of a tile; per_row float32 [6, n]: the rows' largest z and u, from which z and u are
    counted, offset, slope, constant and teacher_slope.
    """
    tensors = [tensor.contiguous() for tensor in (student_hidden, student_head, teacher_hidden, teacher_head, per_row)]
    if out.numel():
        _gradient_kernel[(triton.cdiv(out.shape[0], TOKENS), triton.cdiv(out.shape[1], ENTRIES))](
            *tensors,
            out,
            out.shape[0],
            out.shape[1],
            student_hidden.shape[1],
            teacher_hidden.shape[1],
            scale,
            TOKENS=TOKENS,
            ENTRIES=ENTRIES,
            STEP=STEP,
            num_warps=4,
        )
    return out
