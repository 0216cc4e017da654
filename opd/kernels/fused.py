"""What the model does between its matrix products, on the CPU, as one recorded step each.

At small width the many short operations of a V4 layer (forty normalisations, a mixing of four streams, norms, RoPE,
routing) take longer than its products. Here each of them passes over memory once, forward and backward. The functions
are those of `opd.model` under the same names and with the same arguments; `usable` says where they may stand in for the
plain ones, which are the reference in tests, the way for other dtypes and devices, and what runs where nothing can be
compiled.

Left out: the loops (`fused_kernels.h`) and the equations (`opd.model`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from opd.kernels.library import operators

DTYPES = (torch.float32, torch.float64)
STREAMS = 4  # of hyper-connections, for which the loops are unrolled


def usable(x: Tensor) -> bool:
    """Whether tensors like x can go through this file."""
    return x.is_cpu and x.dtype in DTYPES and operators() is not None


class _Nothing:
    """Stands in for autograd's context where nothing is recorded; a node costs more than a decoding step's sums."""

    needs_input_grad = (False,) * 16

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


def _run(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    if torch.is_grad_enabled():
        return function.apply(*arguments)
    return function.forward(_Nothing(), *arguments)


class Mapping(NamedTuple):
    """A site's coefficients and settings: fn [(2 + n) n, n D], base [(2 + n) n], scale [3]."""

    fn: Tensor
    base: Tensor
    scale: Tensor
    norm_eps: float
    hc_eps: float
    iterations: int


class _Collapse(torch.autograd.Function):
    """The streams are handed on to `expand`, so that their gradient arrives here whole and is added to in place."""

    @staticmethod
    def forward(
        ctx: Any,
        streams: Tensor,
        fn: Tensor,
        base: Tensor,
        scale: Tensor,
        norm_eps: float,
        hc_eps: float,
        iterations: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ops: Any = operators()
        streams, fn = streams.contiguous(), fn.contiguous()
        collapsed, post, residual, mix, inverse = ops.hc_collapse(
            streams, fn, base.contiguous(), scale.contiguous(), norm_eps, hc_eps, iterations
        )
        ctx.save_for_backward(streams, fn, base, scale, mix, inverse)
        ctx.settings = (hc_eps, iterations)
        return streams, collapsed, post, residual

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ops: Any = operators()
        streams, fn, base, scale, mix, inverse = ctx.saved_tensors
        grad_streams, grad_collapsed, grad_post, grad_residual = (grad.contiguous() for grad in grads)
        of_fn, logits = ops.hc_collapse_backward(
            grad_streams,
            streams,
            fn,
            base,
            scale,
            mix,
            inverse,
            grad_collapsed,
            grad_post,
            grad_residual,
            *ctx.settings,
        )
        return grad_streams, *_of_mapping(of_fn, logits, mix, len(streams)), None, None, None


def _of_mapping(of_fn: Tensor, logits: Tensor, mix: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of fn, base and scale from parts of the first [parts, rows, n D] and those of the logits [rows, N]."""
    of_scale = torch.linalg.vecdot(logits, mix).split([n, n, n * n])
    return of_fn.sum(0), logits.sum(1), torch.stack([part.sum() for part in of_scale])


def collapse(streams: Tensor, mapping: Mapping) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The streams [n, N, D], to hand to `expand`; block input [N, D], expansion weights [n, N], residual [n, n, N]."""
    return _run(_Collapse, streams, *mapping)


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, streams: Tensor, output: Tensor, post: Tensor, residual: Tensor) -> Tensor:
        ops: Any = operators()
        streams, output = streams.contiguous(), output.contiguous()
        ctx.save_for_backward(streams, output, post, residual)
        return ops.hc_expand(streams, output, post.contiguous(), residual.contiguous())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        ops: Any = operators()
        return ops.hc_expand_backward(grads[0].contiguous(), *ctx.saved_tensors)


def expand(streams: Tensor, output: Tensor, post: Tensor, residual: Tensor) -> Tensor:
    """The streams after the block, [n, N, D]."""
    return _run(_Expand, streams, output, post, residual)


class _ExpandCollapse(torch.autograd.Function):
    """Both in one, without the streams between them on the way back: their values are made again."""

    @staticmethod
    def forward(
        ctx: Any,
        streams: Tensor,
        output: Tensor,
        post: Tensor,
        residual: Tensor,
        fn: Tensor,
        base: Tensor,
        scale: Tensor,
        norm_eps: float,
        hc_eps: float,
        iterations: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ops: Any = operators()
        given = [tensor.contiguous() for tensor in (streams, output, post, residual, fn, base, scale)]
        *results, mix, inverse = ops.hc_expand_collapse(*given, norm_eps, hc_eps, iterations)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*given, mix, inverse)
        ctx.settings = (hc_eps, iterations)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ops: Any = operators()
        streams, output, post, residual, *mapping, mix, inverse = ctx.saved_tensors
        of_mixed, *of_site = (None if grad is None else grad.contiguous() for grad in grads)
        for index, like in enumerate((output, post, residual)):
            if of_site[index] is None:
                of_site[index] = torch.zeros_like(like)
        *of_inputs, of_fn, logits = ops.hc_expand_collapse_backward(
            of_mixed, *of_site, streams, output, post, residual, *mapping, mix, inverse, *ctx.settings
        )
        return *of_inputs, *_of_mapping(of_fn, logits, mix, len(streams)), None, None, None


def expand_collapse(
    streams: Tensor, output: Tensor, post: Tensor, residual: Tensor, mapping: Mapping
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`expand`, and `collapse` of the result by the next site's mapping: what that returns."""
    return _run(_ExpandCollapse, streams, output, post, residual, *mapping)


class Turns(NamedTuple):
    """Complex numbers as pairs [rows, P, 2], by which row r of a [R, C] tensor turns its last 2 P channels: those at
    index r // heads % rows; `back`: by their conjugates."""

    pairs: Tensor
    heads: int
    back: bool


def turns_of(x: Tensor, rotation: Tensor) -> Turns | None:
    """`rotation` (complex64, broadcasting against x[..., : P]) as the loops read it; None where it is laid out so that
    they cannot."""
    back = rotation.is_conj()
    plain = rotation.conj() if back else rotation
    lead, own = x.shape[:-1], plain.shape[:-1]
    heads = 1
    if len(own) and len(lead) and own[-1] == 1 and lead[-1] != 1:
        heads, lead, own = lead[-1], lead[:-1], own[:-1]
    while len(own) and own[0] == 1 and not (len(own) == len(lead) and lead[0] == 1):
        own = own[1:]
    if len(own) > len(lead) or own != lead[len(lead) - len(own) :]:
        return None
    pairs = torch.view_as_real(plain).to(x.dtype).reshape(-1, plain.shape[-1], 2).contiguous()
    return Turns(pairs, heads, back)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, turns: Turns | None, eps: float | None) -> Tensor:
        ops: Any = operators()
        x = x.contiguous()
        pairs, heads, back = turns if turns is not None else (None, 1, False)
        y, inverse = ops.norm(x, weight, pairs, heads, eps or 0.0, eps is not None, back)
        # A turn alone is undone without knowing what was turned.
        ctx.save_for_backward(x if eps is not None else None, weight, pairs, inverse if eps is not None else None)
        ctx.settings = (heads, back)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ops: Any = operators()
        x, weight, pairs, inverse = ctx.saved_tensors
        grad = grads[0].contiguous()
        wants_weight = weight is not None and ctx.needs_input_grad[1]
        grad_x, parts = ops.norm_backward(
            grad, grad if x is None else x, weight, pairs, inverse, *ctx.settings, wants_weight
        )
        return grad_x, parts.sum(0) if wants_weight else None, None, None


def norm_turn(x: Tensor, weight: Tensor | None, turns: Turns | None, eps: float | None) -> Tensor:
    """x [..., C] over its RMS (`eps` None: as it is), times `weight` [C], its last channels turned."""
    return _run(_Norm, x, weight, turns, eps)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, limit: float) -> Tensor:
        ops: Any = operators()
        gate, up = gate.contiguous(), None if up is None else up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.limit = limit
        return ops.swiglu(gate, up, limit)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ops: Any = operators()
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = ops.swiglu_backward(grads[0].contiguous(), gate, up, ctx.limit)
        return grad_gate, None if up is None else grad_up, None


def swiglu(gate: Tensor, up: Tensor | None, limit: float) -> Tensor:
    """As `opd.model.layers.swiglu`."""
    return _run(_Swiglu, gate, up, limit)


class _Affinity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, is_sigmoid: bool) -> Tensor:
        ops: Any = operators()
        y = ops.affinity(logits.contiguous(), is_sigmoid)
        ctx.save_for_backward(logits, y)
        ctx.is_sigmoid = is_sigmoid
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits, y = ctx.saved_tensors
        if ctx.is_sigmoid:
            return grads[0] * y * (1 - y), None
        # Far below zero y is e^(x / 2), of which the ratio has the limit zero.
        return grads[0] * torch.sigmoid(logits) / (2 * y).clamp_min(torch.finfo(y.dtype).tiny), None


def affinity(logits: Tensor, is_sigmoid: bool) -> Tensor:
    """sqrt(softplus(logits)), or their sigmoid."""
    return _run(_Affinity, logits, is_sigmoid)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ops: Any = operators()
        (places,) = ctx.saved_tensors
        return ops.gather(grads[0].contiguous(), places, None), None, None


def dispatch(x: Tensor, source: Tensor, places: Tensor) -> Tensor:
    """x [N, D] in the order of its copies: row r is x[source[r]], and token t's copies are rows places[t], [N, K]."""
    return _run(_Dispatch, x, source, places)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, places: Tensor) -> Tensor:
        ops: Any = operators()
        rows, weights = rows.contiguous(), weights.contiguous()
        ctx.save_for_backward(rows, weights, places)
        return ops.gather(rows, places, weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ops: Any = operators()
        rows, weights, places = ctx.saved_tensors
        grad_rows, grad_weights = ops.gather_backward(grads[0].contiguous(), rows, places, weights)
        return grad_rows, grad_weights, None


def combine(rows: Tensor, weights: Tensor, places: Tensor) -> Tensor:
    """sum_k weights[t, k] rows[places[t, k]]: [N K, D], [N, K], int64 [N, K], all places once -> [N, D]."""
    return _run(_Combine, rows, weights, places)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kv: Tensor, gate: Tensor, bias: Tensor, overlap: bool) -> Tensor:
        ops: Any = operators()
        given = kv.contiguous(), gate.contiguous(), bias.contiguous()
        ctx.save_for_backward(*given)
        ctx.overlap = overlap
        return ops.pool(*given, overlap)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ops: Any = operators()
        of_kv, of_gate, of_bias = ops.pool_backward(grads[0].contiguous(), *ctx.saved_tensors, ctx.overlap)
        return of_kv, of_gate, of_bias.sum(0), None


def pool(kv: Tensor, gate: Tensor, bias: Tensor, overlap: bool) -> Tensor:
    """Whole sequences, from position 0: kv and gate (without bias) [B, T, S], bias [m, S] -> pooled candidates of the
    complete blocks [B, T // m, C], before norm and RoPE; S is C, or 2 C with `overlap`."""
    return _run(_Pool, kv, gate, bias, overlap)


def mxfp4_values(x: Tensor) -> Tensor:
    """float32 [..., K], K a multiple of 32 -> the values of its MXFP4 codes, as `opd.fp4.fake_quantize` states them."""
    ops: Any = operators()
    return ops.mxfp4_values(x.contiguous())


def decode_attention(
    query: Tensor,
    own: Tensor,
    ring: Tensor,
    entries: Tensor | None,
    sinks: Tensor,
    *,
    slots: Tensor,
    starts: Tensor,
    lengths: Tensor,
    pages: Tensor,
    visible: Tensor,
    picks: Tensor | None,
    most_visible: int,
) -> Tensor:
    """New tokens of B sequences against the cache as it lies: [B, T, H, C], their keys [B, T, C] -> [B, T, H, C].

    Row b has lengths[b] tokens from position starts[b] on; the rest is padding and comes out zero. ring
    [slots, window, C] by position, without the new keys; entries [pages, per page, C], of which query t of row b may
    see the first visible[b, t] (at most `most_visible`) on pages[b], or those of picks [B, T, k], -1 for none. A token
    gets the same bits alone and in a chunk. No gradient.
    """
    ops: Any = operators()
    return ops.decode_attention(
        query.contiguous(), own.contiguous(), ring, entries, sinks, slots, starts, lengths, pages.contiguous(),
        visible.contiguous(), None if picks is None else picks.contiguous(), most_visible,
    )  # fmt: skip


def compress_step(
    kv: Tensor,
    gate: Tensor,
    bias: Tensor,
    ring_kv: Tensor,
    ring_gate: Tensor,
    slots: Tensor,
    starts: Tensor,
    lengths: Tensor,
    overlap: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """New tokens of B sequences enter a compressor's rings [slots, R, S], in place: lengths[b] from starts[b] on.

    kv, gate (without bias) [B, T, S], bias [m, S] -> of the blocks they complete: rows and block numbers int64 [n],
    pooled candidates [n, C], before norm and RoPE. No gradient.
    """
    ops: Any = operators()
    return ops.compress_step(
        kv.contiguous(),
        gate.contiguous(),
        bias,
        ring_kv,
        ring_gate,
        slots.contiguous(),
        starts.contiguous(),
        lengths.contiguous(),
        overlap,
    )


def expert_rows(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """int64 [N, K] -> the token of each copy, sorted by expert and within one by token [N K]; the places of a token's
    copies [N, K]; copies per expert [E]."""
    ops: Any = operators()
    return ops.expert_rows(chosen.contiguous(), experts)
