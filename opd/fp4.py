"""MXFP4, in which the policy is sampled, published and trained: E2M1 elements, one power of two per 32 inputs.

The one idea: `quantize` (what is published and what rollout workers unpack) and `fake_quantize` (what the learner
multiplies by) round through the same function, so the learner trains exactly the weights that the workers sample from.

A weight w of a block becomes scale * e, with e on the grid 0, 0.5, 1, 1.5, 2, 3, 4, 6 and a sign, and
scale = 2 ** ceil(log2(amax / 6)) over the 32 neighbours along the last dimension. Rounding the exponent up means that
no element saturates, hence the straight-through gradient needs no mask.

Left out: activations, other block formats, and which tensors a model holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from opd.types import Fp4Tensor

BLOCK = 32  # inputs that share a scale
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by code; bit 3 of a code is the sign

_TILE = 128  # side of the square tile that shares one scale once FP4 has become FP8
_EXACT_SPAN = 14  # largest spread of scale exponents in such a tile that E4M3 holds exactly, subnormals included
_DTYPES = (torch.float32, torch.bfloat16, torch.float64)  # those that hold every MXFP4 value exactly
_EXPERT_SUFFIXES = (".experts.gate_up_proj", ".experts.down_proj")


def quantize(weight: Tensor) -> Fp4Tensor:
    """Rounds a weight [..., K] to MXFP4, ties to even. A float64 weight is rounded to float32 first.

    A block whose largest magnitude is below 6 * 2**-126, an all-zero block included, gets scale byte 1. The sign of
    what rounds to zero is kept (code 8). Raises ValueError if K is not a multiple of 32, for another dtype than
    float32, bfloat16 or float64, and if a value is not finite in float32.
    """
    _check_weight(weight.shape, weight.dtype)
    weight = weight.detach().float()
    finite = weight.isfinite()
    if not finite.all():
        position = tuple((~finite).nonzero()[0].tolist())
        raise ValueError(
            f"weight of shape {tuple(weight.shape)} has {int((~finite).sum())} values that are not finite, the first "
            f"of them {weight[position].item()} at {position}; MXFP4 holds finite values only"
        )
    elements, scale_bytes = _round_to_grid(weight)
    # Twice a grid value is one of 0, 1, 2, 3, 4, 6, 8, 12: an index from which the code is read.
    doubles = torch.tensor(E2M1_VALUES, device=weight.device).mul_(2).int()
    code_of_double = torch.zeros(13, dtype=torch.uint8, device=weight.device)
    code_of_double[doubles] = torch.arange(8, dtype=torch.uint8, device=weight.device)
    codes = code_of_double[(elements.abs() * 2).int()]
    codes |= elements.signbit().to(torch.uint8) << 3
    codes = codes.flatten(-2)
    return Fp4Tensor(
        codes=codes[..., 0::2] | (codes[..., 1::2] << 4),
        scales=scale_bytes.squeeze(-1).to(torch.uint8),
        shape=tuple(weight.shape),
    )


def dequantize(tensor: Fp4Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [..., K] that `tensor` stands for, exactly; `dtype` is float32, bfloat16 or float64.

    Only 2**128, to which the largest float32 values round, needs float64: the narrower two make it an infinity.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype} does not hold every MXFP4 value; choose one of {_names(_DTYPES)}")
    magnitudes = torch.tensor(E2M1_VALUES, dtype=dtype, device=tensor.codes.device)
    values = torch.cat((magnitudes, -magnitudes))
    both_nibbles = torch.stack((tensor.codes & 15, tensor.codes >> 4), dim=-1)
    elements = values[both_nibbles.int()].reshape(*tensor.scales.shape, BLOCK)
    # The dtype decodes 2 ** (byte - 127) with its two special bytes: 0 is a subnormal of float32, 255 is NaN.
    scales = tensor.scales.view(torch.float8_e8m0fnu).to(dtype)
    return (elements * scales.unsqueeze(-1)).reshape(tensor.shape)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        elements, scale_bytes = _round_to_grid(weight.float())
        return elements.mul_(_power_of_two(scale_bytes)).reshape(weight.shape).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0]


def fake_quantize(weight: Tensor) -> Tensor:
    """`dequantize(quantize(weight), weight.dtype)`, bit for bit, as a node of the graph: the gradient passes unchanged.

    Raises ValueError as `quantize` does for shape and dtype. Values are not checked, since that would wait for the
    device in every forward: a value that is not finite comes out as NaN, and the loss shows it.
    """
    _check_weight(weight.shape, weight.dtype)
    return _StraightThrough.apply(weight)


def lossless_violations(tensor: Fp4Tensor) -> int:
    """Number of 128x128 tiles whose scale exponents span more than 14, where a conversion to FP8 E4M3 can lose bits.

    A tile in FP8 has the scale 2**-6 times the largest of its FP4 scales. Leading dimensions are separate matrices,
    tiles at the edges may be smaller, and blocks that hold only zeros are left out: zero is exact at any scale.
    """
    num_rows = tensor.shape[-2] if len(tensor.shape) > 1 else 1
    blocks = (-1, num_rows, tensor.scales.shape[-1])
    scales = tensor.scales.reshape(blocks)
    empty = ((tensor.codes & 0x77) == 0).unflatten(-1, (-1, BLOCK // 2)).all(dim=-1).reshape(blocks)
    if scales.numel() == 0:
        return 0
    per_tile = _TILE // BLOCK
    padding = (0, -blocks[2] % per_tile, 0, -num_rows % _TILE)

    def tiles(bytes_: Tensor, neutral: int) -> Tensor:
        padded = functional.pad(bytes_.masked_fill(empty, neutral).int(), padding, value=neutral)
        return padded.unflatten(-1, (-1, per_tile)).unflatten(-3, (-1, _TILE))  # [..., tile row, 128, tile column, 4]

    span = tiles(scales, 0).amax(dim=(-3, -1)) - tiles(scales, 255).amin(dim=(-3, -1))
    return int((span > _EXACT_SPAN).sum())


def is_fp4_name(name: str, shape: Sequence[int], choice: str) -> bool:
    """Whether the parameter `name` is held in MXFP4 under the config's `model.fp4` = `choice`.

    "experts": the stacked weights of the routed experts. "none": nothing. Raises ValueError for another choice, and for
    a chosen weight whose last dimension is not a multiple of 32.
    """
    match choice:
        case "none":
            return False
        case "experts":
            if not name.endswith(_EXPERT_SUFFIXES):
                return False
        case _:
            raise ValueError(f"model.fp4={choice!r} is not allowed; choose one of experts, none")
    if not shape or shape[-1] % BLOCK:
        raise ValueError(
            f"{name} has shape {tuple(shape)}; with model.fp4={choice} its last dimension must be a multiple of {BLOCK}"
        )
    return True


def _check_weight(shape: torch.Size, dtype: torch.dtype) -> None:
    if not shape or shape[-1] % BLOCK:
        raise ValueError(f"weight has shape {tuple(shape)}; MXFP4 needs a last dimension that is a multiple of {BLOCK}")
    if dtype not in _DTYPES:
        raise ValueError(f"weight has dtype {dtype}; MXFP4 is made from one of {_names(_DTYPES)}")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _round_to_grid(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [..., K] -> new elements on the E2M1 grid [..., K/32, 32] and scale bytes int32 [..., K/32, 1].

    Every step is exact but the rounding itself, and each is one pass over memory: the learner runs this on all its
    experts in every forward.
    """
    blocks = weight.unflatten(-1, (weight.shape[-1] // BLOCK, BLOCK))
    magnitudes = blocks.abs()
    amax_bits = magnitudes.amax(dim=-1, keepdim=True).view(torch.int32)
    # amax = m * 2**e with 1 <= m < 2 gives ceil(log2(amax / 6)) = e - 2 if m <= 1.5, else e - 1. Adding the 22 low bits
    # carries into the exponent exactly when m > 1.5, that is when the mantissa is above 0x400000.
    scale_bytes = (((amax_bits + 0x3FFFFF) >> 23) - 2).clamp_(min=1)
    elements = blocks * _power_of_two(254 - scale_bytes)  # byte b is 2 ** (b - 127), so 254 - b is its inverse
    # The grid's step at x is 2 ** (max(exponent of x, 0) - 1). A float of 1.5 * 2**23 steps has just that step as the
    # weight of its last bit, so adding it makes the addition round to the grid, ties to even.
    binade = magnitudes  # its memory: a third large buffer would cost as much as several passes
    torch.bitwise_and(elements.view(torch.int32), 0x7F800000, out=binade.view(torch.int32))
    binade.clamp_(min=1.0)
    elements.add_(binade, alpha=1.5 * 2**22).sub_(binade, alpha=1.5 * 2**22)
    return elements.copysign_(blocks), scale_bytes


def _power_of_two(scale_bytes: Tensor) -> Tensor:
    """int32 bytes 1..254 -> float32 2 ** (byte - 127)."""
    return (scale_bytes << 23).view(torch.float32)
