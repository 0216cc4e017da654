"""All rollout workers as one sampler.

Consumes prompts, produces groups in the order of the prompts; waits for the slowest worker. A group stays on one
worker, whose prompt cache its samples share. Which worker that is changes nothing: noise belongs to the trajectory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opd.config import SamplingConfig
from opd.types import Actor, Group, Prompt, Trajectory
from rollout.engine import Request


class Fleet:
    def __init__(self, workers: Sequence[Actor], timeout_seconds: float) -> None:
        self.workers, self.timeout_seconds = list(workers), timeout_seconds

    def load(self, snapshot: Any) -> int:
        """Publishes a snapshot (a store handle) to every worker; returns the version they all hold now."""
        return self._agree([worker.submit("load", snapshot) for worker in self.workers])

    def load_checkpoint(self, path: str, version: int = 0) -> int:
        return self._agree([worker.submit("load_checkpoint", path, version) for worker in self.workers])

    def _agree(self, futures: list[Any]) -> int:
        versions = {future.result(self.timeout_seconds) for future in futures}
        if len(versions) != 1:
            raise RuntimeError(f"workers hold different policy versions after a publish: {sorted(versions)}")
        return versions.pop()

    def generate(
        self, prompts: Sequence[Prompt], group_size: int, sampling: SamplingConfig, *, version: int, tag: str
    ) -> list[Group]:
        """`group_size` trajectories for each prompt. `tag` makes their ids, and so their noise, unique to the occasion.

        A prompt that is asked for twice (a small data set) gets samples that go on counting where the first left off.
        Raises TimeoutError naming the worker that did not answer in time.
        """
        seen: dict[str, int] = {}
        first_sample = []
        for prompt in prompts:
            first_sample.append(seen.get(prompt.id, 0))
            seen[prompt.id] = first_sample[-1] + group_size
        # Long prompts first, each to the worker with the least to read so far.
        load = [0] * len(self.workers)
        shares: list[list[int]] = [[] for _ in self.workers]
        for index in sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].token_ids), i)):
            worker = load.index(min(load))
            load[worker] += len(prompts[index].token_ids) + group_size * sampling.max_new_tokens
            shares[worker].append(index)
        busy = [worker for worker, share in enumerate(shares) if share]
        futures = {
            worker: self.workers[worker].submit(
                "generate",
                [
                    Request(
                        trajectory_id=f"{prompts[index].id}#{first_sample[index] + sample}@{tag}",
                        prompt_id=prompts[index].id,
                        domain=prompts[index].domain,
                        token_ids=prompts[index].token_ids,
                    )
                    for index in shares[worker]
                    for sample in range(group_size)
                ],
                sampling,
                version,
            )
            for worker in busy
        }
        trajectories: dict[int, tuple[Trajectory, ...]] = {}
        for worker in busy:
            produced = futures[worker].result(self.timeout_seconds)
            for place, index in enumerate(shares[worker]):
                trajectories[index] = tuple(produced[place * group_size : (place + 1) * group_size])
        return [
            Group(prompt=prompt, trajectories=trajectories[index]) for index, prompt in enumerate(prompts)
        ]
