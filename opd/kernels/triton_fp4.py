"""CUDA's product with packed FP4 weights, by Triton: weights are decoded in registers and multiplied on tensor cores.

The one idea: a program owns a tile of one expert's rows times a tile of output features, and walks along the inputs. A
host-made list says which rows of which expert each program has, so an expert without rows costs nothing and a plain
linear map is a stack of one. E2M1 times a block's scale is exact in bfloat16 in both formats, so bfloat16 activations
meet bfloat16 weights, and float32 ones float32 weights without TF32; sums are float32.

Imported only where triton and a CUDA device are. Bytes are the published ones. Left out: gradients, and float16, whose
range is too small for the scales.
"""

# pyright: reportMissingImports=false, reportMissingParameterType=false, reportIndexIssue=false
# Triton is not installed where there is no CUDA, and parameters of its functions have types of its own.

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

INPUTS_PER_STEP = {torch.bfloat16: 128, torch.float32: 64}  # multiples of both formats' blocks


@triton.jit
def _decoded(code, DTYPE: tl.constexpr):
    """E2M1 codes (int32) -> values: the bits of a bfloat16 of exponent 126 + e, but for 0 and the subnormal 0.5."""
    exponent = (code >> 1) & 3
    mantissa = code & 1
    magnitude = tl.where(exponent > 0, ((126 + exponent) << 7) | (mantissa << 6), mantissa * (126 << 7))
    bits = (((code >> 3) << 15) | magnitude) << 16
    return bits.to(tl.float32, bitcast=True).to(DTYPE)


@triton.jit
def _scale(byte, BLOCK: tl.constexpr):
    """Scale bytes (int32) -> float32: UE8M0 where 32 inputs share one, E4M3 where 16 do."""
    if BLOCK == 32:
        value = (byte << 23).to(tl.float32, bitcast=True)
    else:
        mantissa = byte & 7
        normal = ((((byte >> 3) + 120) << 23) | (mantissa << 20)).to(tl.float32, bitcast=True)
        value = tl.where(byte >= 8, normal, mantissa.to(tl.float32) * 0.001953125)
    return value


@triton.jit
def _grouped_linear(
    x_pointer,  # [R, K]
    codes_pointer,  # uint8 [E, N, K / 2]
    scales_pointer,  # uint8 [E, N, K / BLOCK]
    y_pointer,  # [R, N]
    tiles_pointer,  # int32 [tiles, 3]: expert, first row, end of the expert's rows
    num_features,
    width,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    INPUTS: tl.constexpr,
):
    tile = tl.program_id(1)
    expert = tl.load(tiles_pointer + 3 * tile).to(tl.int64)
    first_row = tl.load(tiles_pointer + 3 * tile + 1)
    end_row = tl.load(tiles_pointer + 3 * tile + 2)
    rows = first_row + tl.arange(0, ROWS)
    features = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    is_row = rows < end_row
    is_feature = features < num_features
    lines = expert * num_features + features  # of the stacked weight
    dtype = x_pointer.dtype.element_ty
    total = tl.zeros((ROWS, FEATURES), dtype=tl.float32)
    for start in range(0, width, INPUTS):
        inputs = start + tl.arange(0, INPUTS)
        x = tl.load(
            x_pointer + rows.to(tl.int64)[:, None] * width + inputs[None, :],
            mask=is_row[:, None] & (inputs < width)[None, :],
            other=0.0,
        )
        pairs = start // 2 + tl.arange(0, INPUTS // 2)
        packed = tl.load(
            codes_pointer + lines[:, None] * (width // 2) + pairs[None, :],
            mask=is_feature[:, None] & (pairs < width // 2)[None, :],
            other=0,
        ).to(tl.int32)
        blocks = start // BLOCK + tl.arange(0, INPUTS // BLOCK)
        scale_bytes = tl.load(
            scales_pointer + lines[:, None] * (width // BLOCK) + blocks[None, :],
            mask=is_feature[:, None] & (blocks < width // BLOCK)[None, :],
            other=0,
        ).to(tl.int32)
        values = tl.interleave(_decoded(packed & 15, tl.float32), _decoded(packed >> 4, tl.float32))
        values = tl.reshape(values, (FEATURES, INPUTS // BLOCK, BLOCK)) * _scale(scale_bytes, BLOCK)[:, :, None]
        weight = tl.reshape(values, (FEATURES, INPUTS)).to(dtype)
        total = tl.dot(x, tl.trans(weight), total, input_precision="ieee")
    tl.store(
        y_pointer + rows.to(tl.int64)[:, None] * num_features + features[None, :],
        total.to(dtype),
        mask=is_row[:, None] & is_feature[None, :],
    )


def linear(x: Tensor, codes: Tensor, scales: Tensor, sizes: Sequence[int], num_features: int) -> Tensor:
    """x [R, K], float32 or bfloat16, rows sorted by expert, times each one's weight, transposed: [R, N] of x's dtype.

    `codes` uint8 [E, N, K / 2] and `scales` uint8 [E, N, K / B] as published, on x's device; `sizes` the rows of each
    expert, summing to R.
    """
    x = x.contiguous()
    width, block = x.shape[1], x.shape[1] // scales.shape[2]
    y = x.new_empty(x.shape[0], num_features)
    if y.numel() == 0:
        return y
    most = max(sizes)
    num_rows = 16 if most <= 16 else 32 if most <= 32 else 64
    # Few rows are bound by memory: more, narrower programs keep more of it under way.
    num_outputs = 32 if most <= 16 else 64
    tiles: list[tuple[int, int, int]] = []
    start = 0
    for expert, size in enumerate(sizes):
        tiles += [(expert, row, start + size) for row in range(start, start + size, num_rows)]
        start += size
    grid = (triton.cdiv(num_features, num_outputs), len(tiles))
    _grouped_linear[grid](
        x,
        codes,
        scales,
        y,
        torch.tensor(tiles, dtype=torch.int32, device=x.device),
        num_features,
        width,
        BLOCK=block,
        ROWS=num_rows,
        FEATURES=num_outputs,
        INPUTS=INPUTS_PER_STEP[x.dtype],
        num_warps=4,
        num_stages=4,
    )
    return y
