"""What a step's rollouts, rewards and clock say, by the names of `opd.metrics.CATALOGUE`. Pure but for the clock."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from opd.types import Group, Trajectory
from opd.verifiers import Verdict


def rollout_metrics(groups: Sequence[Group], version: int) -> dict[str, float]:
    """Lengths, and ages of sampled tokens in versions before `version`, of the weights that learn from them."""
    values: dict[str, float] = {}
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    lengths = [trajectory.num_loss_tokens for trajectory in trajectories]
    cut = [trajectory.finish_reason == "length" for trajectory in trajectories]
    values["rollout/tokens"] = sum(lengths)
    values["rollout/max_length"] = max(lengths)
    for name in ("", *dict.fromkeys(trajectory.domain for trajectory in trajectories)):
        rows = [i for i, trajectory in enumerate(trajectories) if name in ("", trajectory.domain)]
        suffix = f"/{name}" if name else ""
        values[f"rollout/mean_length{suffix}"] = sum(lengths[i] for i in rows) / len(rows)
        values[f"rollout/truncated_share{suffix}"] = sum(cut[i] for i in rows) / len(rows)
    ages = np.concatenate([_ages(trajectory, version)[trajectory.loss_mask] for trajectory in trajectories])
    values["rollout/staleness"] = float(ages.mean()) if len(ages) else 0.0
    values["rollout/max_staleness"] = int(ages.max(initial=0))
    return values


def reward_metrics(groups: Sequence[Group], verdicts: Sequence[Sequence[Verdict]]) -> dict[str, float]:
    """`verdicts` in the shape of `groups`."""
    values: dict[str, float] = {}
    flat = [(group.prompt.domain, verdict) for group, row in zip(groups, verdicts, strict=True) for verdict in row]
    values["reward/mean"] = sum(verdict.reward for _, verdict in flat) / len(flat)
    values["reward/verifier_errors"] = sum(verdict.error is not None for _, verdict in flat)
    for name in dict.fromkeys(domain for domain, _ in flat):
        rows = [verdict for domain, verdict in flat if domain == name]
        values[f"reward/mean/{name}"] = sum(verdict.reward for verdict in rows) / len(rows)
        values[f"reward/pass_rate/{name}"] = sum(verdict.passed for verdict in rows) / len(rows)
    return values


class Clock:
    """Seconds of each phase of one step. What is raised inside a phase carries the phase's name as a note."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        except Exception as error:
            error.add_note(f"in phase {name} of step {self.step} after {time.perf_counter() - started:.0f} s")
            raise
        self.seconds[name] = time.perf_counter() - started

    def metrics(self, groups: Sequence[Group], rollout_seconds: float) -> dict[str, float]:
        """`rollout_seconds`: what sampling the groups took, whether or not the step waited for it."""
        total = time.perf_counter() - self.started
        tokens = sum(len(trajectory.token_ids) for group in groups for trajectory in group.trajectories)
        sampled = sum(trajectory.num_loss_tokens for group in groups for trajectory in group.trajectories)
        values = {f"phase/{name}_seconds": seconds for name, seconds in self.seconds.items()}
        values |= {"phase/total_seconds": total, "perf/tokens_per_second": tokens / total}
        if rollout_seconds:
            values["perf/rollout_tokens_per_second"] = sampled / rollout_seconds
        return values


def _ages(trajectory: Trajectory, version: int) -> np.ndarray:
    """Of each token, int64 [T]: how many versions of the policy lie between the one it was sampled under and ours."""
    ages = np.zeros(len(trajectory.token_ids), dtype=np.int64)
    for span in trajectory.version_spans:  # in order: a later one speaks of what is left
        ages[span.start :] = version - span.policy_version
    return ages
