"""Small layers every part of the model shares: RMS norm, interleaved RoPE, linears grouped by expert or by head group.

Left out on purpose: dropout and biases (V4 has neither) and autocast (each call says in which precision it computes).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opd.kernels import fused, products


class _RmsNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps), times a weight if there is one. Recorded as one node: the chain of small ops that
    autograd would keep instead is what makes norms slow at small width."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        inverse = torch.rsqrt(torch.linalg.vecdot(x, x)[..., None] / x.shape[-1] + eps)
        unit = x * inverse
        ctx.save_for_backward(unit, inverse, weight)
        return unit if weight is None else unit * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (grad,) = grads
        unit, inverse, weight = ctx.saved_tensors
        grad_weight = None
        if weight is not None:
            if ctx.needs_input_grad[1]:
                grad_weight = (grad * unit).flatten(0, -2).sum(0)
            grad = grad * weight
        along = torch.linalg.vecdot(grad, unit)[..., None] / unit.shape[-1]
        return torch.addcmul(grad, unit, along, value=-1).mul_(inverse), grad_weight, None


def _normalize(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if fused.usable(x) and (weight is None or weight.dtype == x.dtype):
        return fused.norm_turn(x, weight, None, eps)
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    return _RmsNorm.apply(wide, None if weight is None else weight.to(wide.dtype), eps).to(x.dtype)


class RMSNorm(nn.Module):
    """w * x / sqrt(mean(x^2) + eps) over the last dimension, in at least float32, cast back to x's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _normalize(x, self.weight, self.eps)


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """RMS norm without a weight (query heads; V4 report 2.3.3)."""
    return _normalize(x, None, eps)


def norm_rotate(x: Tensor, weight: Tensor | None, eps: float, rotation: Tensor) -> Tensor:
    """RMS norm, with a weight or without, then `rotate`."""
    if fused.usable(x) and (weight is None or weight.dtype == x.dtype):
        turns = fused.turns_of(x, rotation)
        if turns is not None:
            return fused.norm_turn(x, weight, turns, eps)
    return rotate(_normalize(x, weight, eps), rotation)


def rope_frequencies(parameters: dict[str, Any], rope_dim: int) -> Tensor:
    """Angular frequency of each channel pair, float32 [rope_dim / 2], plain or YaRN.

    `parameters` is one entry ("main" or "compress") of the published config's `rope_parameters`. V4 applies no YaRN
    magnitude factor. Raises ValueError for a rope_type other than "default" and "yarn".
    """
    base = parameters["rope_theta"]
    plain = base ** (-torch.arange(0, rope_dim, 2, dtype=torch.float32) / rope_dim)
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        return plain
    if kind != "yarn":
        raise ValueError(f"rope_parameters.rope_type={kind!r} is not supported; choose default or yarn")
    original = parameters["original_max_position_embeddings"]

    def dimension_turning(turns: float) -> float:
        return rope_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(dimension_turning(parameters.get("beta_fast") or 32)), 0)
    high = min(math.ceil(dimension_turning(parameters.get("beta_slow") or 1)), rope_dim - 1)
    span = high - low if high != low else 0.001
    ramp = ((torch.arange(rope_dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return plain / parameters["factor"] * ramp + plain * (1 - ramp)


def rope_rotation(positions: Tensor, frequencies: Tensor) -> Tensor:
    """Unit complex numbers e^(i * position * frequency), complex64 [*positions.shape, rope_dim / 2]."""
    angles = positions[..., None].float() * frequencies
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotates the last 2 * rotation.shape[-1] channels of x, pairs (2k, 2k + 1), leaving the others untouched.

    `rotation` broadcasts against x[..., : rope_dim / 2]. Conjugate it to rotate back (the output's inverse RoPE).
    """
    turns = fused.turns_of(x, rotation) if fused.usable(x) else None
    if turns is not None:
        return fused.norm_turn(x, None, turns, None)
    rope_dim = 2 * rotation.shape[-1]
    if x.dtype == torch.float64:
        rotation = rotation.to(torch.complex128)
    tail = x[..., -rope_dim:]
    wide = tail if tail.dtype == torch.float64 else tail.float()
    pairs = torch.view_as_complex(wide.reshape(*wide.shape[:-1], rope_dim // 2, 2).contiguous())
    turned = torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)
    return torch.cat((x[..., :-rope_dim], turned), dim=-1) if rope_dim < x.shape[-1] else turned


class _LinearBySegment(torch.autograd.Function):
    """y[a:b] = x[a:b] @ weight[e].T for each expert's segment of the sorted rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sizes: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sizes = sizes
        y = x.new_empty(x.shape[0], weight.shape[1])
        start = 0
        for expert, size in enumerate(sizes):
            if size:
                torch.mm(x[start : start + size], weight[expert].t(), out=y[start : start + size])
            start += size
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        start = 0
        for expert, size in enumerate(ctx.sizes):
            if size:
                rows = slice(start, start + size)
                if grad_x is not None:
                    torch.mm(grad[rows], weight[expert], out=grad_x[rows])
                if grad_weight is not None:
                    torch.mm(grad[rows].t(), x[rows], out=grad_weight[expert])
            start += size
        return grad_x, grad_weight, None


def linear_by_segment(x_RD: Tensor, weight_EFD: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Rows sorted by expert, each segment through its expert's matrix: [R, D], [E, F, D] -> [R, F].

    `sizes` has one entry per expert and sums to R. One kernel call per expert that has rows, and no gather of weights.
    """
    if products.usable(x_RD, weight_EFD):
        return products.linear_by_segment(x_RD, weight_EFD, sizes)
    return _LinearBySegment.apply(x_RD, weight_EFD, sizes)


class GroupedLinear(nn.Linear):
    """Block-diagonal linear: group g of the input through its own matrix (V4's output projection, first stage).

    weight is [groups * out_per_group, in_per_group]; forward maps [..., groups, in_per_group] to
    [..., groups * out_per_group].
    """

    def __init__(self, in_per_group: int, out_per_group: int, groups: int) -> None:
        super().__init__(in_per_group, groups * out_per_group, bias=False)
        self.groups = groups

    def forward(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, self.groups, self.in_features)
        weight = self.weight.view(self.groups, -1, self.in_features)
        if products.usable(rows, weight):
            return products.grouped_linear(rows, weight).view(*input.shape[:-2], self.out_features)
        out = torch.bmm(rows.transpose(0, 1), weight.transpose(1, 2))
        return out.transpose(0, 1).reshape(*input.shape[:-2], self.out_features)


def swiglu(gate: Tensor, up: Tensor | None, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit); clamped entries get no gradient (V4 report 4.2.3).

    Without `up` the first half of gate's last dimension is the gate and the second half is up.
    """
    if fused.usable(gate) and (up is None or up.dtype == gate.dtype):
        return fused.swiglu(gate, up, limit)
    if up is None:
        gate, up = gate.chunk(2, -1)
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
