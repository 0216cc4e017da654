"""A rollout worker: a copy of the policy in FP4 values, an engine around it, and the version it samples under.

Knows nothing of Ray. Weights come as snapshots through the run's store, so that all workers of a node read one copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from opd.config import ModelConfig, RolloutConfig, SamplingConfig
from opd.model import DeepseekV4, load_model, with_path
from opd.types import Store, Trajectory, WeightSnapshot
from opd.weights import apply_snapshot, snapshot_of
from rollout.engine import Request, V4Engine

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
        # A snapshot's experts are MXFP4 values already: rounding them again in every forward would change nothing.
        self.policy = load_model(with_path(model, model.path or "", fp4="none")).to(device)
        self.engine = self._engine(rollout.num_slots, stop_ids, seed)

    def _engine(self, num_slots: int, stop_ids: Sequence[int], seed: int) -> V4Engine | HubEngine:
        max_tokens = self.model_config.max_tokens
        if isinstance(self.policy, DeepseekV4):
            return V4Engine(self.policy, num_slots=num_slots, max_tokens=max_tokens, stop_ids=stop_ids, seed=seed)
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
        return self.version

    def generate(self, requests: Sequence[Request], sampling: SamplingConfig, version: int) -> list[Trajectory]:
        """Trajectories in the order of the requests. Raises ValueError when another version is asked for."""
        if version != self.version:
            raise ValueError(f"asked to sample under policy version {version}; this worker holds {self.version}")
        return self.engine.generate(requests, sampling, version)

    @torch.inference_mode()
    def probe(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Log-probabilities of the token after a prompt, float32 [V]: what a weight swap is checked by."""
        ids = torch.tensor([list(token_ids)], device=self.device)
        hidden = self.policy(ids, torch.tensor([len(token_ids)], device=self.device)).hidden[0, -1]
        return torch.log_softmax(hidden.float() @ self.policy.head.float().T, -1).cpu()
