"""Student and teacher compared over the whole vocabulary, from hidden states: exact divergences with exact gradients.

The one idea: reverse KL, forward KL and their gradients need only sums that merge over parts of the vocabulary, so one
sweep over tiles of both logits gives every value, and a second one, in the backward, every gradient in closed form.
Jensen-Shannon mixes normalised probabilities, so its value takes one sweep more. V4 report 5.2.2 is the reason for it:
teachers send hidden states, and logits never exist.

In this file p is the student (policy) and q the teacher, z and u are their logits; a shape suffix N, D, U, V, K is the
legend of opd.types. Left out: how logits are cut and multiplied (`opd.logits`), and which divergence a run minimises
(`opd.distillation`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from opd.kernels import softmax as compiled
from opd.logits import (
    NATS,
    TILE_TOKENS,
    TILE_VOCAB,
    Logits,
    Shard,
    Tiling,
    check_head,
    check_ids,
    compute_dtype,
    gather_ids,
    scatter_ids,
    shift,
    view,
)
from opd.softmax import Pair, Softmax


@dataclass(slots=True, kw_only=True, frozen=True)
class Comparison:
    """Student p against teacher q, per token and in nats, of the tempered distributions.

    The first three are differentiable in the student's hidden states and head; the rest is detached.
    """

    reverse_kl: Tensor  # [N] KL(p || q); rounding may leave it slightly below zero
    forward_kl: Tensor  # [N] KL(q || p); the same
    student_logprobs: Tensor  # of the targets, in their shape
    teacher_logprobs: Tensor  # of the targets, in their shape
    student_entropy: Tensor  # [N]
    teacher_entropy: Tensor  # [N]
    top1_agree: Tensor  # bool [N]: the most likely token is the same one (under ties: they share one)


def compare(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    tile_tokens: int = TILE_TOKENS,
    tile_vocab: int = TILE_VOCAB,
    shard: Shard | None = None,
) -> Comparison:
    """Every divergence that one sweep over the vocabulary can give, each exact and with its exact gradient.

    student_hidden [N, D], student_head [V, D], teacher_hidden [N, U], teacher_head [V, U], targets int64 [N] or [N, K]:
    the ids whose log-probabilities are wanted. Both logits are divided by `temperature`; nothing is multiplied by its
    square. With upstream gradients r, f and g of reverse_kl, forward_kl and student_logprobs, that of the student's
    logits z is r p (log p/q - KL(p || q)) + f (p - q) + sum_k g_k (one_hot(target_k) - p), all divided by temperature.

    With a `shard`, the heads are this rank's rows of both, targets are ids of the whole vocabulary, and the ranks meet
    in a few all-reduces forward and one backward. Beyond gradients and a few numbers per token it holds four float32
    tiles of tile_tokens x tile_vocab, the tile's rows of both heads, and the logits themselves where they are few
    enough to fit into eight tiles. Rows of a padded vocabulary are the caller's to cut from both heads.

    The same tensors as student and teacher give divergences and gradients of exactly zero. Raises ValueError for shapes
    that do not fit, heads of different vocabularies, targets outside the vocabulary, and a teacher logit that is not
    finite. A student logit that is not finite gives NaN.
    """
    tiling = Tiling(temperature=temperature, tile_tokens=tile_tokens, tile_vocab=tile_vocab, shard=shard)
    return _compare(student_hidden, student_head, teacher_hidden, teacher_head, targets, tiling, None)[1]


def jensen_shannon(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    targets: Tensor,
    *,
    beta: float,
    temperature: float = 1.0,
    tile_tokens: int = TILE_TOKENS,
    tile_vocab: int = TILE_VOCAB,
    shard: Shard | None = None,
) -> tuple[Tensor, Comparison]:
    """Generalised Jensen-Shannon divergence [N] in nats, differentiable, beside what `compare` gives.

    beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p (GKD, arXiv 2306.13649), p the student and q
    the teacher; its gradient in z is (1 - beta) p (log p/m - KL(p || m)) / temperature. It goes to zero with beta and
    with 1 - beta, so ValueError is raised unless 0 < beta < 1. Arguments, memory and errors are those of `compare`,
    with one more sweep over the vocabulary.
    """
    if not 0.0 < beta < 1.0:
        raise ValueError(f"beta={beta} is not allowed; it must be above 0 and below 1")
    tiling = Tiling(temperature=temperature, tile_tokens=tile_tokens, tile_vocab=tile_vocab, shard=shard)
    return _compare(student_hidden, student_head, teacher_hidden, teacher_head, targets, tiling, beta)


def _compare(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    targets: Tensor,
    tiling: Tiling,
    beta: float | None,
) -> tuple[Tensor, Comparison]:
    check_head("student_", student_hidden, student_head)
    check_head("teacher_", teacher_hidden, teacher_head)
    check_ids(targets, len(student_hidden), "student_", student_head, tiling)
    if student_head.shape[0] != teacher_head.shape[0]:
        raise ValueError(
            f"student_head has a vocabulary of {student_head.shape[0]}, teacher_head one of {teacher_head.shape[0]}; "
            "a comparison over the whole vocabulary needs the same tokens in both"
        )
    if len(teacher_hidden) != len(student_hidden):
        raise ValueError(
            f"student_hidden has {len(student_hidden)} tokens and teacher_hidden has {len(teacher_hidden)}; they must "
            "have one row for each token"
        )
    ids = targets if targets.dim() == 2 else targets[:, None]
    reverse, forward, mixed, logprobs, teacher_logprobs, entropy, teacher_entropy, agree = _Compare.apply(
        student_hidden, student_head, teacher_hidden, teacher_head, ids, tiling, beta
    )
    return mixed, Comparison(
        reverse_kl=reverse,
        forward_kl=forward,
        student_logprobs=logprobs.view(targets.shape),
        teacher_logprobs=teacher_logprobs.view(targets.shape),
        student_entropy=entropy,
        teacher_entropy=teacher_entropy,
        top1_agree=agree,
    )


class _Compare(torch.autograd.Function):
    """Forward: the sums of a sweep (and of a second one for `beta`). Backward: the sweep again, or its kept tiles."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_head: Tensor,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        ids: Tensor,
        tiling: Tiling,
        beta: float | None,
    ) -> tuple[Tensor, ...]:
        inputs = (student_hidden, student_head, teacher_hidden, teacher_head, ids)
        keeps = tiling.keeps(len(student_hidden), len(student_head)) and (any(ctx.needs_input_grad) or beta is not None)
        sweep = _Sweep(inputs, tiling, keeps)
        sums = sweep.sums()
        reverse, forward = sums.reverse_kl(), sums.forward_kl()
        if not (reverse.isfinite() & forward.isfinite()).all():
            sweep.teacher.refuse_infinite()
        columns = (sums.student.top, sums.teacher.top, sums.student.mass, sums.teacher.mass, reverse)
        mixed, from_student = torch.zeros_like(reverse), torch.zeros_like(reverse)
        if beta is not None:
            from_student, from_teacher = sweep.to_mixture(columns, beta)
            mixed = beta * from_teacher + (1.0 - beta) * from_student
        ctx.tiling, ctx.beta = tiling, beta
        ctx.set_materialize_grads(False)
        kept = [tensor for tile in sweep.kept for tensor in tile]
        ctx.save_for_backward(*inputs, *columns, from_student, *kept)
        detached = (
            sums.teacher.logprobs(),
            sums.student.entropy(),
            sums.teacher.entropy(),
            sums.agree > 0,
        )
        ctx.mark_non_differentiable(*detached)
        return reverse * NATS, forward * NATS, mixed, sums.student.logprobs(), *detached

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        inputs, columns, from_student, kept = saved[:5], saved[5:10], saved[10], saved[11:]
        sweep = _Sweep(inputs, ctx.tiling, False)
        sweep.kept = [(kept[i], kept[i + 1], kept[i + 2], kept[i + 3]) for i in range(0, len(kept), 4)]
        needs = ctx.needs_input_grad
        gradients = sweep.gradients(columns, from_student, ctx.beta, grad_outputs[:4], needs[0], needs[1])
        return *gradients, None, None, None, None, None


class _Sweep:
    """Both sides' logits, tile by tile, in memory that is used again (or in `kept`, for the next sweep to find)."""

    def __init__(self, inputs: Sequence[Tensor], tiling: Tiling, keeps: bool) -> None:
        *self.inputs, self.ids = inputs
        student_hidden, student_head, teacher_hidden, teacher_head = self.inputs
        self.fused = _fused(self.inputs)
        self.tiling, self.keeps = tiling, keeps and self.fused is None
        self.dtype = compute_dtype(*inputs[:4])
        self.student = Logits(student_hidden, student_head, tiling, self.dtype)
        self.teacher = Logits(teacher_hidden, teacher_head, tiling, self.dtype)
        self.scratch = self.student.scratch(4)
        self.kept: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # z, u (shifted) and their tops, in sweep order

    def sums(self) -> Pair:
        """Of all tiles and ranks."""
        if self.fused is not None:
            return self._fused_sums(self.fused).over_ranks(self.tiling)
        totals: list[Pair] = []
        for vocab in self.student.vocab:
            self.student.enter(vocab)
            self.teacher.enter(vocab)
            for index, tokens in enumerate(self.student.tokens):
                z = self.student.tile(tokens, None if self.keeps else self.scratch[0])
                u = self.teacher.tile(tokens, None if self.keeps else self.scratch[1])
                part = self._reduce(z, u, self.student.local(self.ids, tokens))
                if self.keeps:
                    self.kept.append((z, u, part.student.top, part.teacher.top))
                if vocab.start == 0:
                    totals.append(part)
                else:
                    totals[index] = totals[index].merge(part)
        return Pair.of_rows(totals).over_ranks(self.tiling)

    def to_mixture(self, columns: Sequence[Tensor], beta: float) -> tuple[Tensor, Tensor]:
        """KL(p || m) and KL(q || m) [N] in nats, m = beta q + (1 - beta) p."""
        from_student, from_teacher = torch.zeros_like(columns[0]), torch.zeros_like(columns[0])
        gap = columns[2].log2() - columns[3].log2()
        tile = 0
        for vocab in self.student.vocab:
            self._enter(vocab, with_teacher=True)
            for tokens in self.student.tokens:
                z, u = self._relative(tokens, columns, tile, with_teacher=True)
                log_ratio = (z - u).sub_(gap[tokens, None]).mul_(NATS)  # log p/q
                p, q = z.exp2_().div_(columns[2][tokens, None]), u.exp2_().div_(columns[3][tokens, None])
                from_student[tokens] -= p.mul_(_log_mixture(-log_ratio, beta)).sum(dim=-1)
                from_teacher[tokens] -= q.mul_(_log_mixture(log_ratio, 1.0 - beta)).sum(dim=-1)
                tile += 1
        from_student, from_teacher = self.tiling.sum_over_ranks([from_student, from_teacher])
        return from_student, from_teacher

    def gradients(
        self,
        columns: Sequence[Tensor],
        from_student: Tensor,
        beta: float | None,
        upstream: Sequence[Tensor | None],
        needs_hidden: bool,
        needs_head: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Of the student's hidden states and head, given those of reverse_kl, forward_kl, mixture and logprobs.

        With z and u relative to each row's largest, p = 2^z / mass_z and q = 2^u / mass_u.
        """
        by_reverse, by_forward, by_mixture, by_logprobs = (
            None if gradient is None else gradient.to(self.dtype) for gradient in upstream
        )
        mass_z, mass_u, reverse_kl = columns[2:5]
        gap = mass_z.log2() - mass_u.log2()
        # The gradient is 2^z (slope (z - u - offset) + constant) - 2^u teacher_slope; a mixture and the ids add theirs.
        # Logits are in bits: one factor ln 2 for that, and another where the gradient has a log-ratio in bits in it.
        offset, constant = reverse_kl + gap, torch.zeros_like(mass_z)
        slope = None if by_reverse is None else by_reverse * (NATS**2 / mass_z)
        teacher_slope = None if by_forward is None else by_forward * (NATS / mass_u)
        if by_forward is not None:
            constant += by_forward
        if by_logprobs is not None:
            constant -= by_logprobs.sum(dim=-1)
        constant *= NATS / mass_z
        self.student.start_gradients(needs_hidden, needs_head)
        with_teacher = not (by_reverse is None and by_forward is None and by_mixture is None)
        fused = self.fused if with_teacher and by_mixture is None else None
        none = torch.zeros_like(offset)
        slopes = (none if slope is None else slope, constant, none if teacher_slope is None else teacher_slope)
        rows = torch.stack([*columns[:2], offset, *slopes])
        tile = 0
        for vocab in self.student.vocab:
            self._enter(vocab, with_teacher and fused is None)
            for tokens in self.student.tokens:
                if fused is not None:
                    gradient = self._fused_gradient(fused, tokens, vocab, rows)
                elif by_mixture is None and compiled.usable(self.scratch[0]):
                    z, u, *tops = self._tiles(tokens, columns, tile, with_teacher)
                    numbers = torch.cat((torch.stack(tops), rows[2:, tokens]))
                    out = view(self.scratch[2], (z.shape[0], z.shape[1]))
                    gradient = compiled.pair_gradient(z, u, numbers, teacher_slope is not None, out)
                else:
                    z, u = self._relative(tokens, columns, tile, with_teacher)
                    factor = constant[tokens, None]
                    if slope is not None:
                        term = torch.sub(z, u, out=view(self.scratch[2], (z.shape[0], z.shape[1])))
                        term.sub_(offset[tokens, None]).mul_(slope[tokens, None])
                        factor = term if by_forward is None and by_logprobs is None else term.add_(factor)
                    if by_mixture is not None and beta is not None:
                        mixture_slope = (by_mixture * ((beta - 1.0) * NATS / mass_z))[tokens, None]
                        log_q_over_p = (u - z).add_(gap[tokens, None]).mul_(NATS)
                        term = _log_mixture(log_q_over_p, beta).add_(from_student[tokens, None])
                        factor = term.mul_(mixture_slope).add_(factor)
                    gradient = z.exp2_().mul_(factor)
                    if teacher_slope is not None:
                        gradient.sub_(u.exp2_().mul_(teacher_slope[tokens, None]))
                if by_logprobs is not None:
                    scatter_ids(gradient, self.student.local(self.ids, tokens), by_logprobs[tokens] * NATS)
                self.student.add_gradient(tokens, gradient)
                tile += 1
            self.student.leave()
        return self.student.gradients()

    def _fused_sums(self, fused: ModuleType) -> Pair:
        """The sums of this rank's vocabulary by a kernel that holds no logits; those of the ids by products of rows."""
        found = fused.sums(*self.inputs, self.tiling.scale)
        none = found.new_zeros(found.shape[2], 0)
        total = reduce(Pair.merge, [_pair(part.unbind(), none, none) for part in found.unbind(1)])
        total.student.at_ids, total.teacher.at_ids = self.student.at_ids(self.ids), self.teacher.at_ids(self.ids)
        return total

    def _fused_gradient(self, fused: ModuleType, tokens: slice, vocab: slice, rows: Tensor) -> Tensor:
        student_hidden, student_head, teacher_hidden, teacher_head = self.inputs
        out = view(self.scratch[0], (tokens.stop - tokens.start, vocab.stop - vocab.start))
        sides = student_hidden[tokens], student_head[vocab], teacher_hidden[tokens], teacher_head[vocab]
        return fused.logit_gradient(*sides, self.tiling.scale, rows[:, tokens], out)

    def _enter(self, vocab: slice, with_teacher: bool) -> None:
        self.student.enter(vocab)
        if with_teacher and not self.kept:
            self.teacher.enter(vocab)

    def _relative(
        self, tokens: slice, columns: Sequence[Tensor], tile: int, with_teacher: bool
    ) -> tuple[Tensor, Tensor]:
        """z and u of a tile relative to the largest logits of the whole row, in scratch memory; u may be left as is."""
        z, u, top_z, top_u = self._tiles(tokens, columns, tile, with_teacher)
        shape = (z.shape[0], z.shape[1])
        z = torch.sub(z, top_z[:, None], out=view(self.scratch[0], shape))
        return z, torch.sub(u, top_u[:, None], out=view(self.scratch[1], shape)) if with_teacher else z

    def _tiles(
        self, tokens: slice, columns: Sequence[Tensor], tile: int, with_teacher: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """z and u of a tile, kept or made again in scratch memory, and what is yet to be taken off each row [n]."""
        top_z, top_u = columns[0][tokens], columns[1][tokens]
        if self.kept:
            z, u, tile_top_z, tile_top_u = self.kept[tile]
            return z, u, top_z - tile_top_z, top_u - tile_top_u
        z = self.student.tile(tokens, self.scratch[0])
        return z, self.teacher.tile(tokens, self.scratch[1]) if with_teacher else z, top_z, top_u

    def _reduce(self, z: Tensor, u: Tensor, local_ids: Tensor) -> Pair:
        """The sums of a tile; z and u are left relative to each row's largest of the tile."""
        shape = (z.shape[0], z.shape[1])
        z_ids, u_ids = gather_ids(z, local_ids), gather_ids(u, local_ids)
        if compiled.usable(z):
            return _pair(compiled.pair_sums(z, u), z_ids, u_ids)
        weight, product = view(self.scratch[2], shape), view(self.scratch[3], shape)
        z_top, u_top = shift(z), shift(u)
        # Both are at most 0, and 0 only at their maximum: a sum of 0 is a maximum of both.
        agree = (torch.add(z, u, out=product).amax(dim=-1) == 0).to(z.dtype)
        u_mass = torch.exp2(u, out=weight).sum(dim=-1)
        u_moment = torch.mul(weight, u, out=product).sum(dim=-1)
        forward = torch.sub(u, z, out=product).mul_(weight).sum(dim=-1)
        z_mass = torch.exp2(z, out=weight).sum(dim=-1)
        z_moment = torch.mul(weight, z, out=product).sum(dim=-1)
        reverse = torch.sub(z, u, out=product).mul_(weight).sum(dim=-1)
        student, teacher = Softmax(z_top, z_mass, z_moment, z_ids), Softmax(u_top, u_mass, u_moment, u_ids)
        return Pair(student, teacher, reverse, forward, agree)


def _pair(sums: Sequence[Tensor], z_ids: Tensor, u_ids: Tensor) -> Pair:
    """What a kernel gives in this order."""
    z_top, u_top, z_mass, u_mass, z_moment, u_moment, reverse, forward, agree = sums
    student, teacher = Softmax(z_top, z_mass, z_moment, z_ids), Softmax(u_top, u_mass, u_moment, u_ids)
    return Pair(student, teacher, reverse, forward, agree)


def _fused(inputs: Sequence[Tensor]) -> ModuleType | None:
    """The kernels that keep logits out of memory, where they are of use: they multiply bfloat16 on tensor cores."""
    if all(tensor.is_cuda and tensor.dtype == torch.bfloat16 for tensor in inputs) and find_spec("triton"):
        from opd.kernels import triton_kl  # needs triton to be imported

        return triton_kl
    return None


def _log_mixture(log_ratio: Tensor, share: float) -> Tensor:
    """log(1 - share + share e^x) in nats of a tile, exactly 0 at x = 0; in new memory."""
    large = log_ratio > 40.0  # where e^x alone counts, and may overflow
    return torch.where(large, log_ratio + math.log(share), (share * log_ratio.clamp(max=40.0).expm1()).log1p())
