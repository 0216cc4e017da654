"""The actors of a stage: hired together, called together, and asked what they were doing when one dies or hangs.

The one idea: whoever calls an actor goes through a `Watched` one, which knows its unanswered calls. So a death or a
missed deadline is reported with what everybody was at, whoever was waiting for whom. A process that was one of several
ranks is not used again: it stays a member of their group, which a peer may leave by dying at any time.

Left out: starting processes (`opd.actors`), and replacing single workers (`rollout.fleet`).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from opd.actors import ActorDied, RayActor, Runtime
from opd.chat import Chat
from opd.config import Config, ConfigError, PoolConfig, RuntimeConfig, StageConfig, TeacherConfig
from opd.data import Domain
from opd.evaluate import hire_fleet
from opd.learner import Learner, LearnerSettings
from opd.model import with_path
from opd.types import Actor, Future, Signal, Store, TeacherHead, TeacherHidden, TeacherLogprobs, Trajectory
from opd.weights import load_model_config
from rollout.fleet import Fleet
from teachers.admission import admit
from teachers.pool import TeacherPool, hire_teachers
from teachers.store import HiddenStore

log = logging.getLogger(__name__)

SAMPLES = ("grpo", "distill")  # stages that act by sampling
POLL_SECONDS = 0.25  # the longest one rank is waited for before the others are looked at
GRACE_SECONDS = 60.0  # for a death to show, on a busy machine, after another rank failed: perhaps because of it
EXAMINED = 16  # demonstrations of each domain on which teachers are examined before the first step
Signals = Sequence[Sequence[Signal | tuple[TeacherHidden | TeacherLogprobs, ...]]]
_PHASES = {"step": "train", "save": "checkpoint", "finish_saving": "checkpoint", "load": "checkpoint"}


@dataclass(slots=True)
class _Call:
    method: str
    since: float  # by time.monotonic
    future: Future
    answered: bool = False

    def result(self, timeout_seconds: float | None = None) -> Any:
        try:
            value = self.future.result(timeout_seconds)
        except (TimeoutError, ActorDied):  # what a dead actor was asked stays unanswered
            raise
        except Exception:
            self.answered = True
            raise
        self.answered = True
        return value


class Watched:
    """An actor, with the calls that it has not answered yet."""

    def __init__(self, actor: Actor) -> None:
        self.name, self.actor = actor.name, actor
        self.calls: list[_Call] = []

    def submit(self, method: str, *args: Any, **kwargs: Any) -> Future:
        self.calls = [call for call in self.calls if not call.answered]
        self.calls.append(_Call(method, time.monotonic(), self.actor.submit(method, *args, **kwargs)))
        return self.calls[-1]

    def doing(self) -> str:
        """Example: "step for 12 s", "idle", "dead"."""
        for call in self.calls:
            if not call.answered:
                try:
                    call.result(0.0)
                except TimeoutError:
                    return f"{call.method} for {time.monotonic() - call.since:.0f} s"
                except ActorDied:
                    return "dead"
                except Exception:  # failed, and free for the next call
                    continue
        return "idle"


class _Watching:
    """A runtime whose actors are watched."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime, self.kind, self.store = runtime, runtime.kind, runtime.store

    def spawn(self, cls: type, *args: Any, name: str, **kwargs: Any) -> Watched:
        return Watched(self._runtime.spawn(cls, *args, name=name, **kwargs))

    def free_port(self) -> tuple[str, int]:
        return self._runtime.free_port()


@dataclass(slots=True, kw_only=True, frozen=True)
class Snapshot:
    """Answers of all ranks, of which rank 0's count: the handle of the weights, and what they say of the probe."""

    handles: list[Future]
    probes: list[Future]  # none where the learner computes more coarsely than a worker


@dataclass(slots=True, kw_only=True)
class Crew:
    """The actors of a stage. `fleet` is there for stages that sample or evaluate, `pool` for distillation."""

    runtime: RuntimeConfig
    learners: list[Actor] = field(default_factory=list)
    fleet: Fleet | None = None
    hosts: list[Actor] = field(default_factory=list)
    pool: TeacherPool | None = None
    hidden: HiddenStore | None = None  # where what the pool's teachers say of a step lies
    heads: dict[str, TeacherHead] = field(default_factory=dict)
    probed: bool = True  # whether workers must agree with the learner, or else with each other alone

    def on_all_ranks(self, method: str, *args: Any) -> list[Any]:
        """Calls a method on every learner rank at once, since ranks meet in collectives; the answers by rank.

        Raises ActorDied for a rank that died, whatever the others made of it; TimeoutError for one that did not answer
        before the deadline; and else what a rank raised.
        """
        seconds = deadline(self.runtime, _PHASES.get(method))
        ends = time.monotonic() + seconds
        waiting = {rank: learner.submit(method, *args) for rank, learner in enumerate(self.learners)}
        answers: dict[int, Any] = {}
        failure: Exception | None = None
        while waiting:
            for rank, future in list(waiting.items()):
                left = max(0.0, ends - time.monotonic())
                try:
                    answers[rank] = future.result(min(POLL_SECONDS, left))
                    del waiting[rank]
                except TimeoutError as error:
                    if left > POLL_SECONDS:
                        continue
                    if failure is not None:
                        raise failure from None
                    name = self.learners[rank].name
                    raise TimeoutError(f"{name}.{method} did not answer within {seconds:g} s") from error
                except ActorDied:
                    raise
                except Exception as error:
                    del waiting[rank]
                    if failure is None:
                        failure, ends = error, min(ends, time.monotonic() + GRACE_SECONDS)
        if failure is not None:
            raise failure
        return [answers[rank] for rank in range(len(self.learners))]

    def meet(self) -> None:
        """Everybody is built, which the deadlines of phases do not count, and ranks have formed their group."""
        for built in [actor.submit("__repr__") for actor in self.actors()]:
            built.result(self.runtime.timeout_seconds)
        if len(self.learners) > 1:
            meet_at = self.learners[0].submit("meet_at").result(self.runtime.timeout_seconds)
            self.on_all_ranks("join", *meet_at)

    def meet_teachers(self, config: PoolConfig, examined: Sequence[Trajectory], student: TeacherConfig | None) -> None:
        """Fetches the heads; examines the teachers on `examined`, if there is any. Raises ConfigError as `admit`."""
        assert self.pool is not None
        self.heads = self.pool.heads()
        if examined:
            for line in admit(self.pool, config, examined, student):
                log.info("%s", line)

    def free(self, signals: Signals) -> None:
        """The teachers' states of a step have been learned from; those on disk are deleted."""
        for signal in (part for row in signals for parts in row if isinstance(parts, tuple) for part in parts):
            if self.hidden is not None and isinstance(signal, TeacherHidden):
                self.hidden.free(signal.hidden)

    def snapshot(self, version: int) -> Snapshot:
        """The weights as they are now, for `publish`: ranks do what they are asked next after it."""
        assert self.fleet is not None
        handles = [learner.submit("publish", version) for learner in self.learners]
        probes = [learner.submit("probe", self.fleet.probes) for learner in self.learners] if self.probed else []
        return Snapshot(handles=handles, probes=probes)

    def publish(self, snapshot: Snapshot) -> None:
        """One FP4 snapshot of the learner's weights, put once, read by every worker; each must then say of a few
        prompts what the learner says of them."""
        assert self.fleet is not None
        seconds = deadline(self.runtime, "train")
        handle, *_ = [future.result(seconds) for future in snapshot.handles]
        reference, *_ = [future.result(seconds) for future in snapshot.probes] or [None]
        self.fleet.load(handle, reference)

    def actors(self) -> list[Watched]:
        everybody = self.learners + self.hosts + (self.fleet.workers if self.fleet is not None else [])
        return [actor for actor in everybody if isinstance(actor, Watched)]

    def doing(self) -> str:
        """What every actor is at. Example: "learner rank 0: step for 12 s; rollout worker 0: idle"."""
        return "; ".join(f"{actor.name}: {actor.doing()}" for actor in self.actors())

    def casualty(self, error: Exception) -> str | None:
        """The actor whose end explains `error`, or that hangs; None if all live, and the error is of another kind."""
        if isinstance(error, ActorDied):
            return error.name
        if isinstance(error, TimeoutError):
            return next((actor.name for actor in self.actors() if str(error).startswith(f"{actor.name}.")), "an actor")
        asked = {actor.name: actor.submit("__repr__") for actor in self.actors()}
        ends = time.monotonic() + GRACE_SECONDS
        while asked and time.monotonic() < ends:  # a value that died with its owner, a peer that hung up
            for name, answer in list(asked.items()):
                try:
                    answer.result(POLL_SECONDS)
                except ActorDied:
                    return name
                except TimeoutError:
                    continue
                del asked[name]
        # Workers and teachers may be busy with something else, ranks were all asked the same.
        return next((learner.name for learner in self.learners if learner.name in asked), None)

    def dismiss(self, runtime: Runtime, *, failed: bool) -> None:
        """Ends all actors. Their processes may serve again, but for those of ranks that had peers, or that failed."""
        if self.fleet is not None:
            self.fleet.respawn = None  # its thread, if it has one, must not replace who is dismissed
        for learner in self.learners if failed or len(self.learners) > 1 else []:
            if isinstance(learner, Watched) and isinstance(learner.actor, RayActor):
                learner.actor.reserves = True  # so that the runtime ends the process
        runtime.dismiss([watched.actor for watched in self.actors()])
        if self.hidden is not None:
            self.hidden.clear()


def deadline(runtime: RuntimeConfig, phase: str | None) -> float:
    """Seconds one call of a phase may take."""
    return runtime.deadlines.get(phase or "", runtime.timeout_seconds)


def hire(config: Config, stage: str, start: str, run_dir: str, chat: Chat, runtime: Runtime) -> Crew:
    """Starts the actors of a stage, so that slow constructors overlap."""
    settings: StageConfig = getattr(config.stages, stage)
    device = pick_device(config)
    model = with_path(config.model, os.path.abspath(start) if os.path.isdir(start) else start)
    watching = cast(Runtime, _Watching(runtime))  # all that those who hire ask of a runtime
    crew = Crew(runtime=config.runtime, probed=config.learner.precision == "fp32")
    store: Store = runtime.store
    try:
        if stage == "distill":
            store = crew.hidden = HiddenStore(runtime.store, os.path.join(run_dir, "hidden"))
        for rank in range(config.learner.num_ranks):
            rank_settings = LearnerSettings(
                model=model,
                learner=config.learner,
                stage=settings,
                total_steps=settings.steps,
                seed=config.seed,
                rank=rank,
                world_size=config.learner.num_ranks,
                master_address=runtime.free_port()[0],
                master_port=0,  # see `Crew.meet`
                device=device,
                threads=config.runtime.actor_threads,
                dump_dir=os.path.join(run_dir, "dumps"),
            )
            name, gpus = f"learner rank {rank}", config.runtime.gpus_per_rank
            crew.learners.append(watching.spawn(Learner, rank_settings, store, name=name, num_gpus=gpus))
        if stage in SAMPLES or settings.eval_every:
            replays = config.rollout.routing_replay and stage in SAMPLES
            crew.fleet = hire_fleet(config, model, chat, watching, device, record_routing=replays)
            crew.fleet.timeout_seconds = deadline(config.runtime, "rollout")
        if stage == "distill":
            crew.hosts, crew.pool = hire_teachers(
                config,
                watching,
                os.path.join(run_dir, "hidden"),
                device=device,
                vocab_size=int(load_model_config(start, config.model.revision).get_text_config().vocab_size),
                timeout_seconds=deadline(config.runtime, "score"),
            )
    except BaseException:
        crew.dismiss(runtime, failed=True)
        raise
    return crew


def demonstrations(domains: Mapping[str, Domain]) -> list[Trajectory]:
    """A few reference answers of each domain whose source has them."""
    found: list[Trajectory] = []
    for domain in domains.values():
        prompts = [domain.train(index) for index in range(min(EXAMINED, domain.train_size))]
        found += [domain.demonstration(prompt) for prompt in prompts if prompt.reference.get("completion") is not None]
    return found


def pick_device(config: Config) -> str:
    """cuda when it was asked for, or is there and the run may choose. Raises ConfigError when it is not there."""
    available = torch.cuda.is_available()
    if config.runtime.device == "cuda" and not available:
        raise ConfigError("runtime.device=cuda, but no CUDA device is available; choose auto or cpu")
    return "cuda" if available and config.runtime.device != "cpu" else "cpu"
