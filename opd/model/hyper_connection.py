"""Manifold-constrained hyper-connections: n residual streams, mixed by a nearly doubly stochastic matrix.

V4 report 2.2; mHC paper (arXiv 2512.24880) equations 10 to 19. The Sinkhorn projection is one autograd function: forty
normalisations of 4x4 matrices are far too small to be recorded one by one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Sinkhorn(torch.autograd.Function):
    """Alternating normalisation of positive matrices [n, n, N], columns first, `iterations` column passes.

    The many matrices are the last dimension: sums over n are then additions of long rows, not reductions of four.
    """

    @staticmethod
    def forward(ctx: Any, start: Tensor, iterations: int, eps: float) -> Tensor:
        matrix = start
        steps = []  # (result, reciprocal of the sum it was divided by) of every normalisation
        for step in range(2 * iterations - 1):
            dim = step % 2
            reciprocal = (matrix.sum(dim, keepdim=True) + eps).reciprocal_()
            matrix = matrix * reciprocal
            steps += [matrix, reciprocal]
        ctx.save_for_backward(*steps)
        return matrix

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        steps = ctx.saved_tensors
        for step in range(len(steps) // 2 - 1, -1, -1):
            result, reciprocal = steps[2 * step], steps[2 * step + 1]
            dim = step % 2
            # y = x / (sum(x) + eps)  =>  dx = (dy - sum(dy * y)) / (sum(x) + eps)
            grad = (grad - (grad * result).sum(dim, keepdim=True)) * reciprocal
        return grad, None, None


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """exp(logits) [..., n, n] brought close to the doubly stochastic matrices; column sums are exact to eps.

    Row softmax, then `iterations` column normalisations with a row normalisation between two of them (the report's
    order seen from the transposed matrix). Rows are exact only for moderate logits: 20 iterations do not converge for
    large ones, and that is part of the model.
    """
    n = logits.shape[-1]
    start = torch.softmax(logits.reshape(-1, n, n).permute(1, 2, 0).contiguous(), dim=1) + eps
    return _Sinkhorn.apply(start, iterations, eps).permute(2, 0, 1).reshape(logits.shape)  # type: ignore[no-any-return]


class HyperConnection(nn.Module):
    """One site's mappings: collapse n streams into the block's input, expand its output, mix the streams.

    Parameters are float32 whatever the streams' dtype: fn [(2 + n) n, n D], base [(2 + n) n], scale [3] (pre, post,
    residual). Rows of fn: n for collapse, n for expand, n^2 for the residual matrix in row-major order.
    """

    def __init__(self, streams: int, hidden_size: int, iterations: int, hc_eps: float, norm_eps: float) -> None:
        super().__init__()
        self.streams, self.iterations, self.hc_eps, self.norm_eps = streams, iterations, hc_eps, norm_eps
        rows = (2 + streams) * streams
        self.fn = nn.Parameter(torch.empty(rows, streams * hidden_size))
        self.base = nn.Parameter(torch.empty(rows))
        self.scale = nn.Parameter(torch.empty(3))

    def collapse(self, streams_nD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., n, D] -> block input [..., D], expansion weights [..., n], residual matrix [..., n, n] (from, to)."""
        n = self.streams
        mix = stream_mix(streams_nD, self.fn, self.norm_eps)
        pre, post, residual = mix.split([n, n, n * n], dim=-1)
        pre_base, post_base, residual_base = self.base.to(mix.dtype).split([n, n, n * n])
        scale = self.scale.to(mix.dtype)
        pre = torch.sigmoid(torch.addcmul(pre_base, pre, scale[0])) + self.hc_eps
        post = 2 * torch.sigmoid(torch.addcmul(post_base, post, scale[1]))
        residual = torch.addcmul(residual_base, residual, scale[2]).unflatten(-1, (n, n))
        return weighted_sum(pre, streams_nD), post, sinkhorn(residual, self.iterations, self.hc_eps)

    def expand(self, streams_nD: Tensor, output_D: Tensor, post: Tensor, residual: Tensor) -> Tensor:
        """X'_k = post_k * y + sum_j residual[j, k] X_j."""
        shape = streams_nD.shape
        n, width = shape[-2:]
        mixed = torch.baddbmm(
            (post.to(output_D.dtype)[..., None] * output_D[..., None, :]).view(-1, n, width),
            residual.to(streams_nD.dtype).view(-1, n, n).transpose(1, 2),
            streams_nD.reshape(-1, n, width),
        )
        return mixed.view(shape)


class HyperHead(nn.Module):
    """Collapse of the streams after the last layer; the same form without post and residual parts."""

    def __init__(self, streams: int, hidden_size: int, hc_eps: float, norm_eps: float) -> None:
        super().__init__()
        self.hc_eps, self.norm_eps = hc_eps, norm_eps
        self.hc_fn = nn.Parameter(torch.empty(streams, streams * hidden_size))
        self.hc_base = nn.Parameter(torch.empty(streams))
        self.hc_scale = nn.Parameter(torch.empty(1))

    def forward(self, streams_nD: Tensor) -> Tensor:
        mix = stream_mix(streams_nD, self.hc_fn, self.norm_eps)
        pre = torch.sigmoid(mix * self.hc_scale.to(mix.dtype) + self.hc_base.to(mix.dtype)) + self.hc_eps
        return weighted_sum(pre, streams_nD)


def stream_mix(streams_nD: Tensor, fn: Tensor, eps: float) -> Tensor:
    """fn applied to the flattened streams divided by their RMS, in at least float32: [..., n, D] -> [..., rows]."""
    flat = streams_nD.flatten(-2)
    flat = flat if flat.dtype in (torch.float32, torch.float64) else flat.float()
    # Scaling the few outputs instead of the wide input is the same number and a fraction of the traffic.
    inverse_rms = torch.rsqrt(torch.linalg.vecdot(flat, flat)[..., None] / flat.shape[-1] + eps)
    return F.linear(flat, fn.to(flat.dtype)) * inverse_rms


def weighted_sum(weights_n: Tensor, streams_nD: Tensor) -> Tensor:
    """sum_j weights_j * X_j: [..., n], [..., n, D] -> [..., D] in the streams' dtype."""
    flat = streams_nD.flatten(0, -3)
    out = torch.bmm(weights_n.to(flat.dtype).reshape(-1, 1, flat.shape[1]), flat)
    return out.view(*streams_nD.shape[:-2], streams_nD.shape[-1])
