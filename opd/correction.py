"""Weights that correct for tokens drawn by another distribution than the policy: quantised, older, or another kernel's.

The one idea: a correction is a factor of each token's loss that carries no gradient, a function of the log-probs of the
tokens that were drawn. There are two kinds. Importance weights (`ratio`) make an expectation over actions right again,
so they belong to losses that estimate one; a divergence over the whole vocabulary has none to correct, only its states
are another distribution's. Masks drop tokens or whole trajectories that are too far off, for any loss. In this file p
is the policy, mu the sampler and r = p / mu of a token that was drawn.

Left out: which combinations make sense (`opd.config` refuses the others before anything starts).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opd.config import CorrectionConfig
from opd.losses import MAX_LOG_RATIO


@dataclass(slots=True, kw_only=True, frozen=True)
class Corrected:
    """What `correct` makes of N tokens. Nothing in it has a gradient."""

    importance: Tensor  # [N] of what is an expectation over the sampled token; 1 without a `ratio`
    mask: Tensor  # [N] of the token's whole loss: 1, or 0 where it is dropped
    shares: dict[str, Tensor]  # name -> bool [N]: tokens that an active part of the correction changed, by the part


@torch.no_grad()
def correct(
    correction: CorrectionConfig,
    policy_logprobs: Tensor,
    sampler_logprobs: Tensor,
    rows: Tensor,
    *,
    advantages: Tensor | None = None,
    version_gaps: Tensor | None = None,
    max_version_gap: int | None = None,
) -> Corrected:
    """The factors of every token [N] and what changed them; `rows` int64 [N]: which trajectory a token belongs to.

    With the log-ratio log r clamped to +-20, and products and means over a trajectory's loss tokens:
    ratio tis min(r, high); mis r, or 0 above high; icepop r, or 0 outside [low, high]; sequence_tis and sequence_mis
    the same with the product of a trajectory's r (clamped alike) in place of r.
    max_mean_gap drops a trajectory with |mean log r| above it (geometric); veto one with any r below it; max_k3 one
    with a mean of r - 1 - log r above it; opsm_delta one with a negative advantage and a mean of -log r above it
    (DeepSeek-V3.2 section 3.1); max_version_gap drops a token sampled more than so many policy versions ago.

    Raises ValueError for opsm_delta without `advantages` and for max_version_gap without `version_gaps`.
    """
    log_ratio = (policy_logprobs - sampler_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    num_rows = int(rows.max()) + 1 if len(rows) else 0
    count = log_ratio.new_zeros(num_rows).index_add_(0, rows, torch.ones_like(log_ratio)).clamp_(min=1.0)

    def total(values: Tensor) -> Tensor:
        """Sum over the trajectory that a token belongs to [N]."""
        return log_ratio.new_zeros(num_rows).index_add_(0, rows, values)[rows]

    mean_gap = total(log_ratio) / count[rows]
    importance, shares = _importance(correction, log_ratio, total(log_ratio))
    dropped: dict[str, Tensor] = {}
    if correction.max_mean_gap is not None:
        dropped["geometric_share"] = mean_gap.abs() > correction.max_mean_gap
    if correction.veto is not None:
        dropped["veto_share"] = total((log_ratio.exp() < correction.veto).to(log_ratio.dtype)) > 0
    if correction.max_k3 is not None:
        dropped["k3_share"] = total(log_ratio.expm1() - log_ratio) / count[rows] > correction.max_k3
    if correction.opsm_delta is not None:
        if advantages is None:
            raise ValueError(f"opsm_delta={correction.opsm_delta} needs advantages")
        dropped["opsm_share"] = (advantages < 0) & (-mean_gap > correction.opsm_delta)
    if max_version_gap is not None:
        if version_gaps is None:
            raise ValueError(f"max_version_gap={max_version_gap} needs version_gaps")
        dropped["stale_share"] = version_gaps > max_version_gap
    mask = torch.ones_like(log_ratio)
    for drop in dropped.values():
        mask = mask.masked_fill(drop, 0.0)
    return Corrected(importance=importance, mask=mask, shares=shares | dropped)


def _importance(
    correction: CorrectionConfig, log_ratio: Tensor, sequence_log_ratio: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    ratio = log_ratio.exp()
    if correction.ratio.startswith("sequence_"):
        ratio = sequence_log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    above = ratio > correction.high
    match correction.ratio:
        case "none":
            return torch.ones_like(ratio), {}
        case "tis" | "sequence_tis":
            return ratio.clamp(max=correction.high), {"ratio_truncated_share": above}
        case "mis" | "sequence_mis":
            return ratio.masked_fill(above, 0.0), {"ratio_masked_share": above}
        case "icepop":
            outside = above | (ratio < correction.low)
            return ratio.masked_fill(outside, 0.0), {"ratio_masked_share": outside}
        case other:
            raise ValueError(f"ratio={other} is not a correction")
