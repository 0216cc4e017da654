"""One rank of the learner: a DeepSpeed engine around the policy, driven one optimizer step at a time.

The idea: the gradient of a step is that of the sum, over all ranks and micro-batches, of weighted token losses divided
by a count taken over the whole step, plus the expert balance loss divided by the number of rows. DeepSpeed is told to
sum over ranks and to divide by nothing, so micro-batches, padding, teacher order and number of ranks change only
rounding. A rank holds one teacher head at a time and fetches each once per step (V4 report 5.2.2).

This is the only file that imports deepspeed, and it does so when a Learner is built. It is over the usual length so
that the engine's contract (one forward and backward per micro-batch, the same collectives on every rank, skip together)
is read in one place. Left out: who runs a rank and where (`opd.actors`), the order of work (`opd.batching`), the losses
themselves (`opd.losses`).
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from opd.batching import Batch, MicroBatch, Plan, collate
from opd.config import ConfigError, DistillConfig, GrpoConfig, LearnerConfig, ModelConfig, StageConfig
from opd.losses import grpo_loss, logsumexp_at, reverse_kl, sampler_gap, token_logprobs
from opd.model import DeepseekV4, load_model
from opd.model.attention import Indexing
from opd.model.hub import HubModel
from opd.muon import build_optimizer
from opd.types import Advantage, Demonstration, Store, TeacherHead, TeacherHidden, WeightSnapshot
from opd.weights import head_hash, named_weights, save_checkpoint, snapshot_of

if TYPE_CHECKING:
    from opd.chat import Chat

PROBE_TOLERANCE = 1e-3  # nats: float32 sums in another order differ by less, another head or a missing norm by more
STATE_FORMAT = 1  # of a checkpoint's state folder
OVERALL = ("distill/reverse_kl", "grpo/clip_share", "grpo/kl_to_reference")  # means over all domains together


Policy = DeepseekV4 | HubModel


@dataclass(slots=True, kw_only=True)
class LearnerSettings:
    """What one rank needs to know. `stage` decides temperatures, clip and schedule by its own type."""

    model: ModelConfig  # with `path` set: the policy a stage starts from, which is also GRPO's reference
    learner: LearnerConfig
    stage: StageConfig
    total_steps: int  # of the stage, for the schedule
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    master_address: str = "127.0.0.1"  # of rank 0; unused with one rank
    master_port: int = 29500
    device: str = "cpu"  # cpu | cuda
    threads: int = 1  # torch threads


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


def learning_rate_at(step: int, stage: StageConfig, total_steps: int) -> float:
    """Of step 0, 1, ...: from a tenth up over `warmup_steps`, constant, and over the last `decay_fraction` of the steps
    down to a tenth, which the last step has."""
    rate = stage.learning_rate
    if step < stage.warmup_steps:
        rate *= 0.1 + 0.9 * step / stage.warmup_steps
    decay_steps = round(stage.decay_fraction * total_steps)
    into_decay = step - (total_steps - decay_steps) + 1
    if decay_steps and into_decay > 0:
        rate *= 1.0 - 0.9 * min(1.0, into_decay / decay_steps)
    return rate


def mtp_weight_at(step: int, stage: StageConfig, total_steps: int) -> float:
    """Of multi-token prediction at step 0, 1, ...: a third of `mtp_weight` once the learning rate decays."""
    is_decaying = step >= total_steps - round(stage.decay_fraction * total_steps)
    return stage.mtp_weight / 3 if is_decaying else stage.mtp_weight


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
        metrics[f"teacher/{teacher}/reverse_kl"] = sums.totals["distill/reverse_kl"] / sums.weight
    if teachers:
        metrics["distill/head_loads"] = max(rank.head_loads for rank in ranks)
    gap: dict[str, float] = {}
    for rank in ranks:
        _add_gap(gap, rank.gap)
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


def _add_gap(total: dict[str, float], part: dict[str, float]) -> None:
    for name, value in part.items():
        total[name] = max(total.get(name, 0.0), value) if name == "max_gap" else total.get(name, 0.0) + value


@dataclass(slots=True, kw_only=True)
class Imitate:
    """SFT: minus the log-probability of the loss tokens."""


@dataclass(slots=True, kw_only=True)
class Reinforce:
    """GRPO against the distribution that sampled."""

    advantages: Tensor  # float32 [N]
    reference_logprobs: Tensor | None  # float32 [N], of the policy the stage started from


@dataclass(slots=True, kw_only=True)
class Distill:
    """Exact reverse KL(p || q), p the policy and q one teacher."""

    hidden: Tensor  # [N, U]
    head: Tensor  # [V, U]


@dataclass(slots=True, kw_only=True)
class Work:
    """One micro-batch on its device."""

    batch: Batch
    task: Imitate | Reinforce | Distill
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
    mtp_nll: Tensor | None = None  # 0-dim, sum over the tokens it predicted


class Objective(nn.Module):
    """Policy and loss as one module, so that DeepSpeed's hooks see a forward that ends in a loss."""

    def __init__(self, model: Policy, settings: LearnerSettings) -> None:
        super().__init__()
        self.model = model
        self.stage = settings.stage
        self.tiles = {"tile_tokens": settings.learner.kl_tile_tokens, "tile_vocab": settings.learner.kl_tile_vocab}
        # ZeRO reduces gradients in the order in which they are ready, in buckets, and does not compare notes between
        # ranks: a parameter that gets no gradient on one rank only (a compressor, when all rows are shorter than a
        # block) would be summed with another one.
        self.is_tied = settings.learner.zero_stage > 0

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
        output = self.model(batch.token_ids, batch.lengths, **options)
        hidden = output.hidden[batch.rows, batch.positions]
        outcome, loss = self._loss(hidden, work)
        outcome.balance_loss, outcome.expert_load = output.balance_loss.detach(), output.expert_load
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
                result = grpo_loss(
                    differentiable,
                    batch.sampler_logprobs,
                    advantages,
                    work.weights,
                    clip=self.stage.clip,
                    reference_logprobs=reference,
                    kl_coefficient=self.stage.kl_coefficient,
                )
                loss, logprobs = result.loss, differentiable.detach()
                per_token = {"grpo/entropy": entropy, "grpo/clip_share": result.clipped}
                if reference is not None:
                    per_token["grpo/kl_to_reference"] = result.reference_kl
            case Distill(hidden=teacher_hidden, head=teacher_head):
                assert isinstance(self.stage, DistillConfig)
                result = reverse_kl(
                    hidden,
                    head,
                    teacher_hidden,
                    teacher_head,
                    work.weights,
                    batch.targets,
                    temperature=self.stage.kl_temperature,
                    **self.tiles,
                )
                loss, logprobs = result.loss, result.student_logprobs
                if self.stage.temperature not in (0.0, self.stage.kl_temperature):
                    logprobs, _ = token_logprobs(
                        hidden.detach(), head.detach(), batch.targets, temperature=self.stage.temperature, **self.tiles
                    )
                per_token = {
                    "distill/reverse_kl": result.kl,
                    "distill/student_entropy": result.student_entropy,
                    "distill/teacher_entropy": result.teacher_entropy,
                    "distill/top1_agreement": result.top1_agree,
                }
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


class Learner:
    """One rank. Every method but `snapshot` is called on all ranks, since they meet in collectives.

    Raises ConfigError for a combination of settings that cannot work and for a checkpoint that does not load. After an
    exception in `step` the learner is not usable.
    """

    def __init__(self, settings: LearnerSettings, store: Store) -> None:
        learner, stage = settings.learner, settings.stage
        if learner.zero_stage > 0 and learner.optimizer.name == "muon":
            raise ConfigError(
                f"learner.zero_stage={learner.zero_stage} with learner.optimizer.name=muon cannot work: ZeRO hands the "
                "optimizer flat slices, Muon needs matrices; use zero_stage=0 or optimizer.name=adamw"
            )
        if isinstance(stage, GrpoConfig) and stage.temperature <= 0:
            raise ConfigError(
                f"stages.grpo.temperature={stage.temperature} cannot work: the ratio needs a sampling distribution; "
                "it must be above 0"
            )
        self.settings, self._store = settings, store
        torch.set_num_threads(settings.threads)
        torch.manual_seed(settings.seed)
        _join(settings)
        model = load_model(settings.model, mtp=True).to(settings.device)
        model.eval()  # no dropout: the loss is a function of the policy that sampled
        self.model = model
        self._reference: Policy | None = None
        if isinstance(stage, GrpoConfig) and stage.kl_coefficient > 0:
            self._reference = copy.deepcopy(model).requires_grad_(False)
        self._mtp = model.mtp if isinstance(model, DeepseekV4) and len(model.mtp) else None
        self._trains_mtp = self._mtp is not None and stage.mtp_weight > 0
        if self._mtp is not None and not self._trains_mtp:
            self._mtp.requires_grad_(False)  # kept for the checkpoint, and no weight decay eats it
        with torch.no_grad():
            token = torch.zeros(1, 1, dtype=torch.int64, device=settings.device)
            options = {"mtp": True} if self._trains_mtp else {}
            load = model(token, torch.ones(1, dtype=torch.int64, device=settings.device), **options).expert_load
        self._no_load = torch.zeros_like(load, device=settings.device)
        self._objective = Objective(model, settings)
        self._engine = _start_engine(self._objective, settings)
        self._optimizer: torch.optim.Optimizer = self._engine.optimizer
        if learner.zero_stage > 0:
            self._optimizer = self._engine.optimizer.optimizer  # the one over this rank's slices
        self._verified_heads: set[tuple[str, str]] = set()  # (teacher, hash) whose bytes were hashed here
        self._step = 0
        self._num_skipped = 0

    def step(self, plan: Plan, heads: dict[str, TeacherHead]) -> StepStats:
        """One optimizer step over this rank's micro-batches of `plan`; `heads` by teacher name.

        Raises ValueError, naming teacher and trajectory, for hidden states that do not belong to the head: another
        hash, another number of states than loss tokens, or logits whose log-sum-exp is not the teacher's.
        A loss or gradient that is not finite on any rank leaves all weights and optimizer states as they are;
        `StepStats.skipped` says why, and the schedule moves on.
        """
        started = time.perf_counter()
        batches = plan.ranks[self.settings.rank]
        _check_hashes(batches, heads)
        rate = learning_rate_at(self._step, self.settings.stage, self.settings.total_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        stats = StepStats(num_loss_tokens=plan.num_loss_tokens, learning_rate=rate)
        if self._trains_mtp:
            items = (item for rank in plan.ranks for micro_batch in rank for item in micro_batch.items)
            stats.num_mtp_tokens = sum(int(item.trajectory.loss_mask[2:].sum()) for item in items)
        load = self._no_load.clone()
        problems: list[str] = []
        head: Tensor | None = None
        held: str | None = None
        for index, micro_batch in enumerate(batches):
            if micro_batch.teacher is not None and micro_batch.teacher != held:
                head = None  # released before the next one is fetched
                held = micro_batch.teacher
                head = self._fetch_head(heads[held])
                stats.head_loads += 1
            self._engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
            if micro_batch.items:
                load += self._learn_from(micro_batch, head, plan, stats, problems)
            else:
                loss, _ = self._engine(None)  # the collectives of the other ranks need their partner
                self._engine.backward(loss)
        head = None
        self._update(stats, load, problems)
        self._step += 1
        stats.num_skipped_steps = self._num_skipped
        stats.seconds = time.perf_counter() - started
        return stats

    def _learn_from(
        self, micro_batch: MicroBatch, head: Tensor | None, plan: Plan, stats: StepStats, problems: list[str]
    ) -> Tensor:
        """Forward, backward and numbers of one micro-batch; returns its expert load. Holds on to nothing."""
        work = self._work(micro_batch, head, plan, stats.num_mtp_tokens)
        loss, outcome = self._engine(work)
        self._record(stats, micro_batch, work, outcome, plan)
        if not math.isfinite(loss.item()):
            names = [item.trajectory.id for item in micro_batch.items]
            shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
            problems.append(
                f"the loss of a micro-batch of {len(names)} trajectories ({shown}; teacher "
                f"{micro_batch.teacher or 'none'}) is {loss.item()}"
            )
            loss = loss * math.nan  # so that all ranks see it in the norm of the gradient
        self._engine.backward(loss)
        return outcome.expert_load.to(self.settings.device)

    def snapshot(self, policy_version: int) -> WeightSnapshot:
        """A copy of the policy's weights on the CPU, packed as MXFP4 where `model.fp4` says so."""
        return snapshot_of(self.model, policy_version, self.settings.model.fp4)

    def publish(self, policy_version: int) -> Any:
        """Puts a snapshot into the store once and returns its handle, which every rollout worker can read."""
        return self._store.put(self.snapshot(policy_version))

    def save(self, folder: str | Path, chat: Chat | None = None) -> None:
        """Writes `folder`/hf (opens with transformers) and `folder`/state (the rest that exact resume needs).

        Rank 0 writes the weights; each rank writes its own part of the state. Safetensors and JSON, no pickle.
        """
        settings, folder = self.settings, Path(folder)
        state = folder / "state"
        state.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {"rng": torch.get_rng_state()}
        if settings.rank == 0 or settings.learner.zero_stage > 0:
            for index, values in self._optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer/{index}/{name}": value.cpu().contiguous() for name, value in values.items()}
        save_file(tensors, state / f"rank_{settings.rank}.safetensors")
        if settings.rank == 0:
            save_checkpoint(folder / "hf", self.model, chat)
            described = {**self._layout(), "step": self._step, "num_skipped_steps": self._num_skipped}
            (state / "learner.json").write_text(json.dumps(described, indent=2), encoding="ascii")

    def load(self, folder: str | Path) -> None:
        """Takes up what `save` wrote: the next step is bitwise the one that would have followed.

        Raises ConfigError for a folder that lacks the files or was written with another optimizer, ZeRO stage or (above
        stage 0, where each rank has its own slice) number of ranks. Learning rate, betas and the like are those of the
        present settings; GRPO's reference stays the policy the stage started from.
        """
        settings, folder = self.settings, Path(folder)
        state = folder / "state"
        if not (state / "learner.json").is_file():
            raise ConfigError(f"{state / 'learner.json'} does not exist; expected the state folder of a checkpoint")
        saved = json.loads((state / "learner.json").read_text(encoding="ascii"))
        for key, value in self._layout().items():
            if saved.get(key) != value:
                raise ConfigError(f"{state} was saved with {key}={saved.get(key)}, this run has {key}={value}")
        loaded = named_weights(load_model(settings.model, path=str(folder / "hf"), mtp=True))
        with torch.no_grad():
            for name, weight in named_weights(self.model).items():
                weight.copy_(loaded[name])
        if settings.learner.zero_stage > 0:
            self._engine.optimizer.refresh_fp32_params()

        own = state / f"rank_{settings.rank}.safetensors"
        owner = own if settings.learner.zero_stage > 0 else state / "rank_0.safetensors"
        if not owner.is_file():
            raise ConfigError(f"{owner} does not exist; the checkpoint is not complete")
        values: dict[int, dict[str, Tensor]] = {}
        for key, tensor in load_file(owner).items():
            if key.startswith("optimizer/"):
                _, index, name = key.split("/")
                values.setdefault(int(index), {})[name] = tensor
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": values, "param_groups": groups})
        if own.is_file():
            torch.set_rng_state(load_file(own)["rng"])
        self._step, self._num_skipped = saved["step"], saved["num_skipped_steps"]

    def close(self) -> None:
        """Lets go of the engine's memory; the process group stays for the next Learner of this process."""
        self._engine.destroy()

    def _layout(self) -> dict[str, Any]:
        """What must agree between a saved state and the learner that takes it up."""
        learner = self.settings.learner
        layout: dict[str, Any] = {
            "format": STATE_FORMAT,
            "learner.optimizer.name": learner.optimizer.name,
            "learner.zero_stage": learner.zero_stage,
        }
        if learner.zero_stage > 0:
            layout["learner.num_ranks"] = self.settings.world_size
        if self._mtp is not None:  # whose parameters the optimizer has, or has not
            layout["mtp_weight > 0"] = self._trains_mtp
        return layout

    def _fetch_head(self, head: TeacherHead) -> Tensor:
        """The teacher's head [V, U] on the device; its bytes are hashed the first time a hash is seen."""
        weight: Tensor = self._store.get(head.weight)
        if (head.teacher, head.content_hash) not in self._verified_heads:
            if (actual := head_hash(weight)) != head.content_hash:
                raise ValueError(
                    f"the output head delivered for teacher {head.teacher} has hash {actual[:12]}, its record says "
                    f"{head.content_hash[:12]}"
                )
            vocab_size = self.model.head.shape[0]
            if weight.shape[0] != vocab_size:
                raise ValueError(
                    f"teacher {head.teacher} has a vocabulary of {weight.shape[0]} entries, the student one of "
                    f"{vocab_size}"
                )
            self._verified_heads.add((head.teacher, head.content_hash))
        return weight.to(self.settings.device)

    def _work(self, micro_batch: MicroBatch, head: Tensor | None, plan: Plan, num_mtp_tokens: int) -> Work:
        device, items = self.settings.device, micro_batch.items
        batch = collate([item.trajectory for item in items], pad_id=0)
        signals = [item.signal for item in items]
        row_weights = torch.tensor([_weight(signal) / plan.num_loss_tokens for signal in signals])
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
                task = Distill(hidden=self._fetch_hidden(micro_batch, head), head=head)
        stage = self.settings.stage
        indexing = "dense" if self._step < stage.indexer_dense_steps else "sparse"
        mtp_weight = mtp_weight_at(self._step, stage, self.settings.total_steps) / max(1, num_mtp_tokens)
        return Work(
            batch=batch,
            task=task,
            weights=weights,
            balance_weight=self.settings.learner.balance_loss / plan.num_rows,
            index_weight=stage.indexer_loss / plan.num_rows,
            indexing=indexing if stage.indexer_loss > 0 else "off",
            mtp_weight=mtp_weight if self._trains_mtp else 0.0,
        )

    @torch.no_grad()
    def _reference_logprobs(self, batch: Batch) -> Tensor | None:
        if self._reference is None:
            return None
        hidden = self._reference(batch.token_ids, batch.lengths).hidden[batch.rows, batch.positions]
        temperature, tiles = self.settings.stage.temperature, self._objective.tiles
        return token_logprobs(hidden, self._reference.head, batch.targets, temperature=temperature, **tiles)[0]

    def _fetch_hidden(self, micro_batch: MicroBatch, head: Tensor) -> Tensor:
        """The teacher's states [N, U] of a micro-batch, proven to belong to `head`."""
        parts, probes, expected, owners = [], [], [], []
        for item in micro_batch.items:
            signal, trajectory = item.signal, item.trajectory
            assert isinstance(signal, TeacherHidden)
            hidden: Tensor = self._store.get(signal.hidden)
            if hidden.shape != (trajectory.num_loss_tokens, head.shape[1]):
                raise ValueError(
                    f"teacher {signal.teacher} delivered hidden states {list(hidden.shape)} for trajectory "
                    f"{trajectory.id}; {trajectory.num_loss_tokens} loss tokens and its head ask for "
                    f"{[trajectory.num_loss_tokens, head.shape[1]]}"
                )
            parts.append(hidden.to(self.settings.device))
            probes.append(parts[-1][list(signal.probe_positions)])
            expected.extend(signal.probe_lse)
            owners.extend([item] * len(signal.probe_lse))
        actual = logsumexp_at(torch.cat(probes), head, tile_vocab=self.settings.learner.kl_tile_vocab).tolist()
        for got, wanted, item in zip(actual, expected, owners, strict=True):
            if not abs(got - wanted) <= PROBE_TOLERANCE:  # also refuses NaN
                raise ValueError(
                    f"teacher {item.teacher}: hidden states of trajectory {item.trajectory.id} times its output head "
                    f"have a log-sum-exp of {got:.6f}, the teacher computed {wanted:.6f}; the head is another one, or "
                    "the states were taken before the final norm"
                )
        return torch.cat(parts)

    def _record(self, stats: StepStats, micro_batch: MicroBatch, work: Work, outcome: Outcome, plan: Plan) -> None:
        """Adds a micro-batch's numbers to its domains and its teacher."""
        stats.loss += outcome.loss.item()
        stats.balance_loss += outcome.balance_loss.item() / plan.num_rows
        if outcome.index_loss is not None and outcome.index_recall is not None:
            stats.index_loss += outcome.index_loss.item() / plan.num_rows
            recall, number = outcome.index_recall.tolist()
            stats.index_recall += recall
            stats.index_queries += number
        if outcome.mtp_nll is not None:
            stats.mtp_nll += outcome.mtp_nll.item() / max(1, stats.num_mtp_tokens)
        rows, items = work.batch.rows, micro_batch.items
        values = torch.stack([value.double() for value in outcome.per_token.values()])
        totals = values.new_zeros(len(values), len(items)).index_add_(1, rows, values).tolist()
        largest = [-math.inf] * len(items)
        if (kl := outcome.per_token.get("distill/reverse_kl")) is not None:
            largest = kl.new_full((len(items),), -math.inf).scatter_reduce_(0, rows, kl, "amax").tolist()
        for row, item in enumerate(items):
            weight, tokens = _weight(item.signal), item.trajectory.num_loss_tokens
            sums = Sums(tokens=tokens, weight=weight * tokens, kl_max=largest[row])
            sums.totals = {name: weight * total[row] for name, total in zip(outcome.per_token, totals, strict=True)}
            stats.domains.setdefault(item.trajectory.domain, Sums()).add(sums)
            if item.teacher is not None:
                stats.teachers.setdefault(item.teacher, Sums()).add(sums)
        if not isinstance(work.task, Imitate) and self.settings.stage.temperature > 0:
            _add_gap(stats.gap, sampler_gap(outcome.logprobs, work.batch.sampler_logprobs))

    def _update(self, stats: StepStats, load: Tensor, problems: list[str]) -> None:
        """Clips, steps both optimizers and the selection bias; or skips the step, on all ranks alike."""
        learner = self.settings.learner
        if learner.zero_stage > 0:
            self._engine.step()  # ZeRO clips, and skips by itself when the norm is not finite
            stats.grad_norm = float(self._engine.get_global_grad_norm())
            is_skipped = bool(self._engine.optimizer.overflow)
        else:
            # Before the optimizer, not inside it: Muon's update has a norm of its own.
            parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            stats.grad_norm = norm.item()
            is_skipped = not math.isfinite(stats.grad_norm)
            if is_skipped:
                self._engine.zero_grad()
            else:
                if learner.grad_clip > 0:
                    torch.nn.utils.clip_grads_with_norm_(parameters, learner.grad_clip, norm)
                self._engine.step()
        if is_skipped:
            self._num_skipped += 1
            stats.skipped = tuple(problems) or (f"the gradient's norm is {stats.grad_norm}",)
        if load.numel():
            if self.settings.world_size > 1:
                dist.all_reduce(load)
            stats.load_imbalance = (load.amax(1) / load.double().mean(1).clamp_min(1e-9)).max().item()
            if not is_skipped and learner.balance_bias_speed > 0:
                self.model.update_selection_bias(load, learner.balance_bias_speed)


def _weight(signal: Advantage | Demonstration | TeacherHidden) -> float:
    return signal.weight if isinstance(signal, TeacherHidden) else 1.0


def _check_hashes(batches: Sequence[MicroBatch], heads: dict[str, TeacherHead]) -> None:
    """Before the first forward: every hidden state names the head that is at hand."""
    for item in (item for batch in batches for item in batch.items):
        if isinstance(signal := item.signal, TeacherHidden):
            if signal.teacher not in heads:
                raise ValueError(
                    f"trajectory {item.trajectory.id} is scored by teacher {signal.teacher}, whose output head is not "
                    f"here; there are heads of: {', '.join(heads) or 'none'}"
                )
            if signal.head_hash != heads[signal.teacher].content_hash:
                raise ValueError(
                    f"teacher {signal.teacher}: hidden states of trajectory {item.trajectory.id} belong to the output "
                    f"head {signal.head_hash[:12]}, the head at hand is {heads[signal.teacher].content_hash[:12]}"
                )


def _join(settings: LearnerSettings) -> None:
    """Makes this process a member of the learner's process group, or checks that it already is."""
    if dist.is_initialized():
        if (dist.get_rank(), dist.get_world_size()) != (settings.rank, settings.world_size):
            raise ValueError(
                f"this process is rank {dist.get_rank()} of {dist.get_world_size()}; it cannot also be rank "
                f"{settings.rank} of {settings.world_size}"
            )
        return
    backend = "nccl" if settings.device == "cuda" else "gloo"
    rank, world_size = settings.rank, settings.world_size
    if world_size == 1:  # opens no port
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    else:
        address = f"tcp://{settings.master_address}:{settings.master_port}"
        dist.init_process_group(backend, init_method=address, rank=rank, world_size=world_size)


def _start_engine(objective: Objective, settings: LearnerSettings) -> Any:
    """The DeepSpeed engine (its type is not imported here). It sums gradients over ranks and scales nothing."""
    os.environ["DS_ACCELERATOR"] = settings.device
    os.environ.setdefault("LOCAL_RANK", "0")  # each rank sees its own devices only
    import deepspeed
    import deepspeed.ops

    # A compiled all-reduce within one host; gloo does the same work without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    learner = settings.learner
    optimizer = build_optimizer(objective.model, learner.optimizer, settings.stage.learning_rate)
    config = {
        "train_micro_batch_size_per_gpu": 1,  # counted by no one: see `Plan.num_loss_tokens`
        "gradient_accumulation_steps": 1,  # the boundary is set by hand, so nothing is divided by this
        "gradient_allreduce_op": "sum",
        "gradient_clipping": learner.grad_clip if learner.zero_stage > 0 else 0.0,
        "zero_optimization": {"stage": learner.zero_stage},
        "steps_per_print": None,
    }
    engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=config)
    return engine
