"""What a stage is at beside its weights, as a checkpoint's record: written by one process, taken up by another.

The one idea: as little state as possible. The stream is a position, health is what the record of metrics says when it
is read again, and which stages of a run are done is a question to their folders.

    state/run.json        stage, domain, step, total_steps, policy_version, start (the weights it began with), data (the
                          stream's position), score (of `checkpoint.best_metric`, if it was measured), seconds (of
                          training so far), wandb_id, config (as resolved)
    state/teachers.json   of a distillation: who teaches, as `teachers.admission.manifest` says it
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from opd.chat import Chat
from opd.checkpoint import RECORD, Checkpoint
from opd.config import Config, ConfigError, StageConfig
from opd.data import Domain, PromptStream
from opd.health import Health
from opd.metrics import RECORD_KEYS, Metrics, read_metrics
from teachers.admission import compare_manifests, manifest

log = logging.getLogger(__name__)

TEACHERS = os.path.join("state", "teachers.json")
# Not what a stage computes, but where it does so and what it leaves.
_FREE = ("resume", "run", "runtime", "tracking", "checkpoint", "teachers")  # the manifest speaks of teachers


@dataclass(slots=True, kw_only=True, frozen=True)
class Stage:
    """One stage of one run: `name` is base, sft, grpo or distill, `start` the weights it begins with."""

    config: Config
    name: str
    start: str
    run_dir: str
    domains: Mapping[str, Domain]
    chat: Chat

    @property
    def settings(self) -> StageConfig:
        return getattr(self.config.stages, self.name)

    @property
    def domain(self) -> str | None:
        """The one domain of a specialist; None for a stage on all domains, if there are several."""
        return next(iter(self.domains)) if len(self.domains) == 1 else None


class Progress:
    """Where a stage begins, or goes on: `first` is the number of its next step, `stream` is there, and `health` knows
    the steps before."""

    def __init__(self, stage: Stage, checkpoint: Checkpoint | None) -> None:
        """Raises ConfigError for a checkpoint of another stage, prompts or teachers."""
        self._stage, self._started = stage, time.monotonic()
        self.health, self.stream = Health(), PromptStream(dict(stage.domains), stage.config.seed)
        self.first, self._seconds, self._wandb_id = 0, 0.0, None
        self._teachers = manifest(stage.config.teachers) if stage.name == "distill" else None
        self.has_new_teachers = checkpoint is None  # or else ones that the checkpoint's run did not have
        if checkpoint is not None:
            self._take_up(checkpoint)

    def _take_up(self, checkpoint: Checkpoint) -> None:
        record, stage = checkpoint.record, self._stage
        if (record["stage"], record["domain"]) != (stage.name, stage.domain):
            raise ConfigError(
                f"{checkpoint.folder} is of stage {record['stage']} and domain {record['domain']}; it cannot go on as "
                f"stage {stage.name} and domain {stage.domain}"
            )
        for change in _changes(record["config"], _plain(asdict(stage.config))):
            log.warning("the run goes on with another setting than it was begun with: %s", change)
        self.stream.load_state(record["data"])
        self.first, self._seconds, self._wandb_id = checkpoint.step, record["seconds"], record["wandb_id"]
        if self._teachers is not None:
            with open(os.path.join(checkpoint.folder, TEACHERS), encoding="utf-8") as file:
                before = json.load(file)
            changes = compare_manifests(before, self._teachers, stage.config.pool.allow_changed)
            self.has_new_teachers = any(
                before.get(name, {}).get(key) != now[key]
                for name, now in self._teachers.items()
                for key in ("sha256", "source", "precision")
            )
            for change in changes:
                log.warning("the run goes on with other teachers than it was begun with: %s", change)
        path = os.path.join(stage.run_dir, "metrics.jsonl")
        for line in read_metrics(path) if os.path.exists(path) else ():
            self.health.check(line["step"], _values(line))

    def metrics(self) -> Metrics:
        """The record of the stage's numbers, opened to go on at `first`."""
        stage = self._stage
        plain = {**asdict(stage.config), "domain": stage.domain}
        tracking, steps = stage.config.tracking, stage.settings.steps
        return Metrics(stage.run_dir, tracking, plain, stage.name, steps, wandb_id=self._wandb_id)

    def files(
        self, step: int, position: dict[str, Any], values: Mapping[str, float], metrics: Metrics
    ) -> dict[str, Any]:
        """The JSON files of a checkpoint after `step` steps, whose last one had `values`."""
        stage = self._stage
        record = {
            "stage": stage.name,
            "domain": stage.domain,
            "step": step,
            "total_steps": stage.settings.steps,
            "policy_version": step,
            "start": _source(stage.start, stage.config.run.dir),
            "data": position,
            "score": _score(values, stage.config.checkpoint.best_metric),
            "seconds": round(self._seconds + time.monotonic() - self._started, 3),
            "wandb_id": metrics.wandb_id,
            "config": asdict(stage.config),
        }
        return {RECORD: record} | ({TEACHERS: self._teachers} if self._teachers is not None else {})


def check_start(checkpoint: Checkpoint, start: str, run_dir: str) -> None:
    """Raises ConfigError when the weights a stage begins with are not those that the checkpoint began with."""
    before, now = checkpoint.record["start"], _source(start, run_dir)
    if before != now:
        raise ConfigError(
            f"{checkpoint.folder} was trained from {before}, and the stage's start is now {now}: what came before it "
            "was trained further. Choose another run.name, or train anew with run.overwrite=true"
        )


def _source(start: str, run_dir: str) -> str:
    """A checkpoint's own folder, relative to the run's if it is in it (a run may be moved), or its hub id."""
    if not os.path.isdir(start):
        return start
    folder, run = os.path.realpath(start), os.path.realpath(run_dir)
    return os.path.relpath(folder, run) if folder.startswith(run + os.sep) else folder


def _score(values: Mapping[str, float], metric: str) -> float | None:
    found = [value for key, value in values.items() if key == metric or key.startswith(f"{metric}/")]
    return fmean(found) if found else None


def _values(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a metrics line, as they were logged."""
    return {
        key: float(line[f"{key}/nonfinite"]) if value is None else value
        for key, value in line.items()
        if key not in RECORD_KEYS and not key.endswith("/nonfinite")
    }


def _plain(value: Any) -> Any:
    """As JSON has it: tuples are lists."""
    return json.loads(json.dumps(value))


def _changes(then: Any, now: Any, key: str = "") -> Iterator[str]:
    """Example: "learner.grad_clip 1.0 -> 0.5"."""
    if isinstance(then, dict) and isinstance(now, dict):
        for name in sorted({*then, *now}):
            if key or name not in _FREE:
                yield from _changes(then.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif then != now:
        yield f"{key} {then} -> {now}"
