"""All rollout workers as one sampler, which outlives them.

Consumes prompts, produces groups in the order of the prompts; waits for the slowest worker. A group stays on one
worker, whose prompt cache its samples share. Which worker that is changes nothing: noise belongs to the trajectory.

A worker that dies is replaced under its name. The new one gets the weights that were published last, reads what its
predecessor logged of the batch and goes on from there; what other workers do or have done is kept. Likewise a fleet
goes on from what the one before it had logged when it ended, once it comes to that batch. After every publish all
workers score a few fixed prompts, and one that scores them differently stops the run.
"""

from __future__ import annotations

import logging
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from opd.actors import ActorDied
from opd.config import SamplingConfig
from opd.types import Actor, Future, Group, Prompt, Trajectory
from rollout.request import Request
from rollout.wal import LogKey, drop_asides, set_aside

log = logging.getLogger(__name__)

POLL_SECONDS = 0.25  # the longest one worker is waited for before the others are looked at
MAX_DEATHS = 3  # of one worker in a row without a logged token in between
# Prompts of a publish's probe. Ids this low are in every vocabulary.
PROBES = tuple(tuple(random.Random(seed).choices(range(32), k=16)) for seed in range(4))
PROBE_TOLERANCE = 1e-3  # nats per token; rounding alone stays far below it


@dataclass(slots=True, kw_only=True, frozen=True)
class _Call:
    method: str
    args: tuple[Any, ...]


class Fleet:
    """The workers, and how long one answer of theirs may take. Results of a worker that fails, other than by dying,
    are lost with the call; the other workers' next call waits for what they still have to do."""

    def __init__(
        self,
        workers: Sequence[Actor],
        timeout_seconds: float,
        *,
        respawn: Callable[[int], Actor] | None = None,
        log_dir: str | None = None,
        probes: Sequence[Sequence[int]] = PROBES,
        probe_tolerance: float = PROBE_TOLERANCE,
    ) -> None:
        """`respawn(index)` starts another worker in place of workers[index], of the same name and settings; without it
        a death ends the run. Write-ahead logs go to `log_dir`, one file per worker, beside what an earlier fleet was
        at; None: no logs, and a replacement samples its whole batch again. On a cluster of several nodes, `log_dir` is
        a folder that all of them see.
        """
        self.workers, self.timeout_seconds = list(workers), timeout_seconds
        self.respawn, self.log_dir = respawn, None if log_dir is None else os.path.abspath(log_dir)
        self.probes, self.probe_tolerance = probes, probe_tolerance
        self.run = uuid.uuid4().hex
        self.num_batches = 0
        self.num_deaths = 0
        self.resumed_tokens = 0  # that replacements found in logs instead of sampling them
        self._published: _Call | None = None
        self._reference: np.ndarray | None = None  # the probe's values under the published weights
        self._deaths = [0] * len(self.workers)  # in a row, without a token logged in between
        self._logged = [0] * len(self.workers)  # tokens of the present batch at the last death
        for index in range(len(self.workers)):
            if (key := self._log_key(index)) is not None:
                set_aside(key)

    def load(self, snapshot: object, reference: np.ndarray | None = None) -> int:
        """Publishes a snapshot (a store handle) to every worker; returns the version they all hold now.

        `reference` is what the weights' own model says of the probe (`RolloutWorker.probe` of `probes`); without it
        the workers are compared with each other. Raises RuntimeError naming the worker that differs.
        """
        return self._publish(_Call(method="load", args=(snapshot,)), reference)

    def load_checkpoint(self, path: str, version: int = 0) -> int:
        """Publishes a checkpoint folder that every worker reads for itself; returns the version they all hold now."""
        return self._publish(_Call(method="load_checkpoint", args=(path, version)), None)

    def _publish(self, call: _Call, reference: np.ndarray | None) -> int:
        self._published, self._reference = call, None
        versions = self._answers(dict.fromkeys(range(len(self.workers)), call))
        if len(set(versions.values())) != 1:
            raise RuntimeError(f"workers hold different policy versions after a publish: {sorted(versions.values())}")
        if len(self.probes):
            probe = _Call(method="probe", args=(self.probes,))
            values = self._answers(dict.fromkeys(range(len(self.workers)), probe))
            self._reference = values[0] if reference is None else reference
            other = self.workers[0].name if reference is None else "the learner"
            for index, found in values.items():
                self._check_probe(index, found, other)
        return versions[0]

    def _check_probe(self, index: int, found: np.ndarray, other: str) -> None:
        assert self._reference is not None
        gap = float(np.abs(found - self._reference).max())
        if not gap <= self.probe_tolerance:  # NaN is a mismatch too
            raise RuntimeError(
                f"{self.workers[index].name} does not hold the weights that were published: its log-probabilities of "
                f"the probe prompts differ from those of {other} by up to {gap:.3g} nats (at most "
                f"{self.probe_tolerance:g} is rounding)"
            )

    def generate(
        self, prompts: Sequence[Prompt], group_size: int, sampling: SamplingConfig, *, version: int, tag: str
    ) -> list[Group]:
        """`group_size` trajectories for each prompt. `tag` makes their ids, and so their noise, unique to the occasion.

        A prompt that is asked for twice (a small data set) gets samples that go on counting where the first left off.
        Raises TimeoutError naming the worker that did not answer in time, and RuntimeError for one that died and could
        not be replaced.
        """
        requests = _requests(prompts, group_size, tag)
        # Long prompts first, each to the worker with the least to do so far.
        load = [0] * len(self.workers)
        shares: list[list[int]] = [[] for _ in self.workers]
        for index in sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].token_ids), i)):
            worker = load.index(min(load))
            load[worker] += len(prompts[index].token_ids) + group_size * sampling.max_new_tokens
            shares[worker].append(index)
        self.num_batches += 1
        self._deaths, self._logged = [0] * len(self.workers), [0] * len(self.workers)
        answers = self._answers(
            {
                worker: _Call(
                    method="generate",
                    args=([r for index in share for r in requests[index]], sampling, version, self._log_key(worker)),
                )
                for worker, share in enumerate(shares)
                if share
            }
        )
        for key in filter(None, map(self._log_key, range(len(self.workers)))):
            drop_asides(key, version)
        produced: dict[int, tuple[Trajectory, ...]] = {}
        for worker, answer in answers.items():
            trajectories = iter(answer)
            for index in shares[worker]:
                produced[index] = tuple(next(trajectories) for _ in range(group_size))
        return [Group(prompt=prompt, trajectories=produced[index]) for index, prompt in enumerate(prompts)]

    def _log_key(self, index: int) -> LogKey | None:
        if self.log_dir is None:
            return None
        name = self.workers[index].name
        path = os.path.join(self.log_dir, f"{re.sub(r'[^A-Za-z0-9]+', '_', name)}.wal")
        return LogKey(path=path, run=self.run, worker=name, batch=self.num_batches)

    def _answers(self, calls: dict[int, _Call]) -> dict[int, Any]:
        """Makes a call on each of some workers at once and waits for all; one that dies is replaced, and asked again.

        Raises what a call raised, as soon as it is known.
        """
        waiting: dict[int, tuple[Future, float]] = {}
        for index, call in calls.items():
            waiting[index] = self.workers[index].submit(call.method, *call.args), time.monotonic()
        answers: dict[int, Any] = {}
        while waiting:
            for index, (future, since) in list(waiting.items()):
                left = max(0.0, since + self.timeout_seconds - time.monotonic())
                try:
                    answers[index] = future.result(min(POLL_SECONDS, left))
                    del waiting[index]
                except TimeoutError as error:
                    if left <= POLL_SECONDS:
                        raise TimeoutError(
                            f"{self.workers[index].name}.{calls[index].method} did not answer within "
                            f"{self.timeout_seconds:g} s"
                        ) from error
                except ActorDied as error:
                    if error.name != self.workers[index].name:  # the death of one that the worker asked
                        raise
                    waiting[index] = self._replace(index, calls[index], error), time.monotonic()
        return {index: answers[index] for index in calls}

    def _replace(self, index: int, call: _Call, error: ActorDied) -> Future:
        """Another worker in place of a dead one, with the published weights, at the dead one's call."""
        name, respawn = self.workers[index].name, self.respawn
        if respawn is None:
            raise error
        while True:
            self.num_deaths += 1
            self._deaths[index] += 1
            if self._deaths[index] > MAX_DEATHS:
                raise RuntimeError(
                    f"{name} died {MAX_DEATHS + 1} times in a row without producing a token; the last time: {error}"
                ) from error
            log.warning("%s; it is replaced", error)
            worker = self.workers[index] = respawn(index)
            assert worker.name == name, "logs and messages know a worker by its name"
            if call is self._published:
                return worker.submit(call.method, *call.args)
            try:
                if self._published is not None:
                    worker.submit(self._published.method, *self._published.args).result(self.timeout_seconds)
                if self._reference is not None:
                    found = worker.submit("probe", self.probes).result(self.timeout_seconds)
                    self._check_probe(index, found, "the other workers")
                if call.method != "generate":
                    return worker.submit(call.method, *call.args)
                tokens = worker.submit("logged_tokens", call.args[-1]).result(self.timeout_seconds)
            except ActorDied as again:
                if again.name != name:
                    raise
                error = again
                continue
            if tokens > self._logged[index]:
                self._logged[index], self._deaths[index] = tokens, 0
            self.resumed_tokens += tokens
            log.warning("%s goes on from %d logged tokens", name, tokens)
            return worker.submit(call.method, *call.args, resume=True)


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
