"""Mixture of experts: hash or learned routing, one shared expert, balance by selection bias (V4 report 2.1, 4.2).

Rows are sorted by expert once, so that an expert's work is one slice of a dense matrix. Expert weights are trained,
published and sampled as MXFP4 values: `Experts` fake-quantises its float master in every forward, unless it holds the
packed bytes themselves (a worker's, by `opd.fp4.pack_weights`).

Routing replay (V3.2 report 3.1): the experts a sampler chose are used again in training, so that the policy that is
trained is the one that acted; their weights stay those of the present router, which keeps its gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opd.fp4 import Fp4Experts, fake_quantize
from opd.kernels import fused, products
from opd.kernels.products import Linear, linears
from opd.model.hyper_connection import weighted_sum
from opd.model.layers import linear_by_segment, swiglu

SCORING = ("sqrtsoftplus", "sigmoid")


def affinities(logits: Tensor, scoring: str) -> Tensor:
    if fused.usable(logits):
        return fused.affinity(logits, scoring == "sigmoid")
    return torch.sigmoid(logits) if scoring == "sigmoid" else F.softplus(logits).sqrt()


class Router(nn.Module):
    """Affinities of every token to every expert, and the K it is sent to.

    Hash layers look the experts up by token id (`tid2eid`, int64 [V, K]); the others take the K best of affinity plus
    `e_score_correction_bias`, which steers the load and never enters the weights. Weights are the chosen affinities,
    normalised to sum to `routed_scaling_factor`. Experts that are given instead of chosen are weighted the same way.
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
        self.scoring = scoring
        self.is_hash = hash_vocab is not None
        self.weight = nn.Parameter(torch.empty(experts, hidden_size))
        if hash_vocab is not None:
            self.register_buffer("tid2eid", torch.zeros(hash_vocab, experts_per_token, dtype=torch.int64))
        else:
            self.register_buffer("e_score_correction_bias", torch.zeros(experts))

    def forward(
        self, x_ND: Tensor, token_ids_N: Tensor, given_NK: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> affinities [N, E], weights [N, K], expert ids int64 [N, K]; affinities in at least float32.

        `given_NK`, int64, takes the place of the K best wherever it is not negative; a hash layer has no use for it.
        """
        wide = x_ND if x_ND.dtype in (torch.float32, torch.float64) else x_ND.float()
        scores = affinities(products.linear(wide, self.weight.to(wide.dtype)), self.scoring)
        if self.is_hash:
            chosen = self.tid2eid[token_ids_N]
        else:
            chosen = torch.topk(scores.detach() + self.e_score_correction_bias, self.experts_per_token, -1).indices
            if given_NK is not None:
                chosen = torch.where(given_NK < 0, chosen, given_NK)
        weights = scores.gather(1, chosen)
        weights = weights * (self.factor / (weights.sum(-1, keepdim=True) + 1e-20))
        return scores, weights, chosen


class Experts(nn.Module):
    """The routed experts, stacked: gate_up_proj [E, 2 I, D] (gate rows first), down_proj [E, D, I]."""

    gate_up_proj: nn.Parameter | Fp4Experts
    down_proj: nn.Parameter | Fp4Experts

    def __init__(self, experts: int, hidden_size: int, width: int, limit: float, quantized: bool) -> None:
        super().__init__()
        self.limit, self.quantized = limit, quantized
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, width))

    def forward(self, x_ND: Tensor, weights_NK: Tensor, chosen_NK: Tensor) -> Tensor:
        experts = self.gate_up_proj.shape[0]
        if fused.usable(x_ND) and weights_NK.dtype == x_ND.dtype:
            source, places, counts = fused.expert_rows(chosen_NK, experts)
            out = self._experts(fused.dispatch(x_ND, source, places), tuple(counts.tolist()))
            return fused.combine(out, weights_NK, places)
        tokens, k = chosen_NK.shape
        order = torch.argsort(chosen_NK.flatten(), stable=True)
        sizes = tuple(torch.bincount(chosen_NK.flatten(), minlength=experts).tolist())
        places = torch.empty_like(order)
        places[order] = torch.arange(tokens * k, device=order.device)
        out = self._experts(x_ND[order // k], sizes)
        return weighted_sum(weights_NK.t(), out[places.view(tokens, k).t()])

    def _experts(self, rows: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """Rows sorted by expert through both matrices of their experts."""
        hidden = swiglu(self._linear(self.gate_up_proj, rows, sizes), None, self.limit)
        return self._linear(self.down_proj, hidden, sizes)

    def _linear(self, weight: nn.Parameter | Fp4Experts, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """x, rows sorted by expert, times the transposed weight of each row's expert."""
        if isinstance(weight, Fp4Experts):
            return weight(x, sizes)
        used = fake_quantize(weight) if self.quantized else weight
        return linear_by_segment(x, used.to(x.dtype), sizes)


class SharedExpert(nn.Module):
    """The expert every token visits; its output is not scaled."""

    def __init__(self, hidden_size: int, width: int, limit: float) -> None:
        super().__init__()
        self.limit = limit
        self.gate_proj = Linear(hidden_size, width, bias=False)
        self.up_proj = Linear(hidden_size, width, bias=False)
        self.down_proj = Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = linears(x, self.gate_proj, self.up_proj)
        return self.down_proj(swiglu(gate, up, self.limit))


class MoE(nn.Module):
    """Router, routed experts and the shared expert of one layer."""

    def __init__(self, gate: Router, experts: Experts, shared_experts: SharedExpert) -> None:
        super().__init__()
        self.gate, self.experts, self.shared_experts = gate, experts, shared_experts

    def forward(
        self, x_ND: Tensor, token_ids_N: Tensor, given_NK: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> output [N, D], affinities [N, E], expert ids [N, K]; `given_NK` as in `Router.forward`."""
        scores, weights, chosen = self.gate(x_ND, token_ids_N, given_NK)
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


def rerouted(scores_NE: Tensor, bias_E: Tensor, given_NK: Tensor) -> Tensor:
    """int64 [2]: tokens for which the router, by its affinities and selection bias, would choose others than the given
    experts, and tokens that are given any; `given_NK` as in `Router.forward`."""
    is_given = given_NK[:, 0] >= 0
    given, biased = given_NK.clamp(min=0), scores_NE.detach() + bias_E
    best_other = biased.scatter(1, given, -torch.inf).amax(-1)
    is_other = best_other > biased.gather(1, given).amin(-1)
    return torch.stack([(is_other & is_given).sum(), is_given.sum()])


def replayed_experts(
    routing_BTLK: Tensor, real_BT: Tensor, per_token: tuple[int, int], experts: int
) -> tuple[Tensor, ...]:
    """Recorded expert ids, checked: int64 [B T, K] for each layer, as `Router.forward` takes them.

    `per_token` is the (L, K) that the model asks for, `experts` its E.

    Where `real_BT` is False the record is not read, and the router chooses; so it does for a token of a layer whose K
    ids are all -1, which says that nothing was recorded there. Raises ValueError for another shape, for a dtype that is
    not of integers, and for real tokens whose ids are out of range or name an expert twice.
    """
    shape = (*real_BT.shape, *per_token)
    if tuple(routing_BTLK.shape) != shape:
        raise ValueError(
            f"routing has shape {tuple(routing_BTLK.shape)}; these tokens and this model ask for {shape}: rows, "
            "tokens, layers with learned routing, experts per token"
        )
    if routing_BTLK.dtype.is_floating_point or routing_BTLK.dtype.is_complex or routing_BTLK.dtype == torch.bool:
        raise ValueError(f"routing has dtype {routing_BTLK.dtype}; expert ids are integers")
    ids = routing_BTLK.to(real_BT.device, torch.int64).masked_fill(~real_BT[:, :, None, None], -1)
    is_out = ((ids < 0) | (ids >= experts)).any(-1)
    is_twice = (ids.sort(-1).values.diff(dim=-1) == 0).any(-1)
    wrong = (is_out | is_twice) & (ids != -1).any(-1)
    if wrong.any():
        row, token, layer = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"routing[{row}, {token}, {layer}] = {ids[row, token, layer].tolist()} cannot be replayed: a token's "
            f"{per_token[1]} expert ids must be distinct and from 0 to {experts - 1}, or all -1 where none were "
            "recorded"
        )
    return ids.flatten(0, 1).unbind(1)
