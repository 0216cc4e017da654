"""Micro-batches made ready for the objective: rows collated, signals fetched, weights of every sum worked out.

The idea: whatever a sum is divided by is a count of the whole step, known before its first forward (`StepCounts`), so a
micro-batch can be prepared alone. Left out: the losses (`opd.objective`), and what teachers sent (`opd.fetch`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opd.batching import Batch, MicroBatch, Plan, collate, collate_tokens
from opd.config import LearnerConfig, StageConfig
from opd.fetch import Fetcher
from opd.logits import TileSizes
from opd.losses import token_logprobs
from opd.objective import Distill, Imitate, Policy, Reinforce, Work
from opd.schedule import mtp_weight_at
from opd.types import Advantage, Demonstration, TeacherHidden, TeacherLogprobs


@dataclass(slots=True, kw_only=True, frozen=True)
class StepCounts:
    """Of a whole step, over all ranks."""

    step: int  # 0, 1, ...: the schedules' time
    num_loss_tokens: int
    num_rows: int
    num_mtp_tokens: int | None  # that multi-token prediction predicts; None where it is not trained

    @classmethod
    def of(cls, plan: Plan, step: int, *, trains_mtp: bool) -> StepCounts:
        predicted: int | None = None
        if trains_mtp:
            items = (item for rank in plan.ranks for micro_batch in rank for item in micro_batch.items)
            predicted = sum(int(item.trajectory.loss_mask[2:].sum()) for item in items)
        return cls(step=step, num_loss_tokens=plan.num_loss_tokens, num_rows=plan.num_rows, num_mtp_tokens=predicted)


class Preparer:
    """Of one rank. `reference` is the policy that GRPO's KL is to, where there is one."""

    def __init__(
        self,
        fetcher: Fetcher,
        reference: Policy | None,
        stage: StageConfig,
        learner: LearnerConfig,
        *,
        total_steps: int,
        device: str,
    ) -> None:
        self._fetcher, self._reference, self._stage, self._learner = fetcher, reference, stage, learner
        self._total_steps, self._device = total_steps, device

    def work(self, micro_batch: MicroBatch, head: Tensor | None, counts: StepCounts) -> Work:
        """`head` is that of the micro-batch's teacher, if its signals are hidden states. Raises ValueError as `Fetcher`
        does."""
        device, stage, items = self._device, self._stage, micro_batch.items
        batch = collate([item.trajectory for item in items], pad_id=0)
        signals = [item.signal for item in items]
        row_weights = torch.tensor([item.weight / counts.num_loss_tokens for item in items])
        weights = row_weights[batch.rows].to(device)
        row_values = torch.tensor([signal.value if isinstance(signal, Advantage) else 0.0 for signal in signals])
        advantages = row_values[batch.rows].to(device)
        batch = batch.to(device)
        match signals[0]:
            case Demonstration():
                task = Imitate()
            case Advantage():
                task = Reinforce(advantages=advantages, reference_logprobs=self._reference_logprobs(batch))
            case TeacherHidden():
                assert head is not None
                task = Distill(hidden=self._fetcher.hidden(micro_batch, head), head=head)
            case TeacherLogprobs():
                task = self._fetcher.logprobs(micro_batch)
        indexing = "dense" if counts.step < stage.indexer_dense_steps else "sparse"
        return Work(
            batch=batch,
            task=task,
            weights=weights,
            balance_weight=self._learner.balance_loss / counts.num_rows,
            index_weight=stage.indexer_loss / counts.num_rows,
            indexing=indexing if stage.indexer_loss > 0 else "off",
            mtp_weight=self._mtp_weight(counts),
        )

    def idle_work(self, counts: StepCounts) -> Work:
        """Two tokens that weigh nothing, for a rank that gathers weights with the others and has no rows left."""
        batch = collate_tokens([[0, 0]]).to(self._device)
        weights = torch.zeros(1, device=self._device)
        return Work(
            batch=batch, task=Imitate(), weights=weights, balance_weight=0.0, mtp_weight=self._mtp_weight(counts)
        )

    def probe_work(self, batch: Batch) -> Work:
        """For log-probabilities and nothing else."""
        weights = torch.zeros(len(batch.rows), device=self._device)
        return Work(batch=batch, task=Imitate(), weights=weights, balance_weight=0.0)

    def _mtp_weight(self, counts: StepCounts) -> float:
        if counts.num_mtp_tokens is None:
            return 0.0
        return mtp_weight_at(counts.step, self._stage, self._total_steps) / max(1, counts.num_mtp_tokens)

    @torch.no_grad()
    def _reference_logprobs(self, batch: Batch) -> Tensor | None:
        if self._reference is None:
            return None
        hidden = self._reference(batch.token_ids, batch.lengths).hidden[batch.rows, batch.positions]
        tiles = TileSizes(tile_tokens=self._learner.kl_tile_tokens, tile_vocab=self._learner.kl_tile_vocab)
        temperature = self._stage.temperature
        return token_logprobs(hidden, self._reference.head, batch.targets, temperature=temperature, **tiles)[0]
