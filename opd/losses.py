"""Losses from hidden states: exact full-vocabulary reverse KL, log-probabilities, GRPO, and the train/sampler gap.

The one idea: logits never exist. A tile of tokens by vocabulary entries is multiplied out, reduced to a few numbers per
token that parts of the vocabulary can be merged from, and dropped; the backward multiplies it out again. Every value is
a sum over tokens; the caller divides by a count taken over the whole step (negative log-likelihood is
`-(weights * logprobs).sum()`).

Heads are multiplied in float32 with float32 logits whatever the inputs' dtype (float64 if an input is float64):
rounding logits to bfloat16 would cost several per cent of the KL. In this file p is the student (policy) and q the
teacher, z and u are their logits divided by the temperature, and a shape suffix N, D, U, V is the legend of opd.types.

Left out: which state predicts which token (opd.batching), teacher weights w_i (part of `weights`), fused kernels. Long
for one file, because the two hand-written gradients share their tiles and nothing else should see these.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_MAX_LOG_RATIO = 20.0  # a log-ratio is clamped to +-this before exp, which keeps ratios and their squares finite


@dataclass(slots=True, kw_only=True, frozen=True)
class KlResult:
    """`loss` is differentiable, the rest is detached and per token. All in nats, of the tempered distributions."""

    loss: Tensor  # scalar: sum_t weights_t * KL_t
    kl: Tensor  # [N] KL(p || q); rounding may leave it slightly below zero
    student_entropy: Tensor  # [N]
    teacher_entropy: Tensor  # [N]
    student_logprobs: Tensor  # [N] of the targets
    teacher_logprobs: Tensor  # [N] of the targets
    top1_agree: Tensor  # bool [N]: the most likely token is the same one (under ties: they share one)


@dataclass(slots=True, kw_only=True, frozen=True)
class GrpoResult:
    """`loss` is differentiable, the rest is detached and per token."""

    loss: Tensor  # scalar: sum_t weights_t * (kl_coefficient * reference_kl_t - surrogate_t)
    ratio: Tensor  # [N] policy / sampler probability of the token
    clipped: Tensor  # bool [N]: the clip is in force, the surrogate gives this token no gradient
    reference_kl: Tensor  # [N] unbiased estimate of KL(policy || reference); zeros without a reference


@dataclass(slots=True)
class _Softmax:
    """Softmax of n rows over a part of the vocabulary, relative to each row's largest logit: nothing overflows."""

    top: Tensor  # [n] m, the largest logit
    mass: Tensor  # [n] sum of e^(z-m)
    moment: Tensor  # [n] sum of e^(z-m) (z-m)
    target: Tensor  # [n] logit of the target, 0 if it lies in another part

    def merge(self, other: _Softmax) -> _Softmax:
        top = torch.maximum(self.top, other.top)
        mass, moment = torch.zeros_like(top), torch.zeros_like(top)
        for part in (self, other):
            shift = part.top - top
            scale = shift.exp()
            mass += scale * part.mass
            moment += scale * (part.moment + part.mass * shift)
        return _Softmax(top, mass, moment, self.target + other.target)

    def logprobs(self) -> Tensor:
        return (self.target - self.top) - self.mass.log()

    def entropy(self) -> Tensor:
        return self.mass.log() - self.moment / self.mass


@dataclass(slots=True)
class _Comparison:
    """Student and teacher over the same part of the vocabulary."""

    student: _Softmax  # p
    teacher: _Softmax  # q
    cross: Tensor  # [n] sum of e^(z-m_z) ((z-m_z) - (u-m_u)): differences first, so that close logits do not cancel
    top1_agree: Tensor  # bool [n]: some entry is the largest of both

    def merge(self, other: _Comparison) -> _Comparison:
        student, teacher = self.student.merge(other.student), self.teacher.merge(other.teacher)
        cross, agree = torch.zeros_like(self.cross), torch.zeros_like(self.top1_agree)
        for part in (self, other):
            student_shift, teacher_shift = part.student.top - student.top, part.teacher.top - teacher.top
            cross += student_shift.exp() * (part.cross + part.student.mass * (student_shift - teacher_shift))
            agree |= part.top1_agree & (student_shift == 0) & (teacher_shift == 0)
        return _Comparison(student, teacher, cross, agree)

    def log_mass_gap(self) -> Tensor:
        return self.student.mass.log() - self.teacher.mass.log()

    def kl(self) -> Tensor:
        return self.cross / self.student.mass - self.log_mass_gap()


def reverse_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    weights: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    tile_tokens: int = 1024,
    tile_vocab: int = 8192,
) -> KlResult:
    """Exact KL(p || q) = sum_v p_v (log p_v - log q_v) over the whole vocabulary, p the student and q the teacher.

    student_hidden [N, D], student_head [V, D], teacher_hidden [N, U], teacher_head [V, U], weights [N], targets int64
    [N] (only for the log-probabilities that are reported). Both logits are divided by `temperature`; the loss is not
    multiplied by its square. Gradients reach student_hidden and student_head alone. Beyond gradients and a few numbers
    per token it holds three float32 tiles of tile_tokens x tile_vocab, and the tile's rows of a head that is not
    float32. Rows of a padded vocabulary are the caller's to cut from both heads.

    The same tensors as student and teacher give a KL and gradients of exactly zero. Raises ValueError for shapes that
    do not fit, heads of different vocabularies, targets outside the vocabulary, and a teacher logit that is not finite.
    A student logit that is not finite gives a NaN loss.
    """
    _check_inputs("student_", student_hidden, student_head, targets, temperature, tile_tokens, tile_vocab)
    _check_head("teacher_", teacher_hidden, teacher_head)
    if student_head.shape[0] != teacher_head.shape[0]:
        raise ValueError(
            f"student_head has a vocabulary of {student_head.shape[0]}, teacher_head one of {teacher_head.shape[0]}; "
            "full-vocabulary KL needs the same tokens in both"
        )
    if len(teacher_hidden) != len(student_hidden) or weights.shape != student_hidden.shape[:1]:
        raise ValueError(
            f"student_hidden has {len(student_hidden)} tokens, teacher_hidden has {len(teacher_hidden)} and weights "
            f"has shape {tuple(weights.shape)}; all three must have one row for each token"
        )
    loss, *per_token = _ReverseKl.apply(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        weights,
        targets,
        temperature,
        tile_tokens,
        tile_vocab,
    )
    kl, student_entropy, teacher_entropy, student_logprobs, teacher_logprobs, top1_agree = per_token
    return KlResult(
        loss=loss,
        kl=kl,
        student_entropy=student_entropy,
        teacher_entropy=teacher_entropy,
        student_logprobs=student_logprobs,
        teacher_logprobs=teacher_logprobs,
        top1_agree=top1_agree,
    )


def token_logprobs(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    tile_tokens: int = 1024,
    tile_vocab: int = 8192,
) -> tuple[Tensor, Tensor]:
    """log p(target) [N], differentiable in hidden [N, D] and head [V, D], and the entropy of p [N], detached.

    targets int64 [N]; p is the softmax of the logits divided by `temperature`. Memory as for `reverse_kl`. Raises
    ValueError for shapes that do not fit and targets outside the vocabulary.
    """
    _check_inputs("", hidden, head, targets, temperature, tile_tokens, tile_vocab)
    logprobs, entropy = _TokenLogprobs.apply(hidden, head, targets, temperature, tile_tokens, tile_vocab)
    return logprobs, entropy


def logsumexp_at(hidden: Tensor, head: Tensor, *, tile_vocab: int = 8192) -> Tensor:
    """Log-sum-exp [n] of the logits of a few states: hidden [n, U], head [V, U]. No gradient, no temperature."""
    _check_head("", hidden, head)
    with torch.no_grad():
        rows = hidden.to(_compute_dtype(hidden, head))
        total = rows.new_full((len(rows),), -torch.inf)
        for vocab in _tiles(head.shape[0], tile_vocab):
            total = torch.logaddexp(total, _logits(rows, head[vocab], 1.0).logsumexp(dim=-1))
        return total


def grpo_loss(
    policy_logprobs: Tensor,
    sampler_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    clip: float,
    reference_logprobs: Tensor | None = None,
    kl_coefficient: float = 0.0,
) -> GrpoResult:
    """GRPO as scaled in DeepSeek-V3.2 (section 3.1), as a loss to minimise. All tensors [N], log-probs of the tokens.

    Surrogate min(r A, clip(r, 1 - clip, 1 + clip) A) with r = policy / sampler. The KL term is
    rho * (reference/policy - log(reference/policy) - 1) with rho = r differentiated: its gradient,
    rho * log(policy/reference) * grad log policy, is in expectation under the sampler that of KL(policy || reference).
    Log-ratios are clamped to +-20, and beyond that give no gradient. Raises ValueError for a kl_coefficient without
    reference_logprobs; a reference with coefficient 0 is measured and not trained towards.
    """
    if reference_logprobs is None and kl_coefficient != 0.0:
        raise ValueError(f"kl_coefficient={kl_coefficient} needs reference_logprobs; pass them, or kl_coefficient=0")
    ratio = (policy_logprobs - sampler_logprobs).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    surrogate = ratio * advantages
    clipped_surrogate = ratio.clamp(1.0 - clip, 1.0 + clip) * advantages
    loss = -(weights * torch.minimum(surrogate, clipped_surrogate)).sum()
    if reference_logprobs is None:
        reference_kl = torch.zeros_like(ratio)
    else:
        gap = (reference_logprobs - policy_logprobs).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
        reference_kl = ratio * (gap.expm1() - gap)
        loss = loss + kl_coefficient * (weights * reference_kl).sum()
    return GrpoResult(
        loss=loss,
        ratio=ratio.detach(),
        clipped=(clipped_surrogate < surrogate).detach(),
        reference_kl=reference_kl.detach(),
    )


def group_advantages(rewards: Sequence[float]) -> list[float]:
    """Reward minus the mean reward of its group; not divided by the standard deviation (DeepSeek-V3.2, section 3.1).

    The mean is rounded once, so equal rewards give exactly zero. Raises ValueError for an empty group.
    """
    if not rewards:
        raise ValueError("rewards is empty; a group has at least one trajectory")
    mean = statistics.mean(map(float, rewards))
    return [reward - mean for reward in rewards]


def sampler_gap(policy_logprobs: Tensor, sampler_logprobs: Tensor) -> dict[str, float]:
    """How far the policy is from the sampler on tokens [N] that the sampler drew, as numbers that ranks can merge.

    Everything is a sum over tokens, except `max_gap`, which is merged by max. With r = policy / sampler: num_tokens;
    k1, sum of log sampler - log policy, and k3, sum of r - 1 - log r, which both estimate KL(sampler || policy); ratio
    and ratio_squared, sums of r and r^2; num_outside, count of r outside [0.5, 2]; max_gap, largest |log r|. Log-ratios
    are clamped to +-20 except in k1 and max_gap.
    """
    with torch.no_grad():
        log_ratio = policy_logprobs.double() - sampler_logprobs.double()
        clamped = log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
        ratio = clamped.exp()
        return {
            "num_tokens": float(log_ratio.numel()),
            "k1": -log_ratio.sum().item(),
            "k3": (clamped.expm1() - clamped).sum().item(),
            "ratio": ratio.sum().item(),
            "ratio_squared": ratio.square().sum().item(),
            "num_outside": float(((ratio < 0.5) | (ratio > 2.0)).sum().item()),
            "max_gap": log_ratio.abs().max().item() if log_ratio.numel() else 0.0,
        }


class _ReverseKl(torch.autograd.Function):
    """Gradient of KL in z: p ((z - lse_z) - (u - lse_u) - KL). One tile keeps it, several are made again backward."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_head: Tensor,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        weights: Tensor,
        targets: Tensor,
        temperature: float,
        tile_tokens: int,
        tile_vocab: int,
    ) -> tuple[Tensor, ...]:
        dtype = _compute_dtype(student_hidden, student_head, teacher_hidden, teacher_head)
        num_tokens, vocab_size = len(student_hidden), len(student_head)
        keep_gradient = num_tokens <= tile_tokens and vocab_size <= tile_vocab and any(ctx.needs_input_grad)
        gradient: Tensor | None = None
        parts: list[_Comparison] = []
        for tokens in _tiles(num_tokens, tile_tokens):
            p_states, q_states = student_hidden[tokens].to(dtype), teacher_hidden[tokens].to(dtype)
            total: _Comparison | None = None
            for vocab in _tiles(vocab_size, tile_vocab):
                part, gradient = _compare(
                    _logits(p_states, student_head[vocab], temperature),
                    _logits(q_states, teacher_head[vocab], temperature),
                    targets[tokens] - vocab.start,
                    keep_gradient,
                )
                total = part if total is None else total.merge(part)
            assert total is not None
            parts.append(total)

        nothing = student_hidden.new_empty(0, dtype=dtype)  # makes N = 0 an ordinary case

        def column(values: Iterable[Tensor]) -> Tensor:
            return torch.cat([nothing, *values])

        kl = column(part.kl() for part in parts)
        if not kl.isfinite().all():
            _refuse_bad_teacher(teacher_hidden, teacher_head, tile_tokens, tile_vocab, dtype)
        weights = weights.to(dtype)
        ctx.tiling = (temperature, tile_tokens, tile_vocab, dtype)
        if keep_gradient:
            ctx.save_for_backward(student_hidden, student_head, weights, nothing if gradient is None else gradient)
        else:
            tops = (column(part.student.top for part in parts), column(part.teacher.top for part in parts))
            offsets = kl + column(part.log_mass_gap() for part in parts)
            log_mass = column(part.student.mass.log() for part in parts)
            ctx.save_for_backward(
                student_hidden, student_head, weights, teacher_hidden, teacher_head, *tops, log_mass, offsets
            )
        per_token = (
            kl,
            column(part.student.entropy() for part in parts),
            column(part.teacher.entropy() for part in parts),
            column(part.student.logprobs() for part in parts),
            column(part.teacher.logprobs() for part in parts),
            torch.cat([nothing.bool(), *(part.top1_agree for part in parts)]),
        )
        ctx.mark_non_differentiable(*per_token)
        return (weights * kl).sum(), *per_token

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        temperature, tile_tokens, tile_vocab, dtype = ctx.tiling
        student_hidden, student_head, weights, *saved = ctx.saved_tensors

        def logit_gradient(tokens: slice, vocab: slice) -> Tensor:
            if len(saved) == 1:
                return saved[0]
            teacher_hidden, teacher_head, *rows = saved
            top_z, top_u, log_mass, offsets = (row[tokens, None] for row in rows)
            z = _logits(student_hidden[tokens].to(dtype), student_head[vocab], temperature).sub_(top_z)
            u = _logits(teacher_hidden[tokens].to(dtype), teacher_head[vocab], temperature).sub_(top_u)
            difference = torch.sub(z, u, out=u).sub_(offsets)
            return z.sub_(log_mass).exp_().mul_(difference)

        row_scale = weights * (grad_outputs[0] / temperature)
        needs = ctx.needs_input_grad
        gradients = _backpropagate(
            student_hidden, student_head, needs[0], needs[1], logit_gradient, row_scale, tile_tokens, tile_vocab
        )
        return *gradients, *[None] * 7


class _TokenLogprobs(torch.autograd.Function):
    """Gradient of log p(target) in z: one_hot(target) - p. One tile keeps it, as above."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, temperature: float, tile_tokens: int, tile_vocab: int
    ) -> tuple[Tensor, Tensor]:
        dtype = _compute_dtype(hidden, head)
        num_tokens, vocab_size = len(hidden), len(head)
        keep_gradient = num_tokens <= tile_tokens and vocab_size <= tile_vocab and any(ctx.needs_input_grad)
        gradient: Tensor | None = None
        parts: list[_Softmax] = []
        for tokens in _tiles(num_tokens, tile_tokens):
            states = hidden[tokens].to(dtype)
            total: _Softmax | None = None
            for vocab in _tiles(vocab_size, tile_vocab):
                part, gradient = _summarise(
                    _logits(states, head[vocab], temperature), targets[tokens] - vocab.start, keep_gradient
                )
                total = part if total is None else total.merge(part)
            assert total is not None
            parts.append(total)
        nothing = hidden.new_empty(0, dtype=dtype)
        logprobs = torch.cat([nothing, *(part.logprobs() for part in parts)])
        entropy = torch.cat([nothing, *(part.entropy() for part in parts)])
        ctx.tiling = (temperature, tile_tokens, tile_vocab, dtype)
        if keep_gradient:
            ctx.save_for_backward(hidden, head, nothing if gradient is None else gradient)
        else:
            top = torch.cat([nothing, *(part.top for part in parts)])
            log_mass = torch.cat([nothing, *(part.mass.log() for part in parts)])
            ctx.save_for_backward(hidden, head, targets, top, log_mass)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        temperature, tile_tokens, tile_vocab, dtype = ctx.tiling
        hidden, head, *saved = ctx.saved_tensors

        def logit_gradient(tokens: slice, vocab: slice) -> Tensor:
            if len(saved) == 1:
                return saved[0]
            targets, top, log_mass = (row[tokens] for row in saved)
            z = _logits(hidden[tokens].to(dtype), head[vocab], temperature)
            p = z.sub_(top[:, None]).sub_(log_mass[:, None]).exp_()
            return _one_hot_minus(p, targets - vocab.start)

        row_scale = grad_outputs[0].to(dtype) / temperature
        needs = ctx.needs_input_grad
        gradients = _backpropagate(hidden, head, needs[0], needs[1], logit_gradient, row_scale, tile_tokens, tile_vocab)
        return *gradients, *[None] * 4


def _backpropagate(
    hidden_ND: Tensor,
    head_VD: Tensor,
    needs_hidden: bool,
    needs_head: bool,
    logit_gradient: Callable[[slice, slice], Tensor],
    row_scale_N: Tensor,
    tile_tokens: int,
    tile_vocab: int,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of hidden and head when that of logits hidden @ head.T is row_scale * logit_gradient(tokens, vocab).

    Summed over tiles in the dtype of row_scale, returned in those of hidden and head; None for what is not needed. The
    scale goes to the rows of width D, which are narrower than those of width V.
    """
    dtype = row_scale_N.dtype
    hidden_grad = torch.zeros_like(hidden_ND, dtype=dtype) if needs_hidden else None
    head_grad = torch.zeros_like(head_VD, dtype=dtype) if needs_head else None
    for tokens in _tiles(len(hidden_ND), tile_tokens):
        scale_n1 = row_scale_N[tokens, None]
        scaled_nD = hidden_ND[tokens].to(dtype) * scale_n1
        for vocab in _tiles(len(head_VD), tile_vocab):
            gradient_nv = logit_gradient(tokens, vocab)
            if hidden_grad is not None:
                hidden_grad[tokens].addmm_(gradient_nv, head_VD[vocab].to(dtype))
            if head_grad is not None:
                head_grad[vocab].addmm_(gradient_nv.T, scaled_nD)
            del gradient_nv  # or it would still be there while the next tile is made
        if hidden_grad is not None:
            hidden_grad[tokens] *= scale_n1
    return (
        None if hidden_grad is None else hidden_grad.to(hidden_ND.dtype),
        None if head_grad is None else head_grad.to(head_VD.dtype),
    )


def _compare(z: Tensor, u: Tensor, local_targets: Tensor, with_gradient: bool) -> tuple[_Comparison, Tensor | None]:
    """What is kept of a tile of both logits [n, v], and if asked the gradient of KL in z (of a tile that is all of V).

    Overwrites z and u and makes one further tile, so that three are alive at once.
    """
    z_target, u_target = _at_targets(z, local_targets), _at_targets(u, local_targets)
    z_top, u_top = _shift(z), _shift(u)
    exp = u.exp()
    u_mass = exp.sum(dim=-1)
    teacher = _Softmax(u_top, u_mass, exp.mul_(u).sum(dim=-1), u_target)
    # Shifted logits are at most 0, and 0 only at the maximum: a sum of 0 is a maximum of both.
    top1_agree = torch.add(z, u, out=exp).amax(dim=-1) == 0
    z_mass = torch.exp(z, out=exp).sum(dim=-1)
    difference = torch.sub(z, u, out=u)
    student = _Softmax(z_top, z_mass, z.mul_(exp).sum(dim=-1), z_target)
    cross = torch.mul(exp, difference, out=z).sum(dim=-1)
    comparison = _Comparison(student, teacher, cross, top1_agree)
    if not with_gradient:
        return comparison, None
    offset = comparison.kl() + comparison.log_mass_gap()
    return comparison, exp.div_(z_mass[:, None]).mul_(difference.sub_(offset[:, None]))


def _summarise(z: Tensor, local_targets: Tensor, with_gradient: bool) -> tuple[_Softmax, Tensor | None]:
    """What is kept of a tile of logits [n, v], and if asked the gradient of log p(target) in them. Overwrites z."""
    target = _at_targets(z, local_targets)
    top = _shift(z)
    exp = z.exp()
    mass = exp.sum(dim=-1)
    part = _Softmax(top, mass, z.mul_(exp).sum(dim=-1), target)
    return part, _one_hot_minus(exp.div_(mass[:, None]), local_targets) if with_gradient else None


def _shift(logits: Tensor) -> Tensor:
    """Subtracts each row's maximum in place and returns the maxima [n]."""
    top = logits.amax(dim=-1)
    logits.sub_(top[:, None])
    return top


def _at_targets(logits: Tensor, local_targets: Tensor) -> Tensor:
    """Logit of each row's target [n], 0 where the target lies outside the tile."""
    width = logits.shape[1]
    inside = (local_targets >= 0) & (local_targets < width)
    found = logits.gather(1, local_targets.clamp(0, width - 1)[:, None])[:, 0]
    return torch.where(inside, found, 0.0)


def _one_hot_minus(p: Tensor, local_targets: Tensor) -> Tensor:
    """one_hot(target) - p of a tile, in place; a target outside the tile has no one."""
    width = p.shape[1]
    inside = (local_targets >= 0) & (local_targets < width)
    return p.neg_().scatter_add_(1, local_targets.clamp(0, width - 1)[:, None], inside[:, None].to(p.dtype))


def _logits(states_nD: Tensor, head_vD: Tensor, temperature: float) -> Tensor:
    """Tempered logits [n, v] in the dtype of the states; the head's rows are cast to it."""
    logits = states_nD @ head_vD.to(states_nD.dtype).T
    return logits if temperature == 1.0 else logits.div_(temperature)


def _tiles(total: int, tile: int) -> list[slice]:
    return [slice(start, min(start + tile, total)) for start in range(0, total, tile)]


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _refuse_bad_teacher(hidden: Tensor, head: Tensor, tile_tokens: int, tile_vocab: int, dtype: torch.dtype) -> None:
    """Raises ValueError naming the first teacher logit that is not finite; returns if the student is at fault."""
    for tokens in _tiles(len(hidden), tile_tokens):
        for vocab in _tiles(len(head), tile_vocab):
            logits = _logits(hidden[tokens].to(dtype), head[vocab], 1.0)
            bad = ~logits.isfinite()
            if bad.any():
                row, column = bad.nonzero()[0].tolist()
                raise ValueError(
                    f"the teacher's logit of token id {vocab.start + column} is {logits[row, column].item()} at "
                    f"position {tokens.start + row}; reverse KL needs a finite teacher logit for every id (cut the "
                    "rows of a padded vocabulary from both heads)"
                )


def _check_head(side: str, hidden: Tensor, head: Tensor) -> None:
    if hidden.dim() != 2 or head.dim() != 2 or hidden.shape[1] != head.shape[1] or head.shape[0] == 0:
        raise ValueError(
            f"{side}hidden has shape {tuple(hidden.shape)} and {side}head {tuple(head.shape)}; they must be "
            "[tokens, width] and [vocabulary, width] with the same width"
        )


def _check_inputs(
    side: str, hidden: Tensor, head: Tensor, targets: Tensor, temperature: float, tile_tokens: int, tile_vocab: int
) -> None:
    _check_head(side, hidden, head)
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets is {targets.dtype} of shape {tuple(targets.shape)}; it must be torch.int64, one id for each of "
            f"{len(hidden)} tokens"
        )
    if len(targets):
        low, high = (int(bound) for bound in targets.aminmax())
        if low < 0 or high >= len(head):
            raise ValueError(f"targets has ids from {low} to {high}; {side}head has ids 0 to {len(head) - 1}")
    for name, value in (("temperature", temperature), ("tile_tokens", tile_tokens), ("tile_vocab", tile_vocab)):
        if value <= 0:
            raise ValueError(f"{name}={value} is not allowed; it must be positive")
