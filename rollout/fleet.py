"""All rollout workers as one sampler.

Consumes prompts, produces groups in the order of the prompts; waits for the slowest worker. A group stays on one
worker, whose prompt cache its samples share. Which worker that is changes nothing: noise belongs to the trajectory.
"""

from __future__ import annotations

from collections.abc import Sequence

from opd.config import SamplingConfig
from opd.types import Actor, Future, Group, Prompt, Trajectory
from rollout.engine import Request


class Fleet:
    """The workers, and how long one answer of theirs may take. Results of a worker that fails are lost with the call;
    the other workers' next call waits for what they still have to do."""

    def __init__(self, workers: Sequence[Actor], timeout_seconds: float) -> None:
        self.workers, self.timeout_seconds = list(workers), timeout_seconds

    def load(self, snapshot: object) -> int:
        """Publishes a snapshot (a store handle) to every worker; returns the version they all hold now."""
        return self._agree([worker.submit("load", snapshot) for worker in self.workers])

    def load_checkpoint(self, path: str, version: int = 0) -> int:
        """Publishes a checkpoint folder that every worker reads for itself; returns the version they all hold now."""
        return self._agree([worker.submit("load_checkpoint", path, version) for worker in self.workers])

    def _agree(self, futures: list[Future]) -> int:
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
        requests = _requests(prompts, group_size, tag)
        # Long prompts first, each to the worker with the least to do so far.
        load = [0] * len(self.workers)
        shares: list[list[int]] = [[] for _ in self.workers]
        for index in sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].token_ids), i)):
            worker = load.index(min(load))
            load[worker] += len(prompts[index].token_ids) + group_size * sampling.max_new_tokens
            shares[worker].append(index)
        busy = [(worker, share) for worker, share in zip(self.workers, shares, strict=True) if share]
        futures = [
            worker.submit("generate", [request for index in share for request in requests[index]], sampling, version)
            for worker, share in busy
        ]
        produced: dict[int, tuple[Trajectory, ...]] = {}
        for (_, share), future in zip(busy, futures, strict=True):
            trajectories = iter(future.result(self.timeout_seconds))
            for index in share:
                produced[index] = tuple(next(trajectories) for _ in range(group_size))
        return [Group(prompt=prompt, trajectories=produced[index]) for index, prompt in enumerate(prompts)]


def _requests(prompts: Sequence[Prompt], group_size: int, tag: str) -> list[list[Request]]:
    asked: dict[str, int] = {}  # prompt id -> samples numbered so far
    requests = []
    for prompt in prompts:
        first = asked.get(prompt.id, 0)
        asked[prompt.id] = first + group_size
        requests.append(
            [
                Request(
                    trajectory_id=f"{prompt.id}#{sample}@{tag}",
                    prompt_id=prompt.id,
                    domain=prompt.domain,
                    token_ids=prompt.token_ids,
                )
                for sample in range(first, first + group_size)
            ]
        )
    return requests
