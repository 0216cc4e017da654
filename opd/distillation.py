"""What a distillation run minimises: from what a teacher sent to the loss of a micro-batch, by `stages.distill`.

The one idea: every loss is a sum over tokens of weight * divergence, and one place picks the divergence by the name of
the gradient it follows. A teacher whose hidden states are here allows all of them, and whatever is minimised, the exact
reverse KL is measured beside it, so that runs compare. A teacher that sent log-probabilities of a few tokens allows the
ones that need no more, and the reverse KL is then the sampled estimate of it.

In this file p is the student and q the teacher. Left out: the divergences (`opd.divergence`, `opd.estimators`), the
factors that correct for the sampler (`opd.correction`), and which combinations are refused (`opd.config`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from opd.batching import Batch
from opd.config import SAMPLED_LOSSES, TOPK_LOSSES, DistillConfig, SampledLoss, TopkLoss
from opd.correction import correct
from opd.divergence import Comparison, compare, jensen_shannon
from opd.estimators import sampled_divergence, topk_divergence
from opd.logits import TileSizes
from opd.losses import likeliest, token_logprobs

OVERLAP = 16  # likeliest tokens of student and teacher that are compared
OVERLAP_TOKENS = 64  # of a micro-batch, on which they are: sorting a vocabulary costs as much as the loss


@dataclass(slots=True, kw_only=True)
class Distill:
    """One teacher's states and output head: its whole distribution at every loss token."""

    hidden: Tensor  # [N, U]
    head: Tensor  # [V, U]


@dataclass(slots=True, kw_only=True)
class DistillLogprobs:
    """What one teacher said of the sampled token and of its own most likely ones."""

    logprobs: Tensor  # float32 [N]
    top_ids: Tensor  # int64 [N, k], the most likely first; k is 0 if nothing but the sampled token was asked for
    top_logprobs: Tensor  # float32 [N, k]


@dataclass(slots=True, kw_only=True)
class Distilled:
    """Of one micro-batch. All but `loss` is detached and per token."""

    loss: Tensor  # 0-dim
    logprobs: Tensor  # [N] of the targets at `stage.temperature`, the sampler's
    per_token: dict[str, Tensor]  # metric -> [N]


@dataclass(slots=True)
class _Seen:
    """Both distributions at the ids that the loss needs: column 0 the sampled token, then the teacher's likeliest."""

    ids: Tensor  # int64 [N, 1 + k]
    policy_logprobs: Tensor  # [N, 1 + k], differentiable
    teacher_logprobs: Tensor  # [N, 1 + k]


def distill(
    stage: DistillConfig,
    task: Distill | DistillLogprobs,
    hidden: Tensor,
    head: Tensor,
    batch: Batch,
    weights: Tensor,
    tiles: TileSizes,
    reference: Distill | None = None,
) -> Distilled:
    """The loss of N tokens with student states hidden [N, D] and head [V, D]; weights [N] hold the normalisation.

    `reference` is the policy the stage started from, for `stage.reference_kl`. Raises ValueError for a loss that needs
    more than a teacher of log-probabilities sends.
    """
    seen, comparison, mixture, per_token = _look(stage, task, hidden, head, batch.targets, tiles)
    logprobs = seen.policy_logprobs[:, 0].detach()
    if stage.temperature not in (0.0, stage.kl_temperature):
        logprobs, _ = token_logprobs(
            hidden.detach(), head.detach(), batch.targets, temperature=stage.temperature, **tiles
        )
    corrected = correct(stage.correction, logprobs, batch.sampler_logprobs, batch.rows)
    per_token |= {f"distill/{name}": share for name, share in corrected.shares.items()}
    factor = corrected.mask
    if stage.masked_ids:
        special = torch.isin(batch.targets, torch.tensor(stage.masked_ids, device=batch.targets.device))
        factor = factor.masked_fill(special, 0.0)
        per_token["distill/special_share"] = special

    if stage.loss in TOPK_LOSSES:
        loss = cast(TopkLoss, stage.loss)
        divergence = topk_divergence(loss, seen.policy_logprobs, seen.teacher_logprobs, seen.ids, corrected.importance)
        per_token["distill/topk_student_mass"] = seen.policy_logprobs[:, 1:].detach().exp().sum(dim=-1)
        per_token["distill/topk_teacher_mass"] = seen.teacher_logprobs[:, 1:].exp().sum(dim=-1)
    elif stage.loss in SAMPLED_LOSSES:
        loss = cast(SampledLoss, stage.loss)
        baseline = comparison.reverse_kl if stage.baseline == "kl" and comparison is not None else None
        sampled = seen.policy_logprobs[:, 0], seen.teacher_logprobs[:, 0]
        divergence = sampled_divergence(loss, *sampled, advantage_clip=stage.advantage_clip, baseline=baseline)
        divergence = corrected.importance * divergence
        if stage.advantage_clip is not None:
            clipped = (sampled[1] - sampled[0].detach()).abs() > stage.advantage_clip
            per_token["distill/advantage_clip_share"] = clipped
    elif comparison is None:
        raise ValueError(f"stages.distill.loss={stage.loss} needs a teacher's hidden states; it sent log-probabilities")
    else:
        match stage.loss:
            case "reverse_kl":
                divergence = comparison.reverse_kl
            case "forward_kl":
                divergence = comparison.forward_kl
            case "mixed_kl":
                divergence = stage.mix * comparison.reverse_kl + (1.0 - stage.mix) * comparison.forward_kl
            case "jensen_shannon":
                divergence = mixture
            case other:
                raise ValueError(f"stages.distill.loss={other} is not a loss")
    total = (weights * factor * divergence).sum()
    if reference is not None:
        none = batch.targets[:, None][:, :0]
        kept = compare(hidden, head, reference.hidden, reference.head, none, temperature=stage.kl_temperature, **tiles)
        total = total + stage.reference_kl * (weights * kept.reverse_kl).sum()
        per_token["distill/kl_to_reference"] = kept.reverse_kl.detach()
    return Distilled(loss=total, logprobs=logprobs, per_token=per_token)


def _look(
    stage: DistillConfig,
    task: Distill | DistillLogprobs,
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    tiles: TileSizes,
) -> tuple[_Seen, Comparison | None, Tensor, dict[str, Tensor]]:
    """What student and teacher say; the comparison over the whole vocabulary if there is one; the Jensen-Shannon
    divergence (zero unless it is the loss); and what is measured whatever the loss."""
    temperature, ids = stage.kl_temperature, targets[:, None]
    top_k = stage.top_k if stage.loss in TOPK_LOSSES else 0
    if isinstance(task, DistillLogprobs):
        if task.top_ids.shape[1] < top_k:
            raise ValueError(
                f"stages.distill.loss={stage.loss} needs top_k={top_k} log-probabilities of a teacher at every token; "
                f"it sent {task.top_ids.shape[1]}"
            )
        ids = torch.cat((ids, task.top_ids[:, :top_k]), dim=1)
        teacher_logprobs = torch.cat((task.logprobs[:, None], task.top_logprobs[:, :top_k]), dim=1)
        logprobs, entropy = token_logprobs(hidden, head, ids, temperature=temperature, **tiles)
        estimate = logprobs[:, 0].detach() - task.logprobs
        per_token = {"distill/reverse_kl": estimate, "distill/student_entropy": entropy}
        return _Seen(ids, logprobs, teacher_logprobs), None, torch.zeros_like(entropy), per_token

    if top_k:
        ids = torch.cat((ids, likeliest(task.hidden, task.head, top_k, **tiles)), dim=1)
    inputs = (hidden, head, task.hidden, task.head, ids)
    if stage.loss == "jensen_shannon":
        mixture, seen = jensen_shannon(*inputs, beta=stage.beta, temperature=temperature, **tiles)
    else:
        seen = compare(*inputs, temperature=temperature, **tiles)
        mixture = torch.zeros_like(seen.reverse_kl)
    per_token = {
        "distill/reverse_kl": seen.reverse_kl.detach(),
        "distill/student_entropy": seen.student_entropy,
        "distill/teacher_entropy": seen.teacher_entropy,
        "distill/top1_agreement": seen.top1_agree,
        "distill/top16_overlap": _overlap(task, hidden, head, tiles),
    }
    return _Seen(ids, seen.student_logprobs, seen.teacher_logprobs), seen, mixture, per_token


@torch.no_grad()
def _overlap(task: Distill, hidden: Tensor, head: Tensor, tiles: TileSizes) -> Tensor:
    """Share [N] of the student's 16 likeliest tokens that are the teacher's too. Of more than `OVERLAP_TOKENS` tokens
    so many are looked at, evenly spread, and each stands for those up to the next."""
    num = len(hidden)
    looked_at = min(num, OVERLAP_TOKENS)
    if not looked_at:
        return hidden.new_zeros(0)
    numbers = torch.arange(looked_at, device=hidden.device)
    rows = (numbers * num + looked_at - 1) // looked_at
    k = min(OVERLAP, len(head))
    mine, theirs = likeliest(hidden[rows], head, k, **tiles), likeliest(task.hidden[rows], task.head, k, **tiles)
    shared = (mine[:, :, None] == theirs[:, None, :]).any(dim=-1).float().mean(dim=-1)
    return shared[torch.arange(num, device=hidden.device) * looked_at // num]
