"""Divergences from the log-probabilities of a few tokens: the teacher's likeliest k, the sampled one, or both.

The one idea: using an estimator's value and differentiating it are two things, and names lie about which is meant. Here
a per-token result has the divergence as its value, and as its gradient the one that its name says: of the reverse KL,
KL(p || q), or of the forward KL, KL(q || p), with p the policy and q the teacher, both normalised over the whole
vocabulary, and l = log p - log q. These need only log-probabilities, so they serve teachers that send nothing else.

What is never offered: the reverse KL summed over the top k alone (it pushes mass out of them even at p = q), and the k1
estimate differentiated (its expected gradient is zero). Left out: weights of any kind, and where log-probs come from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd.config import SampledLoss, TopkLoss
from opd.losses import MAX_LOG_RATIO


def topk_divergence(
    loss: TopkLoss,
    policy_logprobs: Tensor,
    teacher_logprobs: Tensor,
    ids: Tensor,
    importance: Tensor | None = None,
) -> Tensor:
    """Divergence [N] over the set S of a token's k entries, differentiable in `policy_logprobs`.

    All are [N, 1 + k]: column 0 is the sampled token y, columns 1 to k are S, distinct ids (usually the teacher's
    likeliest). Gradients in the logits z:

    topk_reverse_kl               sum_S [p l - p + q]: never negative, and zero only where p = q on S;
                                  p_j (1[j in S] l_j - sum_S p l)
    topk_renormalised_reverse_kl  KL of both renormalised on S; blind to the mass of S
    topk_tail_reverse_kl          KL over S and one bucket for the rest: never above the full KL;
                                  p_j (l_j - KL), outside S with the l of the bucket
    topk_sampled_reverse_kl       sum_S p l exactly, and l_y where the sampled token lies outside S: value and gradient
                                  are those of the full KL(p || q) in expectation under p, or under the sampler with
                                  `importance` [N], the ratio p / sampler of the sampled token
    topk_forward_kl               sum_S q (log q - log p); may be negative; q(S) p_j - q_j 1[j in S], so its minimum is
                                  q renormalised on S
    """
    log_p, log_q = policy_logprobs[:, 1:], teacher_logprobs[:, 1:]
    p, q, log_ratio = log_p.exp(), log_q.exp(), log_p - log_q
    match loss:
        case "topk_reverse_kl":
            return (p * log_ratio - p + q).sum(dim=-1)
        case "topk_renormalised_reverse_kl":
            log_p, log_q = log_p.log_softmax(dim=-1), log_q.log_softmax(dim=-1)
            return (log_p.exp() * (log_p - log_q)).sum(dim=-1)
        case "topk_tail_reverse_kl":
            p_rest, q_rest = _mass_outside(p), _mass_outside(q)
            return (p * log_ratio).sum(dim=-1) + p_rest * (p_rest.log() - q_rest.log())
        case "topk_sampled_reverse_kl":
            sampled = policy_logprobs[:, 0] - teacher_logprobs[:, 0]
            outside = (ids[:, 1:] != ids[:, :1]).all(dim=-1).to(p.dtype)
            if importance is not None:
                outside = outside * importance.detach()
            value = (p * log_ratio).sum(dim=-1) + outside * sampled
            # The +1 that differentiating p l adds is left out of both parts: it sums to zero over the vocabulary.
            surrogate = (p * log_ratio.detach()).sum(dim=-1) + outside * sampled.detach() * policy_logprobs[:, 0]
            return _with_value(surrogate, value)
        case "topk_forward_kl":
            return (q * -log_ratio).sum(dim=-1)


def sampled_divergence(
    loss: SampledLoss,
    policy_logprobs: Tensor,
    teacher_logprobs: Tensor,
    *,
    advantage_clip: float | None = None,
    baseline: Tensor | None = None,
) -> Tensor:
    """Divergence [N] estimated from the sampled token y ~ p alone, differentiable in `policy_logprobs` [N].

    sampled_reverse_kl     value l_y; gradient -A grad log p_y with A = clip(log q_y - log p_y) + baseline, a score
                           function: that of KL(p || q) in expectation. `advantage_clip` bounds |log q_y - log p_y|;
                           a `baseline` [N] of the state alone (KL(p || q) itself) lowers the variance.
    sampled_reverse_kl_k2  value l_y^2 / 2, differentiated: in expectation the gradient of KL(p || q)
    sampled_forward_kl     value q/p - 1 + l_y (k3), differentiated: in expectation the gradient p - q of the *forward*
                           KL(q || p), with a weight that has no lower bound; its value estimates KL(p || q)

    Under another sampler than p the caller multiplies by importance weights. Log-ratios are clamped to +-20 before exp.
    Raises ValueError for a clip or baseline that `loss` does not have.
    """
    if loss != "sampled_reverse_kl" and (advantage_clip is not None or baseline is not None):
        raise ValueError(f"loss={loss} has no advantage, so neither advantage_clip nor baseline")
    log_ratio = policy_logprobs - teacher_logprobs
    match loss:
        case "sampled_reverse_kl":
            advantage = -log_ratio.detach()
            if advantage_clip is not None:
                advantage = advantage.clamp(-advantage_clip, advantage_clip)
            if baseline is not None:
                advantage = advantage + baseline.detach()
            return _with_value(-advantage * policy_logprobs, log_ratio)
        case "sampled_reverse_kl_k2":
            return 0.5 * log_ratio.square()
        case "sampled_forward_kl":
            gap = (-log_ratio).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
            return gap.expm1() - gap


def _mass_outside(probabilities: Tensor) -> Tensor:
    """1 - sum [N], at least the rounding of 1: a bucket that S leaves nothing to has a finite logarithm."""
    return (1.0 - probabilities.sum(dim=-1)).clamp(min=torch.finfo(probabilities.dtype).eps)


def _with_value(surrogate: Tensor, value: Tensor) -> Tensor:
    """The number `value` with the gradient of `surrogate`."""
    return value.detach() + (surrogate - surrogate.detach())
