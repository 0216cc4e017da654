"""All teachers of a run: who scores which trajectory, on which host, and whether a teacher fits the student at all.

The one idea: a step's trajectories are sorted by teacher, and each host is handed its teachers one after another, so
weights that live on disk are read once per step and at most one set of them is in memory (DeepSeek-V4, section 5.2.2).
Sorting happens inside a step whose prompts are already fixed, so it changes nothing but the order of work.

Left out: running a model (`teachers.local`) and sorting micro-batches for the learner (`opd.batching`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opd.chat import Chat, tokenizer_difference
from opd.config import ConfigError, TeacherConfig
from opd.types import Actor, Future, Group, TeacherHead, TeacherHidden
from opd.weights import load_model_config, resolve_checkpoint
from teachers.local import checkpoint_of


class TeacherPool:
    """Spreads a step over the teacher hosts.

    Consumes: groups. Produces: handles of hidden states, as signals. Waits for: the hosts, all at once, each result for
    at most `timeout_seconds`. A host runs what it is given in the order of submission.
    """

    def __init__(
        self,
        hosts: list[Actor],
        routes: dict[str, tuple[tuple[str, float], ...]],
        placement: dict[str, int],
        timeout_seconds: float | None = None,
    ) -> None:
        """`routes`: domain -> ((teacher, weight), ...), as `opd.config.teacher_routes` gives it. `placement`:
        teacher -> index of the host that holds it, as `place` gives it."""
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

    def score(self, groups: Sequence[Group]) -> list[list[tuple[TeacherHidden, ...]]]:
        """Per group, per trajectory, one signal of each teacher that has weight for its domain, by teacher name.

        Raises ValueError for a trajectory of a domain that no teacher serves, before any work is handed out.
        """
        flat = [trajectory for group in groups for trajectory in group.trajectories]
        work: dict[tuple[str, float], list[int]] = {}
        for index, trajectory in enumerate(flat):
            if not self._routes.get(trajectory.domain):
                raise ValueError(
                    f"trajectory {trajectory.id!r} is of domain {trajectory.domain!r}, which no teacher serves; "
                    f"served: {', '.join(self._routes)}"
                )
            for teacher, weight in self._routes[trajectory.domain]:
                work.setdefault((teacher, weight), []).append(index)

        scoring: list[tuple[list[int], Future]] = []
        for (teacher, weight), indices in sorted(work.items()):  # one teacher's weights of several domains are adjacent
            host = self._hosts[self._placement[teacher]]
            scoring.append((indices, host.submit("score", teacher, [flat[index] for index in indices], weight)))
        releasing = [
            self._hosts[host].submit("release") for host in sorted({self._placement[name] for name, _ in work})
        ]

        signals: list[list[TeacherHidden]] = [[] for _ in flat]
        for indices, future in scoring:
            for index, signal in zip(indices, future.result(self._timeout_seconds), strict=True):
                signals[index].append(signal)
        for future in releasing:
            future.result(self._timeout_seconds)
        in_order = iter(signals)
        return [[tuple(next(in_order)) for _ in group.trajectories] for group in groups]

    def heads(self) -> dict[str, TeacherHead]:
        """Every teacher's output head, by teacher name."""
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


def place(teachers: dict[str, TeacherConfig], num_hosts: int, work: dict[str, float] | None = None) -> dict[str, int]:
    """Teacher -> host index, so that hosts have about the same to do; teachers that share a checkpoint share a host.

    `work`: trajectories per step that each teacher scores, in any unit; equal when not given. The most work is placed
    first, on the host with the least so far (of equal ones the first). Example: {a: 3, b: 2, c: 2} on 2 hosts gives
    {a: 0, b: 1, c: 1}.
    """
    if num_hosts < 1:
        raise ValueError(f"num_hosts={num_hosts} is too small; it must be at least 1")
    share = dict.fromkeys(map(checkpoint_of, teachers.values()), 0.0)
    for name, teacher in teachers.items():
        share[checkpoint_of(teacher)] += 1.0 if work is None else work.get(name, 0.0)
    load, host_of = [0.0] * num_hosts, {}
    for checkpoint in sorted(share, key=lambda checkpoint: -share[checkpoint]):
        # Teachers without work are spread too: their weights take memory.
        host = min(range(num_hosts), key=lambda host: (load[host], list(host_of.values()).count(host)))
        host_of[checkpoint] = host
        load[host] += share[checkpoint]
    return {name: host_of[checkpoint_of(teacher)] for name, teacher in teachers.items()}


def check_teachers(student_chat: Chat, student_vocab_size: int, teachers: dict[str, TeacherConfig]) -> list[str]:
    """Compares every teacher with the student before anything is loaded; one line of description per teacher.

    Distillation compares two distributions over the same ids, so each teacher must have the student's vocabulary size
    and the student's tokenizer, by content. Raises ConfigError naming teachers.<name>.path and the first difference.
    """
    descriptions: list[str] = []
    for name, teacher in teachers.items():
        key = f"teachers.{name}.path={teacher.path}"
        try:
            folder = resolve_checkpoint(teacher.path, teacher.revision)
            config: Any = load_model_config(folder)
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from None
        if (teacher.family == "deepseek_v4") != (config.model_type == "deepseek_v4"):
            raise ConfigError(
                f"{key}: holds a model of type {config.model_type!r}, but teachers.{name}.family={teacher.family}; "
                f"set it to {'deepseek_v4' if config.model_type == 'deepseek_v4' else 'hf'}"
            )
        vocab_size = config.get_text_config().vocab_size
        if vocab_size != student_vocab_size:
            raise ConfigError(f"{key}: its vocabulary has {vocab_size} entries, the student's has {student_vocab_size}")
        try:
            chat = Chat.load(teacher.tokenizer or str(folder))
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from None
        difference = tokenizer_difference(student_chat, chat)
        if difference is not None:
            raise ConfigError(f"{key}: its tokenizer is not the student's: {difference}")
        width = config.get_text_config().hidden_size
        descriptions.append(
            f"{name}: {config.model_type}, hidden size {width}, vocabulary {vocab_size}, {teacher.path}"
        )
    return descriptions
