"""Rollouts that run one step ahead beside rollouts that wait: what students end with, over several seeds.

Two domains of questions that a tiny model learns within a minute: a letter to be repeated, and the one that follows it.
A base and a specialist of each are made once. From there, for every seed, one student is distilled with
`stages.distill.max_staleness=0`, whose rollouts wait for the newest weights, and one with 1, whose rollouts are begun
while the step before trains. Compared are the accuracy on held-out questions at the end, and the exact reverse KL per
token over the last steps. Settings: seeds (6, at least 2) and steps (80) of distillation.
"""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from opd import pipeline
from opd.__main__ import compose
from opd.actors import Runtime, open_runtime
from opd.metrics import read_metrics
from scripts.benchmarks import Figure, report, split_arguments, whole_numbers

DEFAULTS = {"seeds": 6, "steps": 80}
DOMAINS = ("copy", "next")
LETTERS = "abcdefgh"
LAST = 10  # steps over which the KL is averaged
LOST, GAINED = 0.02, 0.005  # share of the questions, and of the KL at the start: what would be worth naming
SETTINGS = (
    *("~experiment", "learner=adamw", "tracking.wandb=disabled", "pool.examine=off", "model.max_tokens=32"),
    *(f"data=[{','.join(DOMAINS)}]", f"teachers=[{','.join(DOMAINS)}]", "tokenizer.vocab_size=320"),
    *("model.config.hidden_size=64", "model.config.moe_intermediate_size=32", "model.config.num_hidden_layers=2"),
    "model.config.layer_types=[sliding_attention,compressed_sparse_attention]",
    *("model.config.mlp_layer_types=[moe,moe]", "model.config.n_routed_experts=4"),
    "rollout.sampling.max_new_tokens=4",
    *("stages.base.steps=12", "stages.sft.steps=40", "stages.grpo.steps=0", "stages.sft.eval_every=40"),
    *("stages.base.prompts_per_step=32", "stages.sft.prompts_per_step=32", "stages.distill.prompts_per_step=64"),
    *("stages.base.learning_rate=1e-2", "stages.sft.learning_rate=1e-2", "stages.distill.learning_rate=5e-3"),
    *("stages.sft.decay_fraction=0.5", "stages.distill.decay_fraction=0.5", "stages.distill.kl_temperature=2"),
    *(f"stages.{stage}.checkpoint_every=0" for stage in ("base", "sft", "distill")),
)


@dataclass(slots=True, kw_only=True, frozen=True)
class Student:
    accuracy: float  # share of held-out questions, mean over the domains
    kl: float  # nats per token, at the end
    first_kl: float  # and in the first step
    seconds: float  # of all steps
    staleness: float  # versions between the weights that sampled a token and those that learned from it


def main(argv: list[str]) -> int:
    """The exit status of `report`. Raises ConfigError for settings that are refused."""
    as_json, overrides = split_arguments(argv)
    settings = whole_numbers(overrides, DEFAULTS, 2)
    students: dict[int, list[Student]] = {0: [], 1: []}
    with tempfile.TemporaryDirectory(prefix="opd_staleness_") as folder:
        made = Path(folder) / "made"
        write_domains(Path(folder))
        base = compose("quickstart", [*SETTINGS, f"run.root={folder}", "run.name=made"], f"{folder}/conf")[0]
        with open_runtime(base.runtime) as runtime:
            with pipeline.open_run(base):
                pipeline.run_base(base, runtime)
                for domain in DOMAINS:
                    pipeline.run_specialist(base, runtime, domain)
            for seed in range(settings["seeds"]):
                for staleness, found in students.items():
                    found.append(distilled(made, runtime, seed, staleness, settings["steps"]))
    return report(f"distillation with and without waiting, {settings['steps']} steps", figures(students), as_json)


def write_domains(folder: Path) -> None:
    for group in ("data", "teachers"):
        (folder / "conf" / group).mkdir(parents=True)
    for shift, name in enumerate(DOMAINS):
        rows = [
            {"prompt": f"{name} {letter}{number}", "answer": LETTERS[(index + shift) % len(LETTERS)]}
            for index, letter in enumerate(LETTERS)
            for number in range(40)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "conf" / "data" / f"{name}.yaml").write_text(
            f"# @package data.domains.{name}\nsource: rows\npath: {folder}/{name}.jsonl\neval_fraction: 0.25\n"
            "num_eval: 70\n"
        )
        (folder / "conf" / "teachers" / f"{name}.yaml").write_text(
            f"# @package teachers.{name}\npath: {folder}/made/specialists/{name}/hf\n"
        )


def distilled(made: Path, runtime: Runtime, seed: int, staleness: int, steps: int) -> Student:
    overrides = [
        *(f"run.root={made.parent}", f"run.name=student_{seed}_{staleness}", f"seed={seed}"),
        *(f"model.path={made}/base/hf", f"stages.distill.steps={steps}", f"stages.distill.eval_every={steps}"),
        f"stages.distill.max_staleness={staleness}",
    ]
    config: Any = compose("distill", [*SETTINGS, *overrides], f"{made.parent}/conf")[0]
    with pipeline.open_run(config):
        pipeline.run_distill(config, runtime)
    lines = read_metrics(f"{config.run.dir}/student/metrics.jsonl")
    return Student(
        accuracy=mean(lines[-1][f"eval/pass_at_1/{domain}"] for domain in DOMAINS),
        first_kl=lines[0]["distill/reverse_kl"],
        kl=mean(line["distill/reverse_kl"] for line in lines[-LAST:]),
        seconds=sum(line["phase/total_seconds"] for line in lines),
        staleness=mean(line["rollout/staleness"] for line in lines),
    )


def figures(students: dict[int, list[Student]]) -> list[Figure]:
    waiting, ahead = students[0], students[1]
    lost = [one.accuracy - other.accuracy for one, other in zip(waiting, ahead, strict=True)]
    first = mean(student.first_kl for student in waiting)
    gained = [(other.kl - one.kl) / first for one, other in zip(waiting, ahead, strict=True)]
    return [
        Figure(name="students of each kind", value=len(waiting), unit="count"),
        Figure(name="staleness", value=mean(student.staleness for student in ahead), unit="versions"),
        Figure(name="accuracy, waiting", value=mean(student.accuracy for student in waiting), unit="share"),
        Figure(name="accuracy, one ahead", value=mean(student.accuracy for student in ahead), unit="share"),
        Figure(name="accuracy lost", value=mean(lost), unit="share", bar=f"<= {LOST}", ok=mean(lost) <= LOST),
        Figure(name="its standard error", value=_error(lost), unit="share"),
        Figure(name="reverse KL at the start", value=first, unit="nats/token"),
        Figure(name="reverse KL, waiting", value=mean(student.kl for student in waiting), unit="nats/token"),
        Figure(name="reverse KL, one ahead", value=mean(student.kl for student in ahead), unit="nats/token"),
        Figure(
            name="reverse KL gained", value=mean(gained), unit="of it", bar=f"<= {GAINED}", ok=mean(gained) <= GAINED
        ),
        Figure(name="standard error of that", value=_error(gained), unit="of it"),
        Figure(
            name="time, one ahead",
            value=sum(student.seconds for student in ahead) / sum(student.seconds for student in waiting),
            unit="of waiting",
        ),
    ]


def _error(differences: list[float]) -> float:
    return stdev(differences) / math.sqrt(len(differences))
