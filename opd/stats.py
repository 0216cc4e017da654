"""The numbers of a step: what a rank counts, and how ranks merge into metrics.

The one idea: everything is a sum over loss tokens beside the sum of its weights, so that merging is adding and a mean
is taken once, at the end. Left out: the names' meaning (`opd.metrics.CATALOGUE`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from opd.batching import MicroBatch
from opd.objective import Outcome, Work

OVERALL = ("distill/reverse_kl", "grpo/clip_share", "grpo/kl_to_reference")  # means over all domains together
OF_A_TEACHER = ("reverse_kl", "student_entropy", "teacher_entropy", "top16_overlap")


@dataclass(slots=True, kw_only=True)
class Sums:
    """Sums over the loss tokens of one domain or teacher, which ranks merge by adding."""

    tokens: int = 0
    weight: float = 0.0  # sum of the tokens' signal weights, by which means are taken
    totals: dict[str, float] = field(default_factory=dict)  # metric -> weighted sum
    kl_max: float = -math.inf  # largest KL of one token; -inf without a teacher

    def add(self, other: Sums) -> None:
        self.tokens += other.tokens
        self.weight += other.weight
        self.kl_max = max(self.kl_max, other.kl_max)
        for name, total in other.totals.items():
            self.totals[name] = self.totals.get(name, 0.0) + total


@dataclass(slots=True, kw_only=True)
class StepStats:
    """One rank's part of a step. Losses are parts of the step's loss: over all ranks they sum to it."""

    num_loss_tokens: int  # of the whole step
    learning_rate: float
    loss: float = 0.0  # without the balance loss
    balance_loss: float = 0.0  # per row, before its coefficient
    index_loss: float = 0.0  # the indexers', per row, before its weight
    index_recall: float = 0.0  # sum over `index_queries` sampled queries
    index_queries: float = 0.0
    rerouted: int = 0  # pairs of a token and a layer at which the router would choose other than the recorded experts
    replayed: int = 0  # pairs with recorded experts
    mtp_nll: float = 0.0  # sum over this rank's tokens / `num_mtp_tokens`, before its weight
    num_mtp_tokens: int = 0  # of the whole step, loss tokens that multi-token prediction was trained on
    domains: dict[str, Sums] = field(default_factory=dict)
    teachers: dict[str, Sums] = field(default_factory=dict)
    gap: dict[str, float] = field(default_factory=dict)  # of `opd.losses.sampler_gap`, policy against sampler
    grad_norm: float = 0.0  # of the whole step, before clipping
    load_imbalance: float = 0.0  # of the whole step: largest expert load of a layer over the mean; 0 for dense models
    head_loads: int = 0
    skipped: tuple[str, ...] = ()  # why the weights were not updated; empty if they were
    num_skipped_steps: int = 0  # of the stage so far
    seconds: float = 0.0


def record(stats: StepStats, micro_batch: MicroBatch, work: Work, outcome: Outcome, num_rows: int) -> None:
    """Adds a micro-batch's numbers to its domains and its teacher; `num_rows` is of the whole step."""
    stats.loss += outcome.loss.item()
    stats.balance_loss += outcome.balance_loss.item() / num_rows
    if outcome.index_loss is not None and outcome.index_recall is not None:
        stats.index_loss += outcome.index_loss.item() / num_rows
        recall, number = outcome.index_recall.tolist()
        stats.index_recall += recall
        stats.index_queries += number
    if outcome.rerouted is not None:
        rerouted, replayed = outcome.rerouted.tolist()
        stats.rerouted += rerouted
        stats.replayed += replayed
    if outcome.mtp_nll is not None:
        stats.mtp_nll += outcome.mtp_nll.item() / max(1, stats.num_mtp_tokens)
    rows, items = work.batch.rows, micro_batch.items
    values = torch.stack([value.double() for value in outcome.per_token.values()])
    totals = values.new_zeros(len(values), len(items)).index_add_(1, rows, values).tolist()
    largest = [-math.inf] * len(items)
    if (kl := outcome.per_token.get("distill/reverse_kl")) is not None:
        largest = kl.new_full((len(items),), -math.inf).scatter_reduce_(0, rows, kl, "amax").tolist()
    for row, item in enumerate(items):
        weight, tokens = item.weight, item.trajectory.num_loss_tokens
        sums = Sums(tokens=tokens, weight=weight * tokens, kl_max=largest[row])
        sums.totals = {name: weight * total[row] for name, total in zip(outcome.per_token, totals, strict=True)}
        stats.domains.setdefault(item.trajectory.domain, Sums()).add(sums)
        if item.teacher is not None:
            stats.teachers.setdefault(item.teacher, Sums()).add(sums)


def merge_stats(ranks: Sequence[StepStats]) -> dict[str, float]:
    """The metrics of a step, by the names of `opd.metrics.CATALOGUE`, from what all ranks returned."""
    first = ranks[0]
    metrics = {
        "train/loss": sum(rank.loss for rank in ranks),
        "train/balance_loss": sum(rank.balance_loss for rank in ranks),
        "train/load_imbalance": first.load_imbalance,
        "train/grad_norm": first.grad_norm,
        "train/lr": first.learning_rate,
        "train/skipped_steps": first.num_skipped_steps,
        "train/tokens": first.num_loss_tokens,
    }
    if queries := sum(rank.index_queries for rank in ranks):
        metrics["train/index_loss"] = sum(rank.index_loss for rank in ranks)
        metrics["train/index_recall"] = sum(rank.index_recall for rank in ranks) / queries
    if replayed := sum(rank.replayed for rank in ranks):
        metrics["gap/rerouted_share"] = sum(rank.rerouted for rank in ranks) / replayed
    if first.num_mtp_tokens:
        metrics["sft/mtp_nll"] = sum(rank.mtp_nll for rank in ranks)
    domains, teachers, everything = _merged(r.domains for r in ranks), _merged(r.teachers for r in ranks), Sums()
    for domain, sums in domains.items():
        everything.add(sums)
        for name, total in sums.totals.items():
            if name not in OVERALL or name == "distill/reverse_kl":
                metrics[f"{name}/{domain}"] = total / sums.weight
        if sums.kl_max > -math.inf:
            metrics[f"distill/kl_max/{domain}"] = sums.kl_max
    for name in OVERALL:
        if name in everything.totals:
            metrics[name] = everything.totals[name] / everything.weight
    for teacher, sums in teachers.items():
        metrics[f"teacher/{teacher}/tokens"] = sums.tokens
        metrics[f"teacher/{teacher}/token_share"] = sums.tokens / sum(other.tokens for other in teachers.values())
        for name in OF_A_TEACHER:
            if (total := sums.totals.get(f"distill/{name}")) is not None:
                metrics[f"teacher/{teacher}/{name}"] = total / sums.weight
    if teachers:
        metrics["distill/head_loads"] = max(rank.head_loads for rank in ranks)
    gap: dict[str, float] = {}
    for rank in ranks:
        add_gap(gap, rank.gap)
    if num := gap.get("num_tokens"):
        metrics |= {
            "gap/k1": gap["k1"] / num,
            "gap/k3": gap["k3"] / num,
            "gap/max_logprob_gap": gap["max_gap"],
            "gap/ess": gap["ratio"] ** 2 / (num * gap["ratio_squared"]),
            "gap/outside_share": gap["num_outside"] / num,
            "gap/mean_ratio": gap["ratio"] / num,
        }
    return metrics


def _merged(parts: Iterable[dict[str, Sums]]) -> dict[str, Sums]:
    merged: dict[str, Sums] = {}
    for part in parts:
        for name, sums in part.items():
            merged.setdefault(name, Sums()).add(sums)
    return {name: merged[name] for name in sorted(merged) if merged[name].weight > 0}


def add_gap(total: dict[str, float], part: dict[str, float]) -> None:
    """Adds the sums of `opd.losses.sampler_gap` over other tokens to `total`."""
    for name, value in part.items():
        total[name] = max(total.get(name, 0.0), value) if name == "max_gap" else total.get(name, 0.0) + value
