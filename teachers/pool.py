"""All teachers of a run: who scores which trajectory, on which host, and what a step keeps of it.

The one idea: a step's trajectories are sorted by teacher, and each host is handed its teachers one after another and
told who comes next, so weights that live on disk are read once per step, ahead of their turn (DeepSeek-V4, section
5.2.2). Sorting happens inside a step whose prompts are already fixed, so it changes nothing but the order of work.

Left out: running a model (`teachers.local`), whether a teacher fits the student at all (`teachers.admission`) and
sorting micro-batches for the learner (`opd.batching`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from opd.config import Config, TeacherConfig, teacher_routes
from opd.types import Actor, Future, Group, TeacherHead, TeacherHidden, TeacherLogprobs, Trajectory, no_routing
from teachers.admission import check_teachers as check_teachers  # known under this module too
from teachers.local import TeacherHost
from teachers.remote import TeacherAway
from teachers.shelf import checkpoint_of
from teachers.store import HiddenStore

if TYPE_CHECKING:
    from opd.actors import Runtime

log = logging.getLogger(__name__)

PAUSE_SECONDS = 5.0  # before the pool asks again for a teacher that was away
Scored = TeacherHidden | TeacherLogprobs


class TeacherPool:
    """Spreads a step over the teacher hosts.

    Consumes: groups. Produces: signals, most of them with handles of hidden states. Waits for: the hosts, all at once,
    each result for at most `timeout_seconds`. A host runs what it is given in the order of submission.
    """

    def __init__(
        self,
        hosts: list[Actor],
        routes: dict[str, tuple[tuple[str, float], ...]],
        placement: dict[str, int],
        timeout_seconds: float | None = None,
        patience_seconds: float = 0.0,
    ) -> None:
        """`routes`: domain -> ((teacher, weight), ...), as `opd.config.teacher_routes` gives it. `placement`:
        teacher -> index of the host that holds it, as `place` gives it. `patience_seconds` as in `PoolConfig`."""
        for domain, served_by in routes.items():
            for teacher, _ in served_by:
                if teacher not in placement:
                    raise ValueError(
                        f"domain {domain!r} is routed to teacher {teacher!r}, which is on no host: {placement}"
                    )
        for teacher, host in placement.items():
            if not 0 <= host < len(hosts):
                raise ValueError(f"teacher {teacher!r} is placed on host {host}; there are {len(hosts)}")
        self._hosts = hosts
        self._routes = routes
        self._placement = placement
        self._timeout_seconds = timeout_seconds
        self._patience_seconds = patience_seconds
        self._unclaimed: dict[tuple[str, float, str, bytes], Scored] = {}  # of a scoring that failed elsewhere

    def score(self, groups: Sequence[Group]) -> list[list[tuple[Scored, ...]]]:
        """Per group, per trajectory, one signal of each teacher that has weight for its domain, by teacher name.

        Raises ValueError for a trajectory of a domain that no teacher serves, before any work is handed out, and else
        what a host raised first, once all have answered. Nothing is lost then: the groups may be scored again, and what
        other teachers said of them is not asked twice. A remote teacher that is away is asked again for
        `patience_seconds` before that.
        """
        ends = time.monotonic() + self._patience_seconds
        while True:
            try:
                return self._score(groups)
            except TeacherAway as error:
                if time.monotonic() + PAUSE_SECONDS > ends:
                    raise
                log.warning("%s; the rollouts of the step wait for it, and it is asked again", error)
            time.sleep(PAUSE_SECONDS)

    def _score(self, groups: Sequence[Group]) -> list[list[tuple[Scored, ...]]]:
        flat = [trajectory for group in groups for trajectory in group.trajectories]
        signals: list[dict[str, Scored]] = [{} for _ in flat]
        work: dict[tuple[str, float], list[int]] = {}
        for index, trajectory in enumerate(flat):
            if not self._routes.get(trajectory.domain):
                raise ValueError(
                    f"trajectory {trajectory.id!r} is of domain {trajectory.domain!r}, which no teacher serves; "
                    f"served: {', '.join(self._routes)}"
                )
            for teacher, weight in self._routes[trajectory.domain]:
                if (known := self._unclaimed.get(_key(teacher, weight, trajectory))) is not None:
                    signals[index][teacher] = known
                else:
                    work.setdefault((teacher, weight), []).append(index)

        failure: Exception | None = None
        submitted, releasing = self._submit(flat, work)
        for (teacher, weight), indices, future in submitted:
            try:
                scored = future.result(self._timeout_seconds)
            except Exception as error:  # all hosts are waited for: what they say is kept for the next attempt
                if failure is None or isinstance(failure, TeacherAway):  # which may pass, and another failure does not
                    failure = error
                continue
            for index, signal in zip(indices, scored, strict=True):
                signals[index][teacher] = signal
                self._unclaimed[_key(teacher, weight, flat[index])] = signal
        if failure is not None:
            raise failure
        for future in releasing:
            future.result(self._timeout_seconds)
        self._unclaimed.clear()
        in_order = (tuple(found[name] for name in sorted(found)) for found in signals)
        return [[next(in_order) for _ in group.trajectories] for group in groups]

    def _submit(
        self, flat: Sequence[Trajectory], work: Mapping[tuple[str, float], list[int]]
    ) -> tuple[list[tuple[tuple[str, float], list[int], Future]], list[Future]]:
        """Hands out a step's work, and then the release. A teacher's weights of several domains are adjacent."""
        jobs = sorted(work.items())
        submitted: list[tuple[tuple[str, float], list[int], Future]] = []
        for number, ((teacher, weight), indices) in enumerate(jobs):
            host = self._placement[teacher]
            later = (name for (name, _), _ in jobs[number + 1 :] if name != teacher and self._placement[name] == host)
            # Teachers route by themselves, and the student's experts are most of a trajectory's bytes.
            trajectories = [replace(flat[index], routing=no_routing(len(flat[index].token_ids))) for index in indices]
            future = self._hosts[host].submit("score", teacher, trajectories, weight, next(later, None))
            submitted.append(((teacher, weight), indices, future))
        busy = sorted({self._placement[name] for name, _ in work})
        return submitted, [self._hosts[host].submit("release") for host in busy]

    def heads(self) -> dict[str, TeacherHead]:
        """The output head of every teacher whose weights are here, by teacher name."""
        heads = [host.submit("heads") for host in self._hosts]
        gathered: dict[str, TeacherHead] = {}
        for future in heads:
            gathered.update(future.result(self._timeout_seconds))
        return dict(sorted(gathered.items()))

    def metrics(self) -> dict[str, float]:
        """What the hosts measured since the last call (see `TeacherHost.take_metrics`)."""
        taken = [host.submit("take_metrics") for host in self._hosts]
        gathered: dict[str, float] = {}
        for future in taken:
            gathered.update(future.result(self._timeout_seconds))
        return gathered

    def examine(
        self, trajectories: Sequence[Trajectory], student: TeacherConfig | None = None
    ) -> dict[str, dict[str, float]]:
        """What `opd.health.check_teacher` judges, by teacher: its numbers on the trajectories of the domains it serves,
        beside the `student`'s, whose checkpoint is described as if it were a teacher. Each host is asked at once."""
        questions: dict[int, dict[str, list[Trajectory]]] = {}
        for name, host in sorted(self._placement.items()):
            served = {domain for domain, by in self._routes.items() if name in (teacher for teacher, _ in by)}
            asked = [trajectory for trajectory in trajectories if trajectory.domain in served]
            if asked:
                questions.setdefault(host, {})[name] = asked
        futures = [self._hosts[host].submit("examine", asked, student) for host, asked in questions.items()]
        gathered: dict[str, dict[str, float]] = {}
        for future in futures:
            gathered.update(future.result(self._timeout_seconds))
        return dict(sorted(gathered.items()))


def _key(teacher: str, weight: float, trajectory: Trajectory) -> tuple[str, float, str, bytes]:
    return teacher, weight, trajectory.id, trajectory.token_ids.tobytes()


def hire_teachers(
    config: Config, runtime: Runtime, folder: str, *, device: str, vocab_size: int, timeout_seconds: float
) -> tuple[list[Actor], TeacherPool]:
    """Starts the teacher hosts of a distillation and their pool. `folder` takes what `pool.hidden_bytes` leaves no room
    for, and the heads of teachers on disk; files of an earlier run in it are deleted. `vocab_size`: entries of the
    tokenizer. Whoever reads the signals needs a `HiddenStore` over the same folder."""
    HiddenStore(runtime.store, folder).clear()
    routes = teacher_routes(config)
    teachers = {
        name: replace(teacher, path=str(Path(teacher.path).absolute()) if Path(teacher.path).is_dir() else teacher.path)
        for name, teacher in config.teachers.items()
    }
    work = dict.fromkeys(teachers, 0.0)
    for domain, served_by in routes.items():
        for teacher, _ in served_by:
            work[teacher] += config.data.domains[domain].weight
    placement = place(teachers, config.runtime.num_teacher_hosts, work)
    pool = config.pool
    num_hosts = max(placement.values(), default=-1) + 1
    hosts: list[Actor] = []
    for host in range(num_hosts):
        held = {name: teacher for name, teacher in teachers.items() if placement[name] == host}
        is_remote = all(teacher.family == "remote" for teacher in held.values())
        bound = None if pool.hidden_bytes is None else pool.hidden_bytes // num_hosts
        hosts.append(
            runtime.spawn(
                TeacherHost,
                held,
                HiddenStore(runtime.store, folder, bound),
                fp4=config.model.fp4,
                fp4_index=config.model.fp4_index,
                threads=config.runtime.actor_threads,
                device="cpu" if is_remote else device,
                micro_batch_tokens=config.learner.micro_batch_tokens,
                hidden_dtype=torch.float32 if config.stages.distill.hidden_dtype == "float32" else torch.bfloat16,
                vocab_size=vocab_size,
                weight_bytes=pool.weight_bytes,
                prefetch=pool.prefetch,
                name=f"teacher host {host}",
                num_gpus=0.0 if is_remote else config.runtime.gpus_per_teacher,
            )
        )
    return hosts, TeacherPool(hosts, routes, placement, timeout_seconds, pool.patience_seconds)


def place(teachers: dict[str, TeacherConfig], num_hosts: int, work: dict[str, float] | None = None) -> dict[str, int]:
    """Teacher -> host index, so that hosts have about the same to do; teachers that share a checkpoint share a host.

    `work`: trajectories per step that each teacher scores, in any unit; equal when not given. The most work is placed
    first, on the host with the least so far (of equal ones the first). Example: {a: 3, b: 2, c: 2} on 2 hosts gives
    {a: 0, b: 1, c: 1}. Remote teachers, whose work is waiting, have one further host to themselves.
    """
    if num_hosts < 1:
        raise ValueError(f"num_hosts={num_hosts} is too small; it must be at least 1")
    local = {name: checkpoint_of(teacher) for name, teacher in teachers.items() if teacher.family != "remote"}
    share = dict.fromkeys(local.values(), 0.0)
    for name, checkpoint in local.items():
        share[checkpoint] += 1.0 if work is None else work.get(name, 0.0)
    load, host_of = [0.0] * num_hosts, {}
    for checkpoint in sorted(share, key=lambda checkpoint: -share[checkpoint]):
        # Teachers without work are spread too: their weights take memory.
        host = min(range(num_hosts), key=lambda host: (load[host], list(host_of.values()).count(host)))
        host_of[checkpoint] = host
        load[host] += share[checkpoint]
    beyond = max(host_of.values(), default=-1) + 1
    return {name: host_of[local[name]] if name in local else beyond for name in teachers}
