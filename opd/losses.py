"""Log-probabilities of chosen tokens from hidden states, and the losses that need no teacher: GRPO, and its parts.

The one idea: a loss is a sum over tokens of weights times a per-token number, and the weights already hold the division
by a count taken over the whole step (negative log-likelihood is `-(weights * logprobs).sum()`); nothing here knows of
micro-batches. In this file p is the policy and mu the sampler, r = p / mu on the token that was drawn.

Left out: how logits are cut and multiplied (`opd.logits`), which state predicts which token (`opd.batching`), what is
compared with a teacher (`opd.divergence`, `opd.estimators`), and weights that correct for the sampler
(`opd.correction`).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
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
from opd.softmax import Softmax

MAX_LOG_RATIO = 20.0  # a log-ratio is clamped to +-this before exp, which keeps ratios and their squares finite


@dataclass(slots=True, kw_only=True, frozen=True)
class GrpoResult:
    """`loss` is differentiable, the rest is detached and per token."""

    loss: Tensor  # scalar: sum_t weights_t * (kl_coefficient * reference_kl_t - surrogate_t)
    ratio: Tensor  # [N] policy / sampler probability of the token
    clipped: Tensor  # bool [N]: the clip is in force, the surrogate gives this token no gradient
    reference_kl: Tensor  # [N] unbiased estimate of KL(policy || reference); zeros without a reference


def token_logprobs(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    tile_tokens: int = TILE_TOKENS,
    tile_vocab: int = TILE_VOCAB,
    shard: Shard | None = None,
) -> tuple[Tensor, Tensor]:
    """log p(target), differentiable in hidden [N, D] and head [V, D], and the entropy of p [N], detached.

    targets int64 [N] or [N, K], and the log-probabilities have their shape; p is the softmax of the logits divided by
    `temperature`. With a `shard`, `head` is this rank's rows and targets are ids of the whole vocabulary. Holds two
    tiles of tile_tokens x tile_vocab beyond gradients and a few numbers per token, and up to eight that it need not
    make again. Raises ValueError for shapes that do not fit and targets outside the vocabulary.
    """
    tiling = Tiling(temperature=temperature, tile_tokens=tile_tokens, tile_vocab=tile_vocab, shard=shard)
    check_head("", hidden, head)
    check_ids(targets, len(hidden), "", head, tiling)
    ids = targets if targets.dim() == 2 else targets[:, None]
    logprobs, entropy = _TokenLogprobs.apply(hidden, head, ids, tiling)
    return logprobs.view(targets.shape), entropy


@torch.no_grad()
def likeliest(
    hidden: Tensor,
    head: Tensor,
    k: int,
    *,
    tile_tokens: int = TILE_TOKENS,
    tile_vocab: int = TILE_VOCAB,
    shard: Shard | None = None,
) -> Tensor:
    """Ids int64 [N, k] of the k largest logits of hidden [N, U] @ head[V, U].T, the largest first.

    With a `shard`, of the whole vocabulary, the same on all ranks. Raises ValueError unless 1 <= k <= V (of one rank).
    """
    check_head("", hidden, head)
    if not 1 <= k <= len(head):
        raise ValueError(f"k={k} is not allowed; it must be 1 to {len(head)}, the size of the vocabulary")
    tiling = Tiling(tile_tokens=tile_tokens, tile_vocab=tile_vocab, shard=shard)
    logits = Logits(hidden, head, tiling, compute_dtype(hidden, head))
    best: list[tuple[Tensor, Tensor]] = []  # (logits, ids) of each tile of tokens
    for vocab in logits.vocab:
        logits.enter(vocab)
        for index, tokens in enumerate(logits.tokens):
            found, columns = logits.tile(tokens, None).topk(min(k, vocab.stop - vocab.start), dim=-1)
            candidates = (found, columns + (tiling.first_id + vocab.start))
            if vocab.start == 0:
                best.append(candidates)
            else:
                best[index] = _top(k, [best[index], candidates])
    total = torch.cat([value for value, _ in best]), torch.cat([ids for _, ids in best])
    if shard is not None:
        ranks = dist.get_world_size(shard.group)
        values, ids = ([torch.empty_like(part) for _ in range(ranks)] for part in total)
        dist.all_gather(values, total[0], group=shard.group)
        dist.all_gather(ids, total[1], group=shard.group)
        total = _top(k, list(zip(values, ids, strict=True)))
    return total[1]


@torch.no_grad()
def logsumexp_at(hidden: Tensor, head: Tensor, *, tile_vocab: int = TILE_VOCAB) -> Tensor:
    """Log-sum-exp [n] of the logits of a few states: hidden [n, U], head [V, U]. No gradient, no temperature."""
    check_head("", hidden, head)
    rows = hidden.to(compute_dtype(hidden, head))
    total = rows.new_full((len(rows),), -torch.inf)
    for start in range(0, len(head), tile_vocab):
        total = torch.logaddexp(total, (rows @ head[start : start + tile_vocab].to(rows.dtype).T).logsumexp(dim=-1))
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
    ratio = (policy_logprobs - sampler_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    surrogate = ratio * advantages
    clipped_surrogate = ratio.clamp(1.0 - clip, 1.0 + clip) * advantages
    loss = -(weights * torch.minimum(surrogate, clipped_surrogate)).sum()
    if reference_logprobs is None:
        reference_kl = torch.zeros_like(ratio)
    else:
        gap = (reference_logprobs - policy_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
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
        clamped = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
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


class _TokenLogprobs(torch.autograd.Function):
    """Gradient of log p(target) in z: one_hot(target) - p. A few tiles are kept for it, more are made again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, ids: Tensor, tiling: Tiling) -> tuple[Tensor, Tensor]:
        logits = Logits(hidden, head, tiling, compute_dtype(hidden, head))
        scratch = logits.scratch(2)
        keeps = tiling.keeps(len(hidden), len(head)) and any(ctx.needs_input_grad)
        parts: list[Softmax] = []
        kept: list[Tensor] = []
        for vocab in logits.vocab:
            logits.enter(vocab)
            for index, tokens in enumerate(logits.tokens):
                z = logits.tile(tokens, None if keeps else scratch[0])
                part = _summarise(z, logits.local(ids, tokens), scratch[1])
                if keeps:
                    kept += [z, part.top]
                if vocab.start == 0:
                    parts.append(part)
                else:
                    parts[index] = parts[index].merge(part)
        total = Softmax.of_rows(parts).over_ranks(tiling)
        ctx.tiling = tiling
        ctx.save_for_backward(hidden, head, ids, total.top, total.mass, *kept)
        entropy = total.entropy()
        ctx.mark_non_differentiable(entropy)
        return total.logprobs(), entropy

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, ids, top, mass, *kept = ctx.saved_tensors
        logits = Logits(hidden, head, ctx.tiling, top.dtype)
        logits.start_gradients(*ctx.needs_input_grad[:2])
        (scratch,) = logits.scratch(1)
        upstream = grad_outputs[0].to(top.dtype) * NATS  # logits are in bits
        slope = upstream.sum(dim=-1) / mass
        remaining = iter(kept)
        for vocab in logits.vocab:
            logits.enter(vocab)
            for tokens in logits.tokens:
                # A kept tile is relative to its own largest logits, and is left as it is.
                z, z_top = (next(remaining), next(remaining)) if kept else (logits.tile(tokens, scratch), None)
                relative = top[tokens] if z_top is None else top[tokens] - z_top
                out = view(scratch, (z.shape[0], z.shape[1]))
                if compiled.usable(z):
                    gradient = compiled.gradient(z, relative, -slope[tokens], out)
                else:
                    gradient = torch.sub(z, relative[:, None], out=out).exp2_().mul_(-slope[tokens, None])
                scatter_ids(gradient, logits.local(ids, tokens), upstream[tokens])
                logits.add_gradient(tokens, gradient)
            logits.leave()
        return *logits.gradients(), None, None


def _summarise(z: Tensor, local_ids: Tensor, scratch: Tensor) -> Softmax:
    """The sums of a tile of logits, which are left relative to each row's largest."""
    at_ids = gather_ids(z, local_ids)
    if compiled.usable(z):
        top, mass, moment = compiled.sums(z)
        return Softmax(top, mass, moment, at_ids)
    top = shift(z)
    weight = torch.exp2(z, out=view(scratch, (z.shape[0], z.shape[1])))
    mass = weight.sum(dim=-1)
    return Softmax(top, mass, weight.mul_(z).sum(dim=-1), at_ids)


def _top(k: int, candidates: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The k largest of several lists of (values [n, c], ids [n, c]), or all if there are fewer."""
    values, ids = (torch.cat(parts, dim=-1) for parts in zip(*candidates, strict=True))
    values, order = values.topk(min(k, values.shape[1]), dim=-1)
    return values, ids.gather(1, order)
