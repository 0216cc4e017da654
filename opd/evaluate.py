"""How good a policy is: pass@1 and pass@k per domain, on held-out prompts, through the FP4 path it is served by.

`measure` asks one fleet about one set of weights; `compare` asks about base, every teacher and the student, and makes
the summary that the report, the table and the exit message read.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from opd.actors import Runtime
from opd.chat import Chat
from opd.config import Config, ModelConfig, SamplingConfig, TeacherConfig, teacher_routes
from opd.data import Domain
from opd.health import check_recovery
from opd.model import architecture
from opd.types import Actor, Group
from opd.verifiers import Verdict, verify
from rollout.fleet import PROBES, Fleet
from rollout.worker import RolloutWorker

log = logging.getLogger(__name__)

SMALLEST_MARGIN = 0.05  # a teacher less than this above the base leaves recovery undefined


@dataclass(slots=True, kw_only=True, frozen=True)
class Score:
    """One policy on one domain."""

    pass_at_1: float  # share of prompts whose greedy answer passes
    pass_at_k: float | None  # share of prompts with a passing answer among k sampled ones; None without sampling
    mean_length: float  # sampled tokens of the greedy completion
    truncated_share: float  # greedy completions that ended at the length limit
    verifier_errors: int

    def as_dict(self) -> dict[str, float | None]:
        return {
            "pass@1": self.pass_at_1,
            "pass@k": self.pass_at_k,
            "mean_length": self.mean_length,
            "truncated_share": self.truncated_share,
            "verifier_errors": self.verifier_errors,
        }


def judge(groups: Sequence[Group], domains: Mapping[str, Domain], chat: Chat) -> list[list[Verdict]]:
    """The verifier's verdict on every trajectory, in the shape of `groups`."""
    verdicts = []
    for group in groups:
        prompt, config = group.prompt, domains[group.prompt.domain].config
        start = len(prompt.token_ids)
        verdicts.append(
            [
                verify(config, prompt, chat.answer_text(trajectory.token_ids[start:].tolist(), prompt.effort))
                for trajectory in group.trajectories
            ]
        )
    return verdicts


def measure(
    fleet: Fleet,
    domains: Mapping[str, Domain],
    chat: Chat,
    *,
    version: int,
    samples: int,
    temperature: float,
    max_new_tokens: int,
    limit: int | None = None,
) -> dict[str, Score]:
    """Scores the weights the fleet holds on the first `limit` held-out prompts of each domain (all by default)."""
    prompts = [prompt for domain in domains.values() for prompt in domain.eval[:limit]]
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=max_new_tokens)
    groups = fleet.generate(prompts, 1, greedy, version=version, tag="eval")
    verdicts = [row[0] for row in judge(groups, domains, chat)]
    any_passed: list[bool] = []
    errors = [verdict.error is not None for verdict in verdicts]
    if samples:
        sampled = SamplingConfig(temperature=temperature, max_new_tokens=max_new_tokens)
        sampled_groups = fleet.generate(prompts, samples, sampled, version=version, tag="eval")
        for row in judge(sampled_groups, domains, chat):
            any_passed.append(any(verdict.passed for verdict in row))
    scores = {}
    for name in domains:
        rows = [index for index, prompt in enumerate(prompts) if prompt.domain == name]
        trajectories = [groups[index].trajectories[0] for index in rows]
        scores[name] = Score(
            pass_at_1=sum(verdicts[index].passed for index in rows) / len(rows),
            pass_at_k=sum(any_passed[index] for index in rows) / len(rows) if samples else None,
            mean_length=sum(trajectory.num_loss_tokens for trajectory in trajectories) / len(rows),
            truncated_share=sum(trajectory.finish_reason == "length" for trajectory in trajectories) / len(rows),
            verifier_errors=sum(errors[index] for index in rows),
        )
    return scores


def hire_fleet(
    config: Config, model: ModelConfig, chat: Chat, runtime: Runtime, device: str, *, record_routing: bool = False
) -> Fleet:
    """The rollout workers of a run, holding the architecture of `model.path` and no version yet. `record_routing`: what
    they sample is trained on with `rollout.routing_replay`; evaluations have no use for the record.

    Their logs lie in the run's folder `wal`, one file per worker with its newest batch, beside what earlier fleets were
    at when they ended. A run has one fleet at a time (`open_run` keeps other processes out): the next stage's takes the
    folder over.
    """

    rollout = replace(config.rollout, routing_replay=record_routing)

    def hire(index: int) -> Actor:
        return runtime.spawn(
            RolloutWorker,
            model,
            rollout,
            runtime.store,
            stop_ids=chat.stop_ids,
            seed=config.seed,
            device=device,
            name=f"rollout worker {index}",
            num_gpus=config.runtime.gpus_per_worker,
        )

    log_dir = None if config.rollout.wal == "none" else os.path.join(config.run.dir, "wal")
    workers = [hire(index) for index in range(config.rollout.num_workers)]
    probes = [probe[: model.max_tokens] for probe in PROBES]  # longer ones the model may have no positions for
    return Fleet(workers, config.runtime.timeout_seconds, respawn=hire, log_dir=log_dir, probes=probes)


def compare(
    config: Config,
    runtime: Runtime,
    chat: Chat,
    domains: Mapping[str, Domain],
    *,
    base: str,
    student: str,
    device: str,
) -> dict[str, Any]:
    """base and student on every domain, each teacher on its own, and recovery = (student - base) / (teacher - base).

    A domain served by several teachers is compared with the one of the largest weight. A remote teacher only scores
    what others wrote: where there is no other, accuracy and recovery are left out. Returns the summary that
    `opd.report` reads, without the fields that only the caller knows.
    """
    routes = teacher_routes(config)
    is_remote = {name: teacher.family == "remote" for name, teacher in config.teachers.items()}
    teacher_of = {name: max(routes[name], key=lambda part: (not is_remote[part[0]], part[1]))[0] for name in domains}
    jobs: list[tuple[str, ModelConfig, dict[str, Domain]]] = [
        ("base", replace(config.model, path=base), dict(domains)),
        ("student", replace(config.model, path=student), dict(domains)),
    ]
    for name in dict.fromkeys(name for name in teacher_of.values() if not is_remote[name]):
        served = {domain: domains[domain] for domain in domains if teacher_of[domain] == name}
        jobs.append((f"teacher {name}", _teacher_model(config.model, config.teachers[name]), served))
    scores: dict[str, dict[str, Score]] = {}
    for (title, _, served), fleet, version in _with_fleets(config, runtime, chat, jobs, device):
        log.info("evaluating %s on %s", title, ", ".join(served))
        scores[title] = measure(
            fleet,
            served,
            chat,
            version=version,
            samples=config.eval.samples,
            temperature=config.eval.temperature,
            max_new_tokens=config.rollout.sampling.max_new_tokens,
        )
    rows: dict[str, dict[str, Any]] = {}
    for name in domains:
        base_score, student_score = scores["base"][name], scores["student"][name]
        rows[name] = {"teacher_name": teacher_of[name], "base": base_score.as_dict(), "recovery": None}
        if not is_remote[teacher_of[name]]:
            score = scores[f"teacher {teacher_of[name]}"][name]
            rows[name]["teacher"] = score.as_dict()
            rows[name]["recovery"] = recovery(base_score.pass_at_1, score.pass_at_1, student_score.pass_at_1)
        rows[name]["student"] = student_score.as_dict()
    return summarize(config, rows, min(len(domain.eval) for domain in domains.values()))


def recovery(base: float, teacher: float, student: float) -> float | None:
    """(student - base) / (teacher - base), or None when the teacher is hardly better than the base."""
    margin = teacher - base
    return (student - base) / margin if margin >= SMALLEST_MARGIN else None


def summarize(config: Config, rows: dict[str, dict[str, Any]], prompts_per_domain: int) -> dict[str, Any]:
    """The summary of per-domain rows, with the findings that follow from it."""
    known = [row["recovery"] for row in rows.values() if row["recovery"] is not None]
    summary: dict[str, Any] = {
        "run": config.run.name,
        "seed": config.seed,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "domains": rows,
        "mean_recovery": sum(known) / len(known) if known else None,
        "eval": {"prompts_per_domain": prompts_per_domain, "k": config.eval.samples},
        "seconds": {},
        "versions": {name: importlib.metadata.version(name) for name in ("opd", "torch", "transformers", "deepspeed")},
    }
    summary["findings"] = [
        {
            "rule": finding.rule,
            "severity": finding.severity,
            "subject": finding.subject,
            "message": finding.message,
            "step": None,
            "stage": "evaluate",
        }
        for finding in check_recovery(summary)
    ]
    return summary


def write_summary(path: str, summary: Mapping[str, Any]) -> None:
    """Replaces the file as a whole: a reader sees the old summary or the new one."""
    partial = f"{path}.partial"
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(summary, file, indent=2)
        file.write("\n")
    os.replace(partial, path)


def _teacher_model(student: ModelConfig, teacher: TeacherConfig) -> ModelConfig:
    return replace(
        student,
        family=teacher.family,
        path=teacher.path,
        revision=teacher.revision,
        fp4=student.fp4 if teacher.family == "deepseek_v4" else "none",
        fp4_index=student.fp4_index and teacher.family == "deepseek_v4",
    )


def _with_fleets(
    config: Config,
    runtime: Runtime,
    chat: Chat,
    jobs: Sequence[tuple[str, ModelConfig, dict[str, Domain]]],
    device: str,
) -> Iterator[tuple[tuple[str, ModelConfig, dict[str, Domain]], Fleet, int]]:
    """Each job with a fleet that holds its weights; models of one architecture share the fleet."""
    fleet: Fleet | None = None
    shape: str | None = None
    try:
        for version, job in enumerate(jobs):
            model = job[1]
            wanted = architecture(model)
            if fleet is None or wanted != shape:
                if fleet is not None:
                    runtime.dismiss(fleet.workers)
                fleet, shape = hire_fleet(config, model, chat, runtime, device), wanted
            fleet.load_checkpoint(model.path or "", version)
            yield job, fleet, version
    finally:
        if fleet is not None:
            runtime.dismiss(fleet.workers)
