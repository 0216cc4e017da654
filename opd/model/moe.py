"""Mixture of experts: hash or learned routing, one shared expert, balance by selection bias (V4 report 2.1, 4.2).

Rows are sorted by expert once, so that an expert's work is one slice of a dense matrix. Expert weights are trained,
published and sampled as MXFP4 values: `Experts` fake-quantises its float master in every forward, which is the
identity on weights that are MXFP4 values already (a worker's).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opd.fp4 import fake_quantize
from opd.model.hyper_connection import weighted_sum
from opd.model.layers import linear_by_segment, swiglu

SCORING = {
    "sqrtsoftplus": lambda logits: F.softplus(logits).sqrt(),
    "sigmoid": torch.sigmoid,
}


class Router(nn.Module):
    """Affinities of every token to every expert, and the K it is sent to.

    Hash layers look the experts up by token id (`tid2eid`, int64 [V, K]); the others take the K best of affinity plus
    `e_score_correction_bias`, which steers the load and never enters the weights. Weights are the chosen affinities,
    normalised to sum to `routed_scaling_factor`.
    """

    tid2eid: Tensor
    e_score_correction_bias: Tensor

    def __init__(
        self,
        experts: int,
        experts_per_token: int,
        hidden_size: int,
        scoring: str,
        factor: float,
        hash_vocab: int | None,
    ) -> None:
        super().__init__()
        self.experts, self.experts_per_token, self.factor = experts, experts_per_token, factor
        self.score = SCORING[scoring]
        self.is_hash = hash_vocab is not None
        self.weight = nn.Parameter(torch.empty(experts, hidden_size))
        if hash_vocab is not None:
            self.register_buffer("tid2eid", torch.zeros(hash_vocab, experts_per_token, dtype=torch.int64))
        else:
            self.register_buffer("e_score_correction_bias", torch.zeros(experts))

    def forward(self, x_ND: Tensor, token_ids_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> affinities [N, E], weights [N, K], expert ids int64 [N, K]; affinities in at least float32."""
        wide = x_ND if x_ND.dtype in (torch.float32, torch.float64) else x_ND.float()
        scores = self.score(F.linear(wide, self.weight.to(wide.dtype)))
        if self.is_hash:
            chosen = self.tid2eid[token_ids_N]
        else:
            chosen = torch.topk(scores.detach() + self.e_score_correction_bias, self.experts_per_token, -1).indices
        weights = scores.gather(1, chosen)
        weights = weights * (self.factor / (weights.sum(-1, keepdim=True) + 1e-20))
        return scores, weights, chosen


class Experts(nn.Module):
    """The routed experts, stacked: gate_up_proj [E, 2 I, D] (gate rows first), down_proj [E, D, I]."""

    def __init__(self, experts: int, hidden_size: int, width: int, limit: float, quantized: bool) -> None:
        super().__init__()
        self.limit, self.quantized = limit, quantized
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, width))

    def forward(self, x_ND: Tensor, weights_NK: Tensor, chosen_NK: Tensor) -> Tensor:
        gate_up, down = self.gate_up_proj, self.down_proj
        if self.quantized:
            gate_up, down = fake_quantize(gate_up), fake_quantize(down)
        gate_up, down = gate_up.to(x_ND.dtype), down.to(x_ND.dtype)
        tokens, k = chosen_NK.shape
        order = torch.argsort(chosen_NK.flatten(), stable=True)
        sizes = tuple(torch.bincount(chosen_NK.flatten(), minlength=gate_up.shape[0]).tolist())
        hidden = linear_by_segment(x_ND[order // k], gate_up, sizes)
        gate, up = hidden.chunk(2, -1)
        hidden = swiglu(gate, up, self.limit)
        out = linear_by_segment(hidden, down, sizes)
        back = torch.empty_like(order)
        back[order] = torch.arange(tokens * k, device=order.device)
        return weighted_sum(weights_NK.t(), out[back.view(tokens, k).t()])


class SharedExpert(nn.Module):
    """The expert every token visits; its output is not scaled."""

    def __init__(self, hidden_size: int, width: int, limit: float) -> None:
        super().__init__()
        self.limit = limit
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x), self.limit))


class MoE(nn.Module):
    """Router, routed experts and the shared expert of one layer."""

    def __init__(self, gate: Router, experts: Experts, shared_experts: SharedExpert) -> None:
        super().__init__()
        self.gate, self.experts, self.shared_experts = gate, experts, shared_experts

    def forward(self, x_ND: Tensor, token_ids_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> output [N, D], affinities [N, E], expert ids [N, K]."""
        scores, weights, chosen = self.gate(x_ND, token_ids_N)
        return self.experts(x_ND, weights, chosen) + self.shared_experts(x_ND), scores, chosen


def balance_statistics(scores_NE: Tensor, chosen_NK: Tensor, real_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Sequence-wise balance loss and expert load of one layer.

    Loss (V3's form, kept by V4): sum over sequences of sum_e f_e P_e, with f_e = E / (K T) * tokens of the sequence
    sent to e and P_e the mean normalised affinity; 1 per sequence when balanced. Load: int64 [E], tokens sent to each
    expert. Only positions where `real_BT` is True count.
    """
    batch, experts = real_BT.shape[0], scores_NE.shape[-1]
    real = real_BT.to(scores_NE.dtype)
    length = real.sum(1).clamp(min=1)
    sent = torch.zeros_like(scores_NE).scatter_(1, chosen_NK, 1.0).view(batch, -1, experts) * real[..., None]
    share = scores_NE / scores_NE.sum(-1, keepdim=True)
    mean_share_BE = (share.view(batch, -1, experts) * real[..., None]).sum(1) / length[:, None]
    sent_BE = sent.sum(1)
    frequency_BE = sent_BE * (experts / (chosen_NK.shape[1] * length[:, None]))
    return (frequency_BE * mean_share_BE).sum(), sent_BE.sum(0).to(torch.int64)
