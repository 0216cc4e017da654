"""A rollout worker: a copy of the policy in packed FP4, an engine around it, and the version it samples under.

Knows nothing of Ray. Weights come as snapshots through the run's store, so that all workers of a node read one copy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from opd.config import ModelConfig, RolloutConfig, SamplingConfig
from opd.fp4 import pack_weights
from opd.losses import token_logprobs
from opd.model import DeepseekV4, architecture, check_replay, load_model
from opd.types import Store, Trajectory, WeightSnapshot
from opd.weights import apply_snapshot, snapshot_hash, snapshot_of
from rollout.engine import V4Engine, pages_of
from rollout.request import Request
from rollout.wal import Log, LogKey, read_batch, taken_up

if TYPE_CHECKING:
    from rollout.hub_engine import HubEngine


class RolloutWorker:
    """Holds one policy. It refuses to sample under a version it does not hold."""

    def __init__(
        self,
        model: ModelConfig,
        rollout: RolloutConfig,
        store: Store,
        *,
        stop_ids: Sequence[int],
        seed: int,
        device: str,
    ) -> None:
        """The architecture is that of the checkpoint `model.path`; its weights are not sampled from until a `load`."""
        self.store, self.model_config, self.device = store, model, device
        self.version = -1  # no weights yet
        self.digest = ""  # of all that draws: weights, architecture, stop tokens
        self.policy = load_model(model).to(device)
        pack_weights(self.policy, model.fp4)  # FP4 weights are held, and replaced, as packed bytes and nothing else
        self.wal = rollout.wal
        # What the text depends on besides weights and noise; not where the architecture was read.
        own = asdict(replace(model, path=None, revision=None, tokenizer=None))
        settings = json.dumps([own, architecture(model), str(self.policy.head.dtype), sorted(stop_ids)], sort_keys=True)
        self._settings = hashlib.sha256(settings.encode()).hexdigest()
        self.engine = self._engine(rollout, stop_ids, seed)

    def _engine(self, rollout: RolloutConfig, stop_ids: Sequence[int], seed: int) -> V4Engine | HubEngine:
        max_tokens, num_slots = self.model_config.max_tokens, rollout.num_slots
        if rollout.routing_replay:
            check_replay(self.policy.config)
        if isinstance(self.policy, DeepseekV4):
            return V4Engine(
                self.policy,
                num_slots=num_slots,
                max_tokens=max_tokens,
                stop_ids=stop_ids,
                seed=seed,
                prefill_tokens=rollout.prefill_tokens,
                num_pages=pages_of(self.policy, num_slots, max_tokens, rollout.cache_bytes),
                record_routing=rollout.routing_replay,
            )
        from rollout.hub_engine import HubEngine  # transformers' caches take a while to import

        return HubEngine(self.policy, num_slots=num_slots, max_tokens=max_tokens, stop_ids=stop_ids, seed=seed)

    def load(self, snapshot: object) -> int:
        """Replaces the weights by the snapshot behind a store handle; returns the version now held.

        Raises ValueError for a snapshot that is not of this architecture; the weights are then what they were.
        """
        return self._apply(self.store.get(snapshot))

    def load_checkpoint(self, path: str, version: int) -> int:
        """Replaces the weights by a checkpoint's, rounded as a published snapshot of it would be."""
        model = load_model(self.model_config, path)
        return self._apply(snapshot_of(model, version, self.model_config.fp4))

    def _apply(self, snapshot: WeightSnapshot) -> int:
        apply_snapshot(self.policy, snapshot)
        self.version = snapshot.policy_version
        if self.wal != "none":
            self.digest = f"{snapshot_hash(snapshot)} {self._settings}"
        return self.version

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        version: int,
        log: LogKey | None = None,
        *,
        resume: bool = False,
    ) -> list[Trajectory]:
        """Trajectories in the order of the requests. Each token is in the write-ahead log `log` before it counts; with
        `resume`, what that log already has of this batch is not sampled again.

        Raises ValueError when another version is asked for, LogDamaged for a log that is not of this batch or was
        changed, and RuntimeError when the log's disk does not take it.
        """
        if version != self.version:
            raise ValueError(f"asked to sample under policy version {version}; this worker holds {self.version}")
        if log is None or self.wal == "none":
            return self.engine.generate(requests, sampling, version)
        durability, seed, digest = "machine" if self.wal == "machine" else "process", self.engine.seed, self.digest
        found = read_batch(log) if resume else None
        if found is not None:
            requests = found.resumed(requests, sampling, seed)
        else:
            requests = taken_up(log, requests, sampling, policy_version=version, seed=seed, policy=digest)
        with Log(
            log, requests, sampling, policy_version=version, seed=seed, durability=durability, policy=digest
        ) as writer:
            return self.engine.generate(requests, sampling, version, writer)

    def logged_tokens(self, log: LogKey | None) -> int:
        """Tokens of the batch that its log has. Raises as `generate` does."""
        found = None if log is None or self.wal == "none" else read_batch(log)
        return 0 if found is None else found.num_tokens

    @torch.inference_mode()
    def probe(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """The policy's log-probabilities of every token of the prompts but their first ones, given those before it,
        float32 [tokens of all prompts minus prompts]: what a weight swap is checked by."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        token_ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            token_ids[row, : len(prompt)] = torch.tensor(list(prompt))
        rows, columns = (torch.arange(token_ids.shape[1] - 1) < lengths[:, None] - 1).nonzero(as_tuple=True)
        hidden = self.policy(token_ids.to(self.device), lengths.to(self.device)).hidden[rows, columns]
        targets = token_ids[rows, columns + 1].to(self.device)
        return token_logprobs(hidden, self.policy.head, targets)[0].cpu().numpy()
