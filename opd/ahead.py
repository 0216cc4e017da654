"""Rollouts, a given number of steps ahead of the training that consumes them.

Consumes: prompts, in the order of the stream, and published weights. Produces: the groups of step after step. Waits
for: the fleet, which does one thing at a time. Who unblocks it: the loop, which takes a step's groups when it is at
that step and publishes when it has learned from them.

With `max_staleness` k, the rollouts of step s are begun when step s - k is taken, under the weights published last, so
they are k versions old when they are trained on, and never older. With k = 0 everything happens in the caller's thread
and a step waits for its own rollouts; above, the fleet works in a thread of its own while the caller scores and trains.
A resumed run begins the steps ahead again, under the weights it goes on with.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from opd.crew import Crew, Snapshot
from opd.data import PromptStream
from opd.types import Group, Prompt

T = TypeVar("T")
Act = Callable[[int, int, Sequence[Prompt]], list[Group]]


@dataclass(slots=True, kw_only=True, frozen=True)
class _Batch:
    before: dict[str, Any]  # the stream's position before its prompts
    groups: Future[tuple[list[Group], float]]  # and the seconds they took


class Ahead:
    """`act(step, version, prompts)` makes the groups of a step; only steps below `steps` are begun."""

    def __init__(
        self, crew: Crew, stream: PromptStream, act: Act, *, steps: range, prompts_per_step: int, max_staleness: int
    ) -> None:
        """`steps`: those that will be taken, in order; the first one's number is the version of the weights now."""
        self._crew, self._stream, self._act = crew, stream, act
        self._prompts_per_step, self._max_staleness = prompts_per_step, max_staleness
        self._next, self._end = steps.start, steps.stop  # the next step to begin
        self._batches: deque[_Batch] = deque()
        self._version = steps.start
        self._snapshot: Snapshot | None = None
        self._loaded = -1  # version that the fleet holds
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts") if max_staleness else None
        self.seconds = 0.0  # that the rollouts taken last took

    def publish(self, version: int) -> None:
        """From here on rollouts are begun under the learner's present weights, as `version`."""
        if self._crew.fleet is not None:
            self._version, self._snapshot = version, self._crew.snapshot(version)
            if self._thread is None:
                self._load(version, self._snapshot)

    def take(self, step: int) -> list[Group]:
        """The groups of a step. Raises ValueError for one that was sampled under older weights than allowed."""
        while self._next < min(step + self._max_staleness + 1, self._end):
            self._begin(self._next)
            self._next += 1
        groups, self.seconds = self._batches.popleft().groups.result()
        for trajectory in (trajectory for group in groups for trajectory in group.trajectories):
            for span in trajectory.version_spans:
                if not step - self._max_staleness <= span.policy_version <= step:
                    raise ValueError(
                        f"trajectory {trajectory.id} has tokens of policy version {span.policy_version}; step {step} "
                        f"with max_staleness={self._max_staleness} learns from {step - self._max_staleness} to {step}"
                    )
        return groups

    def position(self) -> dict[str, Any]:
        """The stream's position after the prompts of all steps taken so far."""
        return self._batches[0].before if self._batches else self._stream.state()

    def measure(self, function: Callable[[int], T]) -> T:
        """`function(version)` with the fleet to itself and the weights published last."""

        def run(version: int, snapshot: Snapshot | None) -> T:
            self._load(version, snapshot)
            return function(version)

        return self._submit(run, self._version, self._snapshot).result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing more is begun; does not wait for what was, which ends with the fleet."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _begin(self, step: int) -> None:
        before = self._stream.state()
        prompts = self._stream.next(self._prompts_per_step)

        def run(version: int, snapshot: Snapshot | None) -> tuple[list[Group], float]:
            self._load(version, snapshot)
            started = time.perf_counter()
            return self._act(step, version, prompts), time.perf_counter() - started

        self._batches.append(_Batch(before=before, groups=self._submit(run, self._version, self._snapshot)))

    def _load(self, version: int, snapshot: Snapshot | None) -> None:
        if snapshot is not None and version != self._loaded:
            self._crew.publish(snapshot)
            self._loaded = version

    def _submit(self, function: Callable[..., T], *args: Any) -> Future[T]:
        if self._thread is not None:
            return self._thread.submit(function, *args)
        future: Future[T] = Future()
        future.set_result(function(*args))  # what it raises comes at once
        return future
