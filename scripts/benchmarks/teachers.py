"""Forty teachers, four on disk for every one in memory: what the pool holds at its highest, and what it costs in time.

Checkpoints of the quickstart's size with fresh weights, one per domain, all of them different. Memory is how far the
resident set of a fresh process rises at its highest while a pool scores two steps of trajectories of random tokens,
after a pool of one teacher has scored one (libraries, threads). It is put beside what a pool of one teacher needs for
as much work per teacher, plus the slot in which the next one is read, plus the teachers that were asked to stay. Time
is that of whole distillation steps, rollouts and learning included, of runs that differ in nothing but where weights
lie; and their losses must be the same, bit for bit.

Keys of its own: `teachers`, the number of them (40), and `steps`, of a run that count (6); others are those of `opd`.
"""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from opd import pipeline
from opd.__main__ import compose
from opd.actors import LocalStore, open_runtime
from opd.config import Config, ConfigError, TeacherConfig
from opd.metrics import read_metrics
from opd.model import new_v4
from opd.types import Trajectory, no_routing
from opd.weights import save_checkpoint
from scripts.benchmarks import Figure, peak_memory, report, split_arguments
from teachers.local import TeacherHost
from teachers.store import HiddenStore

OWN = {"teachers": 40, "steps": 6}
SETTINGS = (
    "runtime=local",
    "tracking.wandb=disabled",
    "stages.base.steps=40",  # it learns to end its answers, or else every rollout would run to the limit
    "stages.distill.eval_every=0",
    "stages.distill.checkpoint_every=0",
    "pool.examine=off",  # weights that were never trained could not teach
    "learner.num_ranks=1",
)
WARM_UP = 2  # steps of a run that do not count
ROUNDS = 2  # runs of each kind, in turn
RESIDENT_EVERY = 5  # one in memory, four on disk
TOKENS = 48  # of a trajectory, half of them loss tokens
M_MMAP_THRESHOLD = -3  # of malloc.h


def main(argv: list[str]) -> int:
    """The exit status of `report`, or 2 for overrides that are refused."""
    as_json, overrides = split_arguments(argv)
    logging.getLogger("opd").setLevel(logging.ERROR)  # findings about teachers that know nothing
    try:
        own = {name: _own(name, overrides) for name in OWN}
        rest = [override for override in overrides if override.partition("=")[0] not in OWN]
        with tempfile.TemporaryDirectory(prefix="opd_teachers_") as folder:
            config = compose("quickstart", [*SETTINGS, *rest, f"run.root={folder}"])[0]
            config.stages.distill.steps = WARM_UP + own["steps"]
            figures = measure(config, folder, own["teachers"])
    except ConfigError as error:
        print(f"teachers: {error}", file=sys.stderr)
        return 2
    stage = config.stages.distill
    title = (
        f"{own['teachers']} teachers, of which {own['teachers'] // RESIDENT_EVERY} stay in memory: "
        f"{stage.prompts_per_step} prompts x {stage.group_size} a step, runtime={config.runtime.kind}"
    )
    return report(title, figures, as_json)


def _own(name: str, overrides: list[str]) -> int:
    value = dict(override.split("=", 1) for override in overrides).get(name, str(OWN[name]))
    if not value.isdigit() or int(value) < 1:
        raise ConfigError(f"{name}={value} must be a whole number of at least 1")
    return int(value)


def measure(config: Config, folder: str, num_teachers: int) -> list[Figure]:
    names = [f"t{index:02d}" for index in range(num_teachers)]
    task = next(iter(config.data.domains.values()))
    config.data.domains = {name: dataclasses.replace(task, weight=1.0, seed=index) for index, name in enumerate(names)}
    config.teachers = {name: TeacherConfig(path=os.path.join(folder, "teachers", name)) for name in names}
    with pipeline.open_run(config), open_runtime(config.runtime) as runtime:
        pipeline.run_base(config, runtime)
        chat = pipeline.student_chat(config)
        for seed, teacher in enumerate(config.teachers.values()):
            save_checkpoint(teacher.path, new_v4(config.model, chat.vocab_size, 1 + seed), chat)
    size = sum(path.stat().st_size for path in Path(config.teachers[names[0]].path).glob("*.safetensors"))
    figures = [
        Figure(name="cores", value=len(os.sched_getaffinity(0)), unit="count"),
        Figure(name="weights of a teacher", value=size / 2**20, unit="MiB"),
    ]
    return [*figures, *_memory(config, folder, names, chat.vocab_size, size), *_time(config, names)]


# ---- memory ----------------------------------------------------------------------------------------------------------


def _memory(config: Config, folder: str, names: list[str], vocab_size: int, size: int) -> list[Figure]:
    per_teacher = max(1, config.stages.distill.prompts_per_step * config.stages.distill.group_size // len(names))

    def peak(teachers: list[str], stay: list[str], prefetch: bool) -> int:
        paths = {name: config.teachers[name].path for name in teachers}
        work = partial(score, paths, stay, folder, per_teacher, vocab_size, config.model.fp4, prefetch, 2)
        warm_up = partial(_prepare, {names[0]: paths[names[0]]}, [], folder, per_teacher, vocab_size, config.model.fp4)
        return peak_memory(work, warm_up)

    stay = names[::RESIDENT_EVERY]
    one = peak(names[:1], [], False)
    on_disk, mixed = peak(names, [], True), peak(names, stay, True)
    all_stay = peak(names, names, False)
    figures = [
        Figure(name="pool of one teacher", value=one / 2**20, unit="MiB"),
        Figure(name=f"pool of {len(names)}, all in memory", value=all_stay / 2**20, unit="MiB"),
    ]
    for name, found, staying in (("all on disk", on_disk, 0), ("1 of 5 in memory", mixed, len(stay))):
        share = found / (one + size + staying * size)
        figures += [
            Figure(name=f"pool of {len(names)}, {name}", value=found / 2**20, unit="MiB"),
            Figure(
                name=f"... over one, a slot and {staying} that stay",
                value=share,
                unit="x",
                bar="<= 1.10",
                ok=share <= 1.10,
            ),
        ]
    return figures


def _prepare(paths: dict[str, str], stay: list[str], folder: str, per_teacher: int, vocab_size: int, fp4: str) -> None:
    """Loads the libraries, and has freed tensors given back to the system at once: glibc would keep those of the
    warm-up for what is measured, where nobody would see them."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    score(paths, stay, folder, per_teacher, vocab_size, fp4, False, 1)


def score(
    paths: dict[str, str],
    stay: list[str],
    folder: str,
    per_teacher: int,
    vocab_size: int,
    fp4: str,
    prefetch: bool,
    steps: int,
) -> None:
    """Scores `per_teacher` trajectories by each teacher in every step; states go to disk and are freed after it."""
    torch.set_num_threads(1)
    store = HiddenStore(LocalStore(), os.path.join(folder, "hidden"), 0)
    teachers = {
        name: TeacherConfig(path=path, residency="host" if name in stay else "disk") for name, path in paths.items()
    }
    host = TeacherHost(teachers, store, fp4=fp4, threads=1, device="cpu", micro_batch_tokens=8192, prefetch=prefetch)
    host.heads()
    names = list(teachers)
    for step in range(steps):
        signals: list[Any] = []
        for index, name in enumerate(names):
            rows = [_trajectory(step * 1000 + index * per_teacher + row, vocab_size) for row in range(per_teacher)]
            signals += host.score(name, rows, 1.0, names[index + 1] if index + 1 < len(names) else None)
        host.release()
        for signal in signals:
            store.free(signal.hidden)
    host.close()
    store.clear()


def _trajectory(seed: int, vocab_size: int) -> Trajectory:
    return Trajectory(
        id=f"t/train/{seed}#0@0",
        prompt_id=f"t/train/{seed}",
        domain="t",
        token_ids=np.random.default_rng(seed).integers(0, vocab_size, TOKENS).astype(np.int32),
        loss_mask=np.arange(TOKENS) >= TOKENS // 2,
        sampler_logprobs=np.zeros(TOKENS, dtype=np.float32),
        version_spans=(),
        finish_reason="stop",
        routing=no_routing(TOKENS),
    )


# ---- time ------------------------------------------------------------------------------------------------------------


def _time(config: Config, names: list[str]) -> list[Figure]:
    """Runs with all teachers in memory and with one of five, in turn."""
    totals: dict[str, list[float]] = {"resident": [], "mixed": []}
    scoring: dict[str, list[float]] = {"resident": [], "mixed": []}
    waiting: list[float] = []
    losses: dict[str, list[float]] = {}
    config.run.overwrite = True
    for _ in range(ROUNDS):
        for kind in totals:
            for index, name in enumerate(names):
                stays = kind == "resident" or index % RESIDENT_EVERY == 0
                config.teachers[name].residency = "host" if stays else "disk"
            with pipeline.open_run(config), open_runtime(config.runtime) as runtime:
                pipeline.run_distill(config, runtime)
            steps = read_metrics(os.path.join(config.run.dir, "student", "metrics.jsonl"))
            losses[kind] = [step["train/loss"] for step in steps]
            for step in steps[WARM_UP:]:
                totals[kind].append(step["phase/total_seconds"] - step.get("phase/checkpoint_seconds", 0.0))
                scoring[kind].append(step["phase/score_seconds"])
                if kind == "mixed":
                    waiting.append(sum(step.get(f"teacher/{name}/wait_seconds", 0.0) for name in names))
    ratio = median(totals["mixed"]) / median(totals["resident"])
    differing = sum(one != other for one, other in zip(losses["resident"], losses["mixed"], strict=True))
    return [
        Figure(name="step, all in memory", value=median(totals["resident"]), unit="s"),
        Figure(name="step, 1 of 5 in memory", value=median(totals["mixed"]), unit="s"),
        Figure(name="... over all in memory", value=ratio, unit="x", bar="<= 1.15", ok=ratio <= 1.15),
        Figure(name="scoring, all in memory", value=median(scoring["resident"]), unit="s"),
        Figure(name="scoring, 1 of 5 in memory", value=median(scoring["mixed"]), unit="s"),
        Figure(name="of it waiting for weights", value=median(waiting), unit="s"),
        Figure(name="losses that differ", value=differing, unit="count", bar="0", ok=differing == 0),
    ]
