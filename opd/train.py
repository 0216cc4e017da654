"""The loop, for every stage: act, judge, learn, publish, log.

Stages differ in two places only. SFT (`base`, `sft`) acts by demonstration and its signal says "these tokens"; GRPO
and OPD act by sampling, and judge by a verifier or by teachers. Everything else of a step is the same lines of `train`.

A step consumes prompts and weights of version v, and produces weights of version v + 1. Each phase waits for the one
before it: rollout for the published version, scoring for all rollouts, the learner for all signals, publish for the
learner. Checkpoints and evaluations happen between two steps.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from opd.actors import Runtime
from opd.batching import Plan, plan
from opd.chat import Chat
from opd.config import Config, ConfigError, SamplingConfig, StageConfig, teacher_routes
from opd.data import Domain, PromptStream
from opd.evaluate import hire_fleet, judge, measure
from opd.health import Health
from opd.learner import Learner, LearnerSettings, merge_stats
from opd.losses import group_advantages
from opd.metrics import Metrics
from opd.model import with_path
from opd.types import Actor, Advantage, Demonstration, Group, Signal, TeacherHead, TeacherHidden
from rollout.fleet import Fleet
from teachers.local import TeacherHost
from teachers.pool import TeacherPool, place

log = logging.getLogger(__name__)

SAMPLES = ("grpo", "distill")  # stages that act by sampling
Signals = Sequence[Sequence[Signal | tuple[TeacherHidden, ...]]]


@dataclass(slots=True, kw_only=True)
class Crew:
    """The actors of a stage. `fleet` is there for stages that sample or evaluate, `pool` for distillation."""

    learners: list[Actor]
    fleet: Fleet | None = None
    pool: TeacherPool | None = None
    hosts: list[Actor] = field(default_factory=list)
    heads: dict[str, TeacherHead] = field(default_factory=dict)
    timeout_seconds: float = 0.0

    def on_all_ranks(self, method: str, *args: Any) -> list[Any]:
        """Calls a method on every learner rank at once, since ranks meet in collectives."""
        futures = [learner.submit(method, *args) for learner in self.learners]
        return [future.result(self.timeout_seconds) for future in futures]

    def publish(self, version: int) -> None:
        """One FP4 snapshot of the learner's weights, put once, read by every worker."""
        if self.fleet is not None:
            self.fleet.load(self.learners[0].submit("publish", version).result(self.timeout_seconds))

    def actors(self) -> list[Actor]:
        return self.learners + self.hosts + (self.fleet.workers if self.fleet is not None else [])


def train(
    config: Config,
    stage: str,
    *,
    start: str,
    run_dir: str,
    domains: Mapping[str, Domain],
    chat: Chat,
    runtime: Runtime,
) -> str:
    """Trains `start` (a checkpoint folder) through one stage; returns the folder of the weights it ends with.

    `stage` is base, sft, grpo or distill. Writes metrics.jsonl, findings.jsonl and checkpoints/ into `run_dir`, and
    leaves `run_dir`/hf pointing at the newest checkpoint's weights. Raises ConfigError for what the configuration got
    wrong and RuntimeError when an actor dies.
    """
    settings: StageConfig = getattr(config.stages, stage)
    names = list(domains)
    os.makedirs(run_dir, exist_ok=True)
    record = {**asdict(config), "domain": names[0] if len(names) == 1 else None}
    crew = _hire(config, stage, start, chat, runtime)
    health, stream = Health(), PromptStream(dict(domains), config.seed)
    try:
        with Metrics(run_dir, config.tracking, record, stage, settings.steps) as metrics:
            crew.publish(0)
            for step in range(settings.steps):
                clock = Clock()
                with clock.phase("rollout"):
                    groups = _act(config, stage, settings, crew, stream.next(settings.prompts_per_step), domains, step)
                with clock.phase("score"):
                    signals, values = _judge(stage, crew, groups, domains, chat)
                with clock.phase("train"):
                    work = _plan(config, groups, signals)
                    values |= merge_stats(crew.on_all_ranks("step", work, crew.heads)) if work else {}
                last = step + 1 == settings.steps
                evaluates = settings.eval_every and (last or (step + 1) % settings.eval_every == 0)
                if stage in SAMPLES or evaluates:
                    with clock.phase("publish"):
                        crew.publish(step + 1)
                if crew.fleet is not None and evaluates:
                    with clock.phase("evaluate"):
                        values |= _evaluate(config, crew.fleet, domains, chat, step + 1)
                if last or (settings.checkpoint_every and (step + 1) % settings.checkpoint_every == 0):
                    with clock.phase("checkpoint"):
                        _save(crew, run_dir, step + 1, chat, stream)
                values |= clock.metrics(groups) | {"policy/version": step + 1}
                metrics.log(step + 1, values)
                _report(health, step + 1, stage, values, run_dir)
            if settings.steps == 0:
                _save(crew, run_dir, 0, chat, stream)
    finally:
        runtime.dismiss(crew.actors())
    return os.path.join(run_dir, "hf")


def _act(
    config: Config,
    stage: str,
    settings: StageConfig,
    crew: Crew,
    prompts: Sequence[Any],
    domains: Mapping[str, Domain],
    step: int,
) -> list[Group]:
    """Demonstrations, or the policy's own completions under the version published last."""
    if stage not in SAMPLES:
        return [Group(prompt=p, trajectories=(domains[p.domain].demonstration(p),)) for p in prompts]
    assert crew.fleet is not None
    sampling = SamplingConfig(**asdict(config.rollout.sampling), temperature=settings.temperature)
    return crew.fleet.generate(prompts, settings.group_size, sampling, version=step, tag=f"{stage}/{step}")


def _judge(
    stage: str, crew: Crew, groups: Sequence[Group], domains: Mapping[str, Domain], chat: Chat
) -> tuple[Signals, dict[str, float]]:
    """The signal of every trajectory, and what was learnt about the rollouts on the way."""
    if stage not in SAMPLES:
        return [[Demonstration() for _ in group.trajectories] for group in groups], {}
    verdicts = judge(groups, domains, chat)
    values = _rollout_metrics(groups) | _reward_metrics(groups, verdicts)
    if stage == "distill":
        assert crew.pool is not None
        signals = crew.pool.score(groups)
        return signals, values | crew.pool.metrics()
    advantages = [group_advantages([verdict.reward for verdict in row]) for row in verdicts]
    values["grpo/zero_advantage_share"] = sum(not any(row) for row in advantages) / len(advantages)
    return [[Advantage(value=value) for value in row] for row in advantages], values


def _plan(config: Config, groups: list[Group], signals: Signals) -> Plan | None:
    """The step's work; None when GRPO has nothing to say because every group was all right or all wrong."""
    kept = [index for index, row in enumerate(signals) if not all(s == Advantage(value=0.0) for s in row)]
    if not kept:
        return None
    learner = config.learner
    return plan(
        [groups[index] for index in kept],
        [signals[index] for index in kept],
        num_ranks=learner.num_ranks,
        micro_batch_tokens=learner.micro_batch_tokens,
    )


def _hire(config: Config, stage: str, start: str, chat: Chat, runtime: Runtime) -> Crew:
    """Starts the actors of a stage, so that slow constructors overlap."""
    settings: StageConfig = getattr(config.stages, stage)
    device = pick_device(config)
    model = with_path(config.model, os.path.abspath(start) if os.path.isdir(start) else start)
    address, port = runtime.free_port()
    learners = [
        runtime.spawn(
            Learner,
            LearnerSettings(
                model=model,
                learner=config.learner,
                stage=settings,
                total_steps=settings.steps,
                seed=config.seed,
                rank=rank,
                world_size=config.learner.num_ranks,
                master_address=address,
                master_port=port,
                device=device,
                threads=config.runtime.actor_threads,
            ),
            runtime.store,
            name=f"learner rank {rank}",
            num_gpus=config.runtime.gpus_per_rank,
        )
        for rank in range(config.learner.num_ranks)
    ]
    crew = Crew(learners=learners, timeout_seconds=config.runtime.timeout_seconds)
    if stage in SAMPLES or settings.eval_every:
        crew.fleet = hire_fleet(config, model, chat, runtime, device)
    if stage == "distill":
        routes = teacher_routes(config)
        teachers = {
            name: replace(teacher, path=os.path.abspath(teacher.path) if os.path.isdir(teacher.path) else teacher.path)
            for name, teacher in config.teachers.items()
        }
        work = dict.fromkeys(teachers, 0.0)
        for domain, served_by in routes.items():
            for teacher, _ in served_by:
                work[teacher] += config.data.domains[domain].weight
        placement = place(teachers, config.runtime.num_teacher_hosts, work)
        crew.hosts = [
            runtime.spawn(
                TeacherHost,
                {name: teacher for name, teacher in teachers.items() if placement[name] == host},
                runtime.store,
                fp4=config.model.fp4,
                fp4_index=config.model.fp4_index,
                threads=config.runtime.actor_threads,
                device=device,
                micro_batch_tokens=config.learner.micro_batch_tokens,
                hidden_dtype=torch.float32 if config.stages.distill.hidden_dtype == "float32" else torch.bfloat16,
                name=f"teacher host {host}",
                num_gpus=config.runtime.gpus_per_teacher,
            )
            for host in sorted(set(placement.values()))
        ]
        crew.pool = TeacherPool(crew.hosts, routes, placement, config.runtime.timeout_seconds)
        crew.heads = crew.pool.heads()
    return crew


def pick_device(config: Config) -> str:
    """cuda when it was asked for, or is there and the run may choose. Raises ConfigError when it is not there."""
    available = torch.cuda.is_available()
    if config.runtime.device == "cuda" and not available:
        raise ConfigError("runtime.device=cuda, but no CUDA device is available; choose auto or cpu")
    return "cuda" if available and config.runtime.device != "cpu" else "cpu"


def _evaluate(
    config: Config, fleet: Fleet, domains: Mapping[str, Domain], chat: Chat, version: int
) -> dict[str, float]:
    scores = measure(
        fleet,
        domains,
        chat,
        version=version,
        samples=0,
        temperature=config.eval.temperature,
        max_new_tokens=config.rollout.sampling.max_new_tokens,
        limit=config.eval.inline_prompts,
    )
    accuracy = {f"eval/pass_at_1/{name}": score.pass_at_1 for name, score in scores.items()}
    return accuracy | {f"eval/mean_length/{name}": score.mean_length for name, score in scores.items()}


def _save(crew: Crew, run_dir: str, step: int, chat: Chat, stream: PromptStream) -> None:
    """checkpoints/step_<n>/{hf,state}, then `hf` points at it; an unfinished one is never pointed at."""
    folder = os.path.abspath(os.path.join(run_dir, "checkpoints", f"step_{step}"))
    crew.on_all_ranks("save", folder, chat)
    with open(os.path.join(folder, "state", "data.json"), "w", encoding="utf-8") as file:
        json.dump(stream.state(), file)
    link, fresh = os.path.join(run_dir, "hf"), os.path.join(run_dir, ".hf.next")
    if os.path.lexists(fresh):
        os.unlink(fresh)
    os.symlink(os.path.join("checkpoints", f"step_{step}", "hf"), fresh)
    os.replace(fresh, link)


def _report(health: Health, step: int, stage: str, values: Mapping[str, float], run_dir: str) -> None:
    """Rules that fired: to the log, and to findings.jsonl for the report."""
    for finding in health.check(step, values):
        level = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}[finding.severity]
        log.log(level, "%s: %s", finding.rule, finding.message)
        line = {
            "rule": finding.rule,
            "severity": finding.severity,
            "subject": finding.subject,
            "message": finding.message,
            "step": step,
            "stage": stage,
        }
        with open(os.path.join(run_dir, "findings.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
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
    return values


def _reward_metrics(groups: Sequence[Group], verdicts: Sequence[Sequence[Any]]) -> dict[str, float]:
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
    """Seconds of each phase of one step."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started

    def metrics(self, groups: Sequence[Group]) -> dict[str, float]:
        total = time.perf_counter() - self.started
        tokens = sum(len(trajectory.token_ids) for group in groups for trajectory in group.trajectories)
        sampled = sum(trajectory.num_loss_tokens for group in groups for trajectory in group.trajectories)
        values = {f"phase/{name}_seconds": seconds for name, seconds in self.seconds.items()}
        values |= {"phase/total_seconds": total, "perf/tokens_per_second": tokens / total}
        if self.seconds.get("rollout"):
            values["perf/rollout_tokens_per_second"] = sampled / self.seconds["rollout"]
        return values


def clear(folder: str) -> None:
    """Removes an earlier attempt's files from a run's folder."""
    if os.path.isdir(folder):
        shutil.rmtree(folder)
