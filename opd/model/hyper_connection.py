"""Manifold-constrained hyper-connections: n residual streams, mixed by a nearly doubly stochastic matrix.

V4 report 2.2; mHC paper (arXiv 2512.24880) equations 10 to 19. Streams are the first dimension and tokens the last one
of every coefficient, [n, N, D] and [n, N]: what is done for each token then runs along long rows. As matrix products of
4 by 4 per token, or as forty recorded normalisations, the same arithmetic would take most of a small model's time; so
mixing, weighted sum and Sinkhorn projection are one autograd function each, and four streams in float32 on a CPU go
through compiled loops (`opd.kernels.fused`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opd.kernels import fused


class _Sinkhorn(torch.autograd.Function):
    """Alternating normalisation of positive matrices [n, n, N], columns first, `iterations` column passes."""

    @staticmethod
    def forward(ctx: Any, start: Tensor, iterations: int, eps: float) -> Tensor:
        matrix = start
        steps = []  # (result, reciprocal of the sum it was divided by) of every normalisation
        for step in range(2 * iterations - 1):
            reciprocal = (matrix.sum(step % 2, keepdim=True) + eps).reciprocal_()
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
            # y = x / (sum(x) + eps)  =>  dx = (dy - sum(dy * y)) / (sum(x) + eps)
            grad = (grad - (grad * result).sum(step % 2, keepdim=True)) * reciprocal
        return grad, None, None


def sinkhorn(logits_nnN: Tensor, iterations: int, eps: float) -> Tensor:
    """exp(logits) [n, n, N], one matrix per token, brought close to the doubly stochastic matrices.

    Softmax over the second index, then `iterations` normalisations of the first with one of the second between two of
    them (the report's order, seen from the transposed matrix). Sums over the first index are exact to eps; those over
    the second only for moderate logits: 20 iterations do not converge for large ones, and that is part of the model.
    """
    return _Sinkhorn.apply(torch.softmax(logits_nnN, dim=1) + eps, iterations, eps)


class _WeightedSum(torch.autograd.Function):
    """sum_j weights_j * X_j: [n, N], [n, N, D] -> [N, D]."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, streams: Tensor) -> Tensor:
        ctx.save_for_backward(weights, streams)
        total = streams[0] * weights[0][:, None]
        for weight, stream in zip(weights[1:], streams[1:], strict=True):
            total.addcmul_(stream, weight[:, None])
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,) = grads
        weights, streams = ctx.saved_tensors
        return torch.linalg.vecdot(streams, grad[None]), weights[..., None] * grad


class _Mix(torch.autograd.Function):
    """X'_k = post_k * y + sum_j residual[j, k] X_j: [n, N, D], [N, D], [n, N], [n, n, N] -> [n, N, D]."""

    @staticmethod
    def forward(ctx: Any, streams: Tensor, output: Tensor, post: Tensor, residual: Tensor) -> Tensor:
        ctx.save_for_backward(streams, output, post, residual)
        mixed = torch.empty_like(streams, memory_format=torch.contiguous_format)
        for k in range(len(streams)):
            torch.mul(output, post[k][:, None], out=mixed[k])
            for j in range(len(streams)):
                mixed[k].addcmul_(streams[j], residual[j, k][:, None])
        return mixed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        grad = grads[0].contiguous()
        streams, output, post, residual = ctx.saved_tensors
        count = len(streams)
        grad_streams, grad_residual = torch.empty_like(grad), torch.empty_like(residual)
        for j in range(count):
            torch.mul(grad[0], residual[j, 0][:, None], out=grad_streams[j])
            for k in range(1, count):
                grad_streams[j].addcmul_(grad[k], residual[j, k][:, None])
            for k in range(count):
                torch.linalg.vecdot(streams[j], grad[k], out=grad_residual[j, k])
        grad_output = grad[0] * post[0][:, None]
        for k in range(1, count):
            grad_output.addcmul_(grad[k], post[k][:, None])
        return grad_streams, grad_output, torch.linalg.vecdot(grad, output[None]), grad_residual


class Site(NamedTuple):
    """What a block is given, and what its output is joined with."""

    hidden: Tensor  # [N, D], the block's input
    streams: Tensor  # [n, N, D], as they were
    post: Tensor  # [n, N], how much of the output each stream takes
    residual: Tensor  # [n, n, N] (from, to)


class HyperConnection(nn.Module):
    """One site's mappings: collapse n streams into the block's input, expand its output, mix the streams.

    Coefficients are computed in at least float32 whatever the streams' dtype. fn [(2 + n) n, n D], base [(2 + n) n],
    scale [3] (pre, post, residual). Rows of fn: n for collapse, n for expand, n^2 for the residual matrix in row-major
    order (from, to).
    """

    def __init__(self, streams: int, hidden_size: int, iterations: int, hc_eps: float, norm_eps: float) -> None:
        super().__init__()
        self.streams, self.iterations, self.hc_eps, self.norm_eps = streams, iterations, hc_eps, norm_eps
        rows = (2 + streams) * streams
        self.fn = nn.Parameter(torch.empty(rows, streams * hidden_size))
        self.base = nn.Parameter(torch.empty(rows))
        self.scale = nn.Parameter(torch.empty(3))

    def collapse(self, streams_nND: Tensor) -> Site:
        """The block's input and the coefficients of this site, from streams [n, N, D]."""
        n, dtype = self.streams, streams_nND.dtype
        if n == fused.STREAMS and fused.usable(streams_nND) and self.fn.dtype == dtype:
            streams, hidden, post, residual = fused.collapse(streams_nND, self.mapping())
            return Site(hidden, streams, post, residual)
        mix = stream_mix(streams_nND, self.fn, self.norm_eps)
        pre, post, residual = mix.split([n, n, n * n])
        pre_base, post_base, residual_base = self.base.to(mix.dtype)[:, None].split([n, n, n * n])
        scale = self.scale.to(mix.dtype)
        pre = torch.sigmoid(torch.addcmul(pre_base, pre, scale[0])) + self.hc_eps
        post = 2 * torch.sigmoid(torch.addcmul(post_base, post, scale[1]))
        residual = sinkhorn(
            torch.addcmul(residual_base, residual, scale[2]).unflatten(0, (n, n)), self.iterations, self.hc_eps
        )
        return Site(weighted_sum(pre, streams_nND), streams_nND, post.to(dtype), residual.to(dtype))

    def expand(self, site: Site, output_ND: Tensor) -> Tensor:
        """The streams after the block: X'_k = post_k * y + sum_j residual[j, k] X_j."""
        if _is_fused(site, output_ND):
            return fused.expand(site.streams, output_ND, site.post, site.residual)
        return _Mix.apply(site.streams, output_ND, site.post, site.residual)

    def expand_into(self, site: Site, output_ND: Tensor, after: HyperConnection) -> Site:
        """`expand`, then the collapse of the site that comes after: what that gives."""
        if _is_fused(site, output_ND) and after.fn.dtype == output_ND.dtype:
            given = site.streams, output_ND, site.post, site.residual
            streams, hidden, *own = fused.expand_collapse(*given, after.mapping())
            return Site(hidden, streams, *own)
        return after.collapse(self.expand(site, output_ND))

    def expand_into_head(self, site: Site, output_ND: Tensor, head: HyperHead) -> tuple[Tensor, Tensor]:
        """`expand`, then the collapse after the last layer: the streams [n, N, D] and their collapse [N, D]."""
        if _is_fused(site, output_ND) and head.hc_fn.dtype == output_ND.dtype:
            given = site.streams, output_ND, site.post, site.residual
            return fused.expand_collapse(*given, head.mapping())[:2]
        streams = self.expand(site, output_ND)
        return streams, head(streams)

    def mapping(self) -> fused.Mapping:
        return fused.Mapping(self.fn, self.base, self.scale, self.norm_eps, self.hc_eps, self.iterations)


def _is_fused(site: Site, output: Tensor) -> bool:
    streams, post, _ = site[1:]
    if len(streams) != fused.STREAMS or not fused.usable(streams):
        return False
    return output.dtype == post.dtype == streams.dtype


class HyperHead(nn.Module):
    """Collapse of the streams after the last layer; the same form without post and residual parts."""

    def __init__(self, streams: int, hidden_size: int, hc_eps: float, norm_eps: float) -> None:
        super().__init__()
        self.hc_eps, self.norm_eps = hc_eps, norm_eps
        self.hc_fn = nn.Parameter(torch.empty(streams, streams * hidden_size))
        self.hc_base = nn.Parameter(torch.empty(streams))
        self.hc_scale = nn.Parameter(torch.empty(1))

    def forward(self, streams_nND: Tensor) -> Tensor:
        """[n, N, D] -> [N, D]."""
        n = len(streams_nND)
        if n == fused.STREAMS and fused.usable(streams_nND) and self.hc_fn.dtype == streams_nND.dtype:
            return fused.collapse(streams_nND, self.mapping())[1]
        mix = stream_mix(streams_nND, self.hc_fn, self.norm_eps)
        pre = torch.sigmoid(mix * self.hc_scale.to(mix.dtype) + self.hc_base.to(mix.dtype)[:, None]) + self.hc_eps
        return weighted_sum(pre, streams_nND)

    def mapping(self) -> fused.Mapping:
        """The same loop as a site's, with nothing in the rows of post and residual."""
        n = len(self.hc_base)
        rest = n + n * n
        fn, base = F.pad(self.hc_fn, (0, 0, 0, rest)), F.pad(self.hc_base, (0, rest))
        return fused.Mapping(fn, base, F.pad(self.hc_scale, (0, 2)), self.norm_eps, self.hc_eps, 1)


def stream_mix(streams_nND: Tensor, fn: Tensor, eps: float) -> Tensor:
    """fn applied to each token's concatenated streams divided by their RMS, in at least float32: -> [rows, N]."""
    n, _, width = streams_nND.shape
    wide = streams_nND if streams_nND.dtype in (torch.float32, torch.float64) else streams_nND.float()
    # Scaling the few outputs instead of the wide input is the same number and a fraction of the traffic.
    inverse_rms = torch.rsqrt(torch.linalg.vecdot(wide, wide).sum(0) / (n * width) + eps)
    parts = fn.to(wide.dtype).view(-1, n, width).transpose(0, 1)
    return torch.bmm(parts, wide.transpose(1, 2)).sum(0) * inverse_rms


def weighted_sum(weights_nN: Tensor, streams_nND: Tensor) -> Tensor:
    """sum_j weights_j * X_j: [n, N], [n, N, D] -> [N, D] in the streams' dtype."""
    return _WeightedSum.apply(weights_nN.to(streams_nND.dtype), streams_nND)
