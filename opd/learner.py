"""One rank of the learner: the policy, its engine, and the order of work of a step.

The idea: the gradient of a step is that of the sum, over all ranks and micro-batches, of weighted token losses divided
by a count taken over the whole step, plus the expert balance loss divided by the number of rows. The engine sums over
ranks and divides by nothing, so micro-batches, padding, teacher order and number of ranks change only rounding. A rank
holds one teacher head at a time and fetches each once per step (V4 report 5.2.2).

Left out: what an engine is (`opd.engine`), who runs a rank and where (`opd.actors`), the order of work
(`opd.batching`), what a micro-batch is to the model (`opd.prepare`), the losses (`opd.objective`), what teachers sent
(`opd.fetch`), files (`opd.state`).
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from opd import guards
from opd.adapter import adapter_weights, add_adapters, base_hash, load_adapter, merged, save_adapter
from opd.batching import MicroBatch, Plan, collate_tokens
from opd.compute import multiply_in_bfloat16, recompute_layers
from opd.config import ConfigError, GrpoConfig, LearnerConfig, ModelConfig, StageConfig, check_zero
from opd.engine import Engine, loading_divided
from opd.fetch import Fetcher
from opd.group import Host, failing_together, join
from opd.losses import sampler_gap
from opd.memory import keep_freed_memory
from opd.model import DeepseekV4, HubModel, load_model
from opd.objective import Imitate, Objective, Policy, Work
from opd.prepare import Preparer, StepCounts
from opd.schedule import learning_rate_at as learning_rate_at
from opd.schedule import mtp_weight_at as mtp_weight_at
from opd.state import HeldWeights, SavedState, Writer, write_description, write_rank
from opd.stats import StepStats, add_gap, record
from opd.stats import merge_stats as merge_stats  # what ranks return is read with it
from opd.stored import stored_tensors
from opd.types import Store, TeacherHead, TeacherHidden, WeightSnapshot
from opd.weights import save_checkpoint, snapshot_of

if TYPE_CHECKING:
    from opd.chat import Chat


@dataclass(slots=True, kw_only=True)
class LearnerSettings:
    """What one rank needs to know. `stage` decides temperatures, clip, age of rollouts and schedule by its own type."""

    model: ModelConfig  # with `path` set: the policy a stage starts from, which is also GRPO's reference
    learner: LearnerConfig
    stage: StageConfig
    total_steps: int  # of the stage, for the schedule
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    # Where ranks meet; unused with one rank. Port 0: `Learner.meet_at` and `Learner.join` settle it, and the address is
    # one that all ranks can reach, such as the driver's.
    master_address: str = "127.0.0.1"
    master_port: int = 29500
    device: str = "cpu"  # cpu | cuda
    threads: int = 1  # torch threads
    dump_dir: str = ""  # folder for micro-batches whose numbers are not finite; "": they are not written


class Learner:
    """One rank. Every method but `snapshot` and `probe` is called on all ranks, since they meet in collectives; those
    two need all ranks under ZeRO stage 3 only.

    Raises ConfigError for a combination of settings that cannot work and for a checkpoint that does not load. After an
    exception in any method the learner is not usable, on no rank: all of them raise it, see `failing_together`.
    """

    def __init__(self, settings: LearnerSettings, store: Store) -> None:
        stage = settings.stage
        check_zero(settings.learner)
        if isinstance(stage, GrpoConfig) and stage.temperature <= 0:
            raise ConfigError(
                f"stages.grpo.temperature={stage.temperature} cannot work: the ratio needs a sampling distribution; "
                "it must be above 0"
            )
        self.settings, self._store = settings, store
        self._host: Host | None = None
        self._writer = Writer()
        torch.set_num_threads(settings.threads)
        keep_freed_memory()
        if settings.world_size == 1 or settings.master_port:
            self.join(settings.master_address, settings.master_port)

    def meet_at(self) -> tuple[str, int]:
        """Rank 0 listens on its own machine: the address and port that every rank's `join` is to be given."""
        self._host = Host(self.settings.master_address)
        return self._host.address, self._host.port

    def join(self, address: str, port: int) -> None:
        """Meets the other ranks and builds the engine. The constructor does so where the settings say where."""
        settings = self.settings
        backend = "nccl" if settings.device == "cuda" else "gloo"
        join(settings.rank, settings.world_size, backend, address, port, self._host)
        with failing_together():
            self._build()

    def _build(self) -> None:
        settings, learner, stage = self.settings, self.settings.learner, self.settings.stage
        torch.manual_seed(settings.seed)
        self.model = model = self._load()
        self._base_hash = ""
        if settings.model.lora.rank > 0:
            assert isinstance(model, HubModel)
            self._base_hash = base_hash(settings.model.path or "", settings.model.revision)
            add_adapters(model, settings.model.lora, settings.model.path or "")
        if learner.precision == "bf16":
            multiply_in_bfloat16(model)
        reference: Policy | None = None
        if isinstance(stage, GrpoConfig) and stage.kl_coefficient > 0:
            reference = copy.deepcopy(model).requires_grad_(False)
        self._mtp = model.mtp if isinstance(model, DeepseekV4) and len(model.mtp) else None
        self._trains_mtp = self._mtp is not None and stage.mtp_weight > 0
        if self._mtp is not None and not self._trains_mtp:
            self._mtp.requires_grad_(False)  # kept for the checkpoint, and no weight decay eats it
        self._no_load = _no_load(model, self._trains_mtp).to(settings.device)
        vocab_size = getattr(model.head, "ds_shape", model.head.shape)[0]
        self._fetcher = Fetcher(self._store, settings.device, vocab_size=vocab_size, tile_vocab=learner.kl_tile_vocab)
        self._preparer = Preparer(
            self._fetcher, reference, stage, learner, total_steps=settings.total_steps, device=settings.device
        )
        objective = Objective(model, stage, learner)
        if learner.activation_checkpointing:
            recompute_layers(model)
        self._engine = Engine(objective, learner, stage.learning_rate, settings.device)
        self._step = 0
        self._version: int | None = None  # of the present weights, known once they were published
        self._num_skipped = self._skipped_in_a_row = self._num_dumps = 0

    def _load(self) -> Policy:
        settings, learner, stage = self.settings, self.settings.learner, self.settings.stage
        keeps_start = getattr(stage, "kl_coefficient", 0.0) > 0 or getattr(stage, "reference_kl", 0.0) > 0
        divides = learner.zero_stage == 3 and settings.model.family == "hf" and settings.model.fp4 == "none"
        # A copy to compare with is made of the whole model, and transformers divides a model with accelerate only.
        divides = divides and not keeps_start and importlib.util.find_spec("accelerate") is not None
        with loading_divided(settings.device) if divides else contextlib.nullcontext():
            model = load_model(settings.model, mtp=True).to(settings.device)
        return model.eval()  # no dropout: the loss is a function of the policy that sampled

    def step(self, plan: Plan, heads: dict[str, TeacherHead]) -> StepStats:
        """One optimizer step over this rank's micro-batches of `plan`; `heads` by teacher name.

        Raises ValueError, naming teacher and trajectory, for hidden states that do not belong to the head (another
        hash, another number of states than loss tokens, or logits whose log-sum-exp is not the teacher's), for tokens
        sampled by older weights than the stage allows, and for a plan that divides by a wrong count or is not the
        other ranks'.
        A loss or gradient that is not finite on any rank leaves all weights and optimizer states as they are;
        `StepStats.skipped` says why, the micro-batch is written to `dump_dir`, and the schedule moves on. Raises
        RuntimeError after `learner.max_skipped_steps` of them in a row.
        """
        with failing_together():
            return self._step_together(plan, heads)

    def _step_together(self, plan: Plan, heads: dict[str, TeacherHead]) -> StepStats:
        started = time.perf_counter()
        settings, stage = self.settings, self.settings.stage
        batches = plan.ranks[settings.rank]
        guards.check_normaliser(plan)
        if self._version is not None:
            guards.check_age(plan, self._version, getattr(stage, "max_staleness", 0))
        self._fetcher.check(batches, heads)
        if settings.world_size > 1:
            guards.check_same_plan(plan, self._step)
        rate = learning_rate_at(self._step, stage, settings.total_steps)
        stats = StepStats(num_loss_tokens=plan.num_loss_tokens, learning_rate=rate)
        counts = StepCounts.of(plan, self._step, trains_mtp=self._trains_mtp)
        stats.num_mtp_tokens = counts.num_mtp_tokens or 0
        load = self._no_load.clone()
        problems: list[str] = []
        head: Tensor | None = None
        held: str | None = None
        for index, micro_batch in enumerate(batches):
            if micro_batch.teacher != held:
                head, held = None, micro_batch.teacher  # released before the next one is fetched
                if held is not None and isinstance(micro_batch.items[0].signal, TeacherHidden):
                    head = self._fetcher.head(heads[held])
                    stats.head_loads += 1
            is_last = index == len(batches) - 1
            if micro_batch.items:
                load += self._learn_from(micro_batch, head, counts, stats, problems, is_last)
            else:  # the collectives of the other ranks need their partner
                work = self._preparer.idle_work(counts) if self._engine.divides_weights else None
                loss, _ = self._engine.forward(work, is_last=is_last)
                self._engine.backward(loss)
        head = None
        self._update(stats, batches, load, problems)
        self._step += 1
        stats.num_skipped_steps = self._num_skipped
        stats.seconds = time.perf_counter() - started
        return stats

    def _learn_from(
        self,
        micro_batch: MicroBatch,
        head: Tensor | None,
        counts: StepCounts,
        stats: StepStats,
        problems: list[str],
        is_last: bool,
    ) -> Tensor:
        """Forward, backward and numbers of one micro-batch; returns its expert load. Holds on to nothing."""
        work = self._preparer.work(micro_batch, head, counts)
        loss, outcome = self._engine.forward(work, is_last=is_last)
        assert outcome is not None
        record(stats, micro_batch, work, outcome, counts.num_rows)
        if not isinstance(work.task, Imitate) and self.settings.stage.temperature > 0:
            add_gap(stats.gap, sampler_gap(outcome.logprobs, work.batch.sampler_logprobs))
        if not math.isfinite(loss.item()):
            names = [item.trajectory.id for item in micro_batch.items]
            shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
            problems.append(
                f"the loss of a micro-batch of {len(names)} trajectories ({shown}; teacher "
                f"{micro_batch.teacher or 'none'}) is {loss.item()}"
            )
            self._dump(micro_batch, work, problems[-1])
            loss = loss * math.nan  # so that all ranks see it in the norm of the gradient
        self._engine.backward(loss)
        return outcome.expert_load.to(self.settings.device)

    def _update(self, stats: StepStats, batches: Sequence[MicroBatch], load: Tensor, problems: list[str]) -> None:
        """Steps the optimizer and the selection bias; or skips the step, on all ranks alike."""
        settings, learner = self.settings, self.settings.learner
        stats.grad_norm = self._engine.update(stats.learning_rate)
        is_skipped = not math.isfinite(stats.grad_norm)
        if is_skipped:
            self._num_skipped += 1
            self._skipped_in_a_row += 1
            stats.skipped = tuple(problems) or (f"the gradient's norm is {stats.grad_norm}",)
            is_named = torch.tensor(len(problems), device=settings.device)
            if settings.world_size > 1:
                dist.all_reduce(is_named)
            for micro_batch in batches if not is_named else ():  # any of them may be the one
                if micro_batch.items:
                    self._dump(micro_batch, None, stats.skipped[0])
        else:
            self._skipped_in_a_row = 0
        if load.numel():
            if settings.world_size > 1:
                dist.all_reduce(load)
            stats.load_imbalance = (load.amax(1) / load.double().mean(1).clamp_min(1e-9)).max().item()
            if not is_skipped and learner.balance_bias_speed > 0:
                self.model.update_selection_bias(load, learner.balance_bias_speed)
        if self._skipped_in_a_row >= learner.max_skipped_steps:
            raise guards.too_many_skipped(
                self._skipped_in_a_row, learner.max_skipped_steps, stats.skipped, settings.dump_dir
            )

    def _dump(self, micro_batch: MicroBatch, work: Work | None, reason: str) -> None:
        settings = self.settings
        if settings.dump_dir and self._num_dumps < guards.MAX_DUMPS:
            name = f"step_{self._step}_rank_{settings.rank}_{self._num_dumps}"
            about = {"step": self._step, "rank": settings.rank, "reason": reason}
            guards.dump(settings.dump_dir, name, micro_batch, work, about)
            self._num_dumps += 1

    def snapshot(self, policy_version: int) -> WeightSnapshot:
        """A copy of the policy's weights on the CPU, packed as MXFP4 where `model.fp4` says so; adapters are merged.
        Under ZeRO stage 3, what ranks but 0 return is empty."""
        return snapshot_of(self._whole(), policy_version, self.settings.model.fp4)

    def publish(self, policy_version: int) -> Any:
        """Puts a snapshot into the store once and returns its handle, which every rollout worker can read; rank 0
        does, the others return None. Rollouts are from here on as old as they are older than this version."""
        self._version = policy_version
        if self.settings.rank > 0 and not self._engine.divides_weights:
            return None
        snapshot = self.snapshot(policy_version)
        return self._store.put(snapshot) if self.settings.rank == 0 else None

    def probe(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """Log-probabilities of every token of the prompts but their first ones, float32, prompt by prompt: what a
        worker that holds these weights says of them too, if both compute in FP32."""
        batch = collate_tokens(prompts).to(self.settings.device)
        with torch.no_grad():
            _, outcome = self._engine.forward(self._preparer.probe_work(batch), is_last=True)
        assert outcome is not None
        return outcome.logprobs.float().cpu().numpy()

    def save(self, folder: str | Path, chat: Chat | None = None) -> None:
        """Writes `folder`/hf (opens with transformers) and `folder`/state (the rest that exact resume needs); with
        adapters, hf holds them merged and `folder`/adapter holds them alone, as peft saves them.

        Returns when everything is copied to host memory; `finish_saving` waits for the files. Raises what the save
        before it failed with. Rank 0 writes the weights, each rank the optimizer state it has. No pickle.
        """
        settings, folder = self.settings, Path(folder)
        with failing_together():
            self._writer.finish()
            weights = self._engine.weights()
            adapters = {name: weight.to("cpu", copy=True) for name, weight in adapter_weights(weights).items()}
            whole = HeldWeights(merged(self.model, weights), self.model, copy=settings.rank == 0)
            fragments = self._engine.state()
            rng = {"cpu": torch.get_rng_state()}
            if settings.device == "cuda":
                rng["cuda"] = torch.cuda.get_rng_state()
            described = {
                **self._layout(),
                "step": self._step,
                "num_updates": self._engine.num_updates,
                "num_skipped_steps": self._num_skipped,
                "skipped_in_a_row": self._skipped_in_a_row,
            }

        def write() -> None:
            state = folder / "state"
            state.mkdir(parents=True, exist_ok=True)
            write_rank(state, settings.rank, fragments, rng)
            if settings.rank == 0:
                save_checkpoint(folder / "hf", whole, chat)
                if adapters:
                    save_adapter(folder / "adapter", self.model, adapters)
                write_description(state, described, settings.world_size)

        self._writer.start(write)

    def finish_saving(self) -> None:
        """Waits until the last save is wholly on disk. Raises what went wrong in writing it."""
        with failing_together():
            self._writer.finish()

    def load(self, folder: str | Path) -> None:
        """Takes up what `save` wrote. On the same number of ranks and ZeRO stage the next step is bitwise the one that
        would have followed; on another it is to rounding.

        Raises ConfigError for a folder that lacks the files or was written with another optimizer, or with and without
        training the multi-token-prediction block. Learning rate, betas and the like are those of the present settings;
        GRPO's reference stays the policy the stage started from.
        """
        settings, folder = self.settings, Path(folder)
        with failing_together():
            saved = SavedState(folder / "state")
            for key, value in self._layout().items():
                if saved.described.get(key) != value:
                    raise ConfigError(
                        f"{saved.folder} was saved with {key}={saved.described.get(key)}, this run has {key}={value}"
                    )
            if settings.model.lora.rank > 0:  # the rest is the model that the adapters were added to
                trained = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
                self._engine.set_weights(load_adapter(folder / "adapter"), trained)
            else:
                self._engine.set_weights(dict(stored_tensors(folder / "hf")))
            self._engine.load_state(saved.read, saved.described["num_updates"])
            if rng := saved.rng(settings.rank):
                torch.set_rng_state(rng["cpu"])
                if settings.device == "cuda" and "cuda" in rng:
                    torch.cuda.set_rng_state(rng["cuda"])
            self._step, self._num_skipped = saved.described["step"], saved.described["num_skipped_steps"]
            self._skipped_in_a_row = saved.described["skipped_in_a_row"]

    def close(self) -> None:
        """Ends the last save and lets go of the engine's memory; the process group stays for the next Learner of this
        process."""
        self._writer.finish()
        self._engine.close()

    def _whole(self) -> torch.nn.Module:
        """The policy, or a stand-in with its whole weights under the published names, where it does not hold them."""
        if self._engine.divides_weights or self.settings.model.lora.rank > 0:
            return HeldWeights(merged(self.model, self._engine.weights()), self.model)
        return self.model

    def _layout(self) -> dict[str, Any]:
        """What must agree between a saved state and the learner that takes it up."""
        layout: dict[str, Any] = {"learner.optimizer.name": self.settings.learner.optimizer.name}
        if (lora := self.settings.model.lora).rank > 0:
            layout |= {"model.lora.rank": lora.rank, "model.lora.alpha": lora.alpha, "model.path": self._base_hash}
        if self._mtp is not None:  # whose parameters the optimizer has, or has not
            layout["mtp_weight > 0"] = self._trains_mtp
        return layout


def _no_load(model: Policy, trains_mtp: bool) -> Tensor:
    """The expert load [L, E] of no tokens, as `ModelOutput.expert_load` counts."""
    if not isinstance(model, DeepseekV4):
        return torch.zeros(0, 0, dtype=torch.int64)
    layers = model.routing_shape[0] + trains_mtp
    return torch.zeros(layers, model.config.n_routed_experts if layers else 0, dtype=torch.int64)
