"""One distillation step of the quickstart, phase by phase: seconds, and sampled tokens per second.

A short base in a temporary folder, copies of it as the teachers (what they know costs nothing, so what they cost is
right), and a few steps of `opd distill`. Medians are over the steps after the first two, in which libraries still warm
up. The one bar is on the measurement itself: what lies between the phases must be small.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from statistics import median

from safetensors import safe_open

from opd import pipeline
from opd.__main__ import compose
from opd.actors import open_runtime
from opd.config import Config, ConfigError
from opd.metrics import read_metrics
from scripts.benchmarks import Figure, report, split_arguments

PHASES = ("rollout", "score", "train", "publish")
WARM_UP = 2
STEPS = 10
# The base learns to end its answers, or else every rollout would run to the limit; overrides come after these.
SETTINGS = (
    "tracking.wandb=disabled",
    "stages.base.steps=40",
    f"stages.distill.steps={WARM_UP + STEPS}",
    "stages.distill.eval_every=0",
)


def main(argv: list[str]) -> int:
    """The exit status of `report`, or 2 for overrides that are refused."""
    as_json, overrides = split_arguments(argv)
    with tempfile.TemporaryDirectory(prefix="opd_step_") as folder:
        try:
            config = compose("quickstart", [*SETTINGS, *overrides, f"run.root={folder}"])[0]
            if config.stages.distill.steps <= WARM_UP:
                raise ConfigError(f"stages.distill.steps={config.stages.distill.steps} must be above {WARM_UP}")
            figures = measure(config)
        except ConfigError as error:
            print(f"step: {error}", file=sys.stderr)
            return 2
    stage = config.stages.distill
    title = (
        f"one distillation step: {stage.prompts_per_step} prompts x {stage.group_size}, "
        f"{config.rollout.num_workers} worker(s), {len(config.teachers)} teacher(s), "
        f"{config.learner.num_ranks} rank(s), runtime={config.runtime.kind}"
    )
    return report(title, figures, as_json)


def measure(config: Config) -> list[Figure]:
    """Runs base and distillation in `config.run.dir` and reads the metrics they leave."""
    with pipeline.open_run(config), open_runtime(config.runtime) as runtime:
        pipeline.run_base(config, runtime)
        for name, teacher in config.teachers.items():
            teacher.path = os.path.join(config.run.dir, "teachers", name)
            shutil.copytree(pipeline.base_path(config), teacher.path)
        pipeline.run_distill(config, runtime)
    steps = read_metrics(os.path.join(config.run.dir, "student", "metrics.jsonl"))[WARM_UP:]
    # A checkpoint is no part of a step; the last one always has one.
    totals = [step["phase/total_seconds"] - step.get("phase/checkpoint_seconds", 0.0) for step in steps]
    tokens = [step["rollout/tokens"] for step in steps]
    figures = [
        Figure(name="cores", value=len(os.sched_getaffinity(0)), unit="count"),
        Figure(name="model", value=_num_parameters(pipeline.student_path(config)), unit="parameters"),
        Figure(name="sampled tokens", value=median(tokens), unit="tokens/step"),
    ]
    seconds = {phase: [step[f"phase/{phase}_seconds"] for step in steps] for phase in PHASES}
    for phase, values in (seconds | {"total": totals}).items():
        figures.append(Figure(name=phase, value=median(values), unit="s"))
        if phase != "publish":
            rates = [num / value for num, value in zip(tokens, values, strict=True)]
            figures.append(Figure(name=f"{phase} rate", value=median(rates), unit="tokens/s"))
    share = median(sum(parts) / total for *parts, total in zip(*seconds.values(), totals, strict=True))
    bar = "0.9 to 1.0"
    figures.append(Figure(name="phases over total", value=share, unit="share", bar=bar, ok=0.9 <= share <= 1.0))
    return figures


def _num_parameters(checkpoint: str) -> int:
    with safe_open(os.path.join(checkpoint, "model.safetensors"), framework="pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 (not a dict)
