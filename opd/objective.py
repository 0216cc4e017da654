"""The loss of one micro-batch: policy and loss as one module, which is what DeepSpeed's engine wraps.

The one idea: a micro-batch's loss is a sum over its tokens times weights that already hold the division by the whole
step's count, so that whoever runs micro-batches has nothing left to scale. Three tasks, one per signal: imitate,
reinforce, distill. Left out: the losses themselves (`opd.losses`), fetching what a task holds and updating weights
(`opd.learner`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from opd.batching import Batch
from opd.config import DistillConfig, GrpoConfig, LearnerConfig, StageConfig
from opd.correction import correct
from opd.distillation import Distill, DistillLogprobs, distill
from opd.logits import TileSizes
from opd.losses import grpo_loss, token_logprobs
from opd.model import DeepseekV4
from opd.model.attention import Indexing
from opd.model.hub import HubModel

Policy = DeepseekV4 | HubModel


@dataclass(slots=True, kw_only=True)
class Imitate:
    """SFT: minus the log-probability of the loss tokens."""


@dataclass(slots=True, kw_only=True)
class Reinforce:
    """GRPO against the distribution that sampled."""

    advantages: Tensor  # float32 [N]
    reference_logprobs: Tensor | None  # float32 [N], of the policy the stage started from


@dataclass(slots=True, kw_only=True)
class Work:
    """One micro-batch on its device."""

    batch: Batch
    task: Imitate | Reinforce | Distill | DistillLogprobs
    weights: Tensor  # float32 [N]: signal weight / loss tokens of the step
    balance_weight: float  # of each row's balance loss
    index_weight: float = 0.0  # of each row's indexer loss
    indexing: Indexing = "off"
    mtp_weight: float = 0.0  # of each token's multi-token-prediction loss; 0: the block does not run


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What a micro-batch measured; all detached, per-token tensors [N] by metric name."""

    loss: Tensor  # 0-dim, without balance loss
    balance_loss: Tensor  # 0-dim, sum over rows
    expert_load: Tensor  # int64 [L, E]
    per_token: dict[str, Tensor]
    logprobs: Tensor  # [N] of the targets at `stage.temperature`, the sampler's
    index_loss: Tensor | None = None  # 0-dim, sum over rows
    index_recall: Tensor | None = None  # [2], sum and number
    rerouted: Tensor | None = None  # [2], see `ModelOutput`
    mtp_nll: Tensor | None = None  # 0-dim, sum over the tokens it predicted


class Objective(nn.Module):
    """Policy and loss as one module, so that DeepSpeed's hooks see a forward that ends in a loss."""

    def __init__(self, model: Policy, stage: StageConfig, learner: LearnerConfig) -> None:
        super().__init__()
        self.model = model
        self.stage = stage
        self.tiles = TileSizes(tile_tokens=learner.kl_tile_tokens, tile_vocab=learner.kl_tile_vocab)
        # In a list, which hides it from the engine: nothing of it is trained, reduced or saved.
        self._reference: list[Policy] = []
        if isinstance(stage, DistillConfig) and stage.reference_kl > 0:
            self._reference.append(copy.deepcopy(model).requires_grad_(False))
        # DeepSpeed's ZeRO reduces gradients in the order in which they are ready, in buckets, and does not compare
        # notes between ranks: a parameter that gets no gradient on one rank only (a compressor, when all rows are
        # shorter than a block) would be summed with another one.
        self.is_tied = learner.zero_stage in (1, 2) and learner.optimizer.name == "adamw"

    def forward(self, work: Work | None) -> tuple[Tensor, Outcome | None]:
        """The micro-batch's part of the loss, balance loss included; zero for an empty micro-batch (None)."""
        if work is None:
            return _Tie.apply(*self.model.parameters()), None
        tie = _Tie.apply(*self.model.parameters()) if self.is_tied else 0.0  # first, so that its backward runs last
        batch = work.batch
        trains_index = work.indexing != "off" and isinstance(self.model, DeepseekV4)
        options: dict[str, Any] = {"indexing": work.indexing} if trains_index else {}
        if work.mtp_weight > 0:
            options["mtp"] = True
        if batch.routing.shape[2] > 0:  # a policy to stay near, of whatever stage, chooses experts of its own
            options["routing"] = batch.routing
        # Not by a call: ZeRO's hooks look for tensors in what a module returns, and this is no module with weights.
        output = self.model.forward(batch.token_ids, batch.lengths, **options)
        hidden = output.hidden[batch.rows, batch.positions]
        outcome, loss = self._loss(hidden, work)
        outcome.balance_loss, outcome.expert_load = output.balance_loss.detach(), output.expert_load
        outcome.rerouted = output.rerouted
        loss = loss + work.balance_weight * output.balance_loss + tie
        if output.index_loss is not None:
            outcome.index_loss, outcome.index_recall = output.index_loss.detach(), output.index_recall
            loss = loss + work.index_weight * output.index_loss
        if output.mtp_hidden is not None:
            nll = self._mtp_nll(output.mtp_hidden, batch)
            outcome.mtp_nll = nll.detach()
            loss = loss + work.mtp_weight * nll
        return loss, outcome

    def _mtp_nll(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Sum over the loss tokens of minus their log-probability two states before their own; index 1 has none."""
        ahead = batch.positions > 0
        states = hidden[batch.rows[ahead], batch.positions[ahead] - 1]
        logprobs, _ = token_logprobs(states, self.model.head, batch.targets[ahead], **self.tiles)
        return -logprobs.sum()

    @torch.no_grad()
    def _reference_of(self, batch: Batch) -> Distill | None:
        """The states and head of the policy that distillation started from, where the loss has a term with it."""
        if not self._reference:
            return None
        (reference,) = self._reference
        hidden = reference(batch.token_ids, batch.lengths).hidden[batch.rows, batch.positions]
        return Distill(hidden=hidden, head=reference.head)

    def _loss(self, hidden: Tensor, work: Work) -> tuple[Outcome, Tensor]:
        batch, head = work.batch, self.model.head
        match work.task:
            case Imitate():
                logprobs, entropy = token_logprobs(hidden, head, batch.targets, **self.tiles)
                loss = -(work.weights * logprobs).sum()
                logprobs = logprobs.detach()
                per_token = {"sft/nll": -logprobs, "sft/entropy": entropy}
            case Reinforce(advantages=advantages, reference_logprobs=reference):
                assert isinstance(self.stage, GrpoConfig)
                differentiable, entropy = token_logprobs(
                    hidden, head, batch.targets, temperature=self.stage.temperature, **self.tiles
                )
                logprobs = differentiable.detach()
                corrected = correct(
                    self.stage.correction, logprobs, batch.sampler_logprobs, batch.rows, advantages=advantages
                )
                result = grpo_loss(
                    differentiable,
                    batch.sampler_logprobs,
                    advantages * corrected.mask,  # not the weights: the KL term stays
                    work.weights,
                    clip=self.stage.clip,
                    reference_logprobs=reference,
                    kl_coefficient=self.stage.kl_coefficient,
                )
                loss = result.loss
                per_token = {"grpo/entropy": entropy, "grpo/clip_share": result.clipped}
                per_token |= {f"grpo/{name}": share for name, share in corrected.shares.items()}
                if reference is not None:
                    per_token["grpo/kl_to_reference"] = result.reference_kl
            case Distill() | DistillLogprobs():
                assert isinstance(self.stage, DistillConfig)
                result = distill(
                    self.stage, work.task, hidden, head, batch, work.weights, self.tiles, self._reference_of(batch)
                )
                loss, logprobs, per_token = result.loss, result.logprobs, result.per_token
        nothing = torch.empty(0)
        outcome = Outcome(
            loss=loss.detach(), balance_loss=nothing, expert_load=nothing, per_token=per_token, logprobs=logprobs
        )
        return outcome, loss


class _Tie(torch.autograd.Function):
    """Zero, with a gradient of zero for every parameter. Autograd runs the newest node first, so when this is the first
    of a forward, all gradients of a backward become ready at its end, in the same order on every rank."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.shapes = [parameter.shape for parameter in parameters]
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(gradient.new_zeros(()).expand(shape) for shape in ctx.shapes)
