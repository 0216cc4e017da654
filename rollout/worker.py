"""A rollout worker: a copy of the policy in FP4 values, an engine around it, and the version it samples under.

Knows nothing of Ray. Weights come as snapshots through the run's store, so that all workers of a node read one copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opd.config import ModelConfig, RolloutConfig, SamplingConfig
from opd.model import DeepseekV4, load_model, with_path
from opd.types import Store, Trajectory, WeightSnapshot
from opd.weights import apply_snapshot, snapshot_of
from rollout.engine import Request, V4Engine
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
        self.store, self.model_config, self.device = store, model, device
        self.version = -1  # no weights yet
        # A snapshot's experts are MXFP4 values already: rounding them again in every forward would change nothing.
        policy = load_model(with_path(model, model.path or "", fp4="none")).to(device)
        settings = {
            "num_slots": rollout.num_slots,
            "max_tokens": model.max_tokens,
            "stop_ids": stop_ids,
            "seed": seed,
        }
        self.policy = policy
        self.engine: V4Engine | HubEngine = (
            V4Engine(policy, **settings) if isinstance(policy, DeepseekV4) else HubEngine(policy, **settings)
        )

    def load(self, snapshot: object) -> int:
        """Replaces the weights by the snapshot behind a store handle; returns the version now held."""
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

    def probe(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Log-probabilities of the last position of a prompt, float32 [V]: what a weight swap is checked by."""
        with torch.inference_mode():
            ids = torch.tensor([list(token_ids)], device=self.device)
            hidden = self.policy(ids, torch.tensor([len(token_ids)], device=self.device)).hidden[0, -1]
            return torch.log_softmax(hidden.float() @ self.policy.head.float().T, -1).cpu()
