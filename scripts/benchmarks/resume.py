"""Kills at random moments, and whether a run that goes on ends with the weights of the unbroken one, bit for bit.

A whole quickstart of a tiny model on Ray, two learner ranks, once unbroken. Then again, while a driver, a learner rank,
a rollout worker or a teacher host is ended by signal 9 at random moments: actors are replaced by the run itself, after
the driver's death the command is given again with resume=auto. When a run gets through, its weights and losses are
compared and the next one begins, until there were enough kills. Settings: kills (20) and seed (0).
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import psutil

from opd.__main__ import main as opd
from opd.actors import ActorDied, RayRuntime, _RayFuture
from opd.metrics import read_metrics
from opd.weights import checkpoint_hash
from scripts.benchmarks import Figure, report, split_arguments, whole_numbers

DEFAULTS = {"kills": 20, "seed": 0}
DOMAINS = ("basic_arithmetic", "leg_counting")
PARTS = ("base", *(f"specialists/{name}/{stage}" for name in DOMAINS for stage in ("sft", "grpo")), "student")
VICTIMS = {"driver": "", "learner": "learner rank", "worker": "rollout worker", "teacher": "teacher host"}
MARK = "OPD_BENCH_RESUME"  # in the environment of a run's processes
LEFT_SECONDS = 60.0  # for the processes of a driver that was killed to end
SETTINGS = (
    f"data=[{','.join(DOMAINS)}]",
    f"teachers=[{','.join(DOMAINS)}]",
    *(
        "~experiment",
        "learner=adamw",
        "tracking.wandb=disabled",
        "tokenizer.vocab_size=320",
        "tokenizer.samples_per_domain=200",
        "eval.samples=0",
    ),
    *("model.config.hidden_size=64", "model.config.moe_intermediate_size=32", "model.config.num_hidden_layers=2"),
    "model.config.layer_types=[sliding_attention,compressed_sparse_attention]",
    *("model.config.mlp_layer_types=[moe,moe]", "model.config.n_routed_experts=4", "model.max_tokens=96"),
    *("learner.num_ranks=2", "rollout.num_workers=1", "runtime.num_teacher_hosts=1", "runtime.max_restarts=1000"),
    *("rollout.sampling.max_new_tokens=6", "pool.examine=off", "runtime.timeout_seconds=300"),
    *("stages.base.steps=15", "stages.sft.steps=15", "stages.grpo.steps=8", "stages.distill.steps=20"),
    *(f"stages.{stage}.prompts_per_step=8" for stage in ("base", "sft", "grpo", "distill")),
    *(f"stages.{stage}.checkpoint_every=3" for stage in ("base", "sft", "grpo", "distill")),
    *("stages.sft.eval_every=5", "stages.grpo.eval_every=4", "stages.distill.eval_every=5", "eval.inline_prompts=8"),
    *(f"data.domains.{name}.num_eval=16" for name in DOMAINS),
)


def main(argv: list[str]) -> int:
    """The exit status of `report`. Raises ConfigError for settings that are refused."""
    as_json, overrides = split_arguments(argv)
    settings = whole_numbers(overrides, DEFAULTS, 0)
    with tempfile.TemporaryDirectory(prefix="opd_resume_") as folder:
        figures = measure(Path(folder), settings["kills"], random.Random(settings["seed"]))
    return report(f"a tiny quickstart under {settings['kills']} kills", figures, as_json)


def measure(root: Path, kills: int, rng: random.Random) -> list[Figure]:
    started = time.monotonic()
    status, _ = launch(root, "unbroken")
    unbroken = time.monotonic() - started
    if status != 0:
        raise RuntimeError(
            f"the unbroken run ended with status {status}: {(root / 'unbroken.log').read_text()[-3000:]}"
        )
    expected = outcome(root / "unbroken")
    runs = launches = left_over = weights_differ = losses_differ = 0
    started = time.monotonic()
    while runs == 0 or len(delivered(root)) < kills:
        name = f"run{runs}"
        for attempt in range(10 * kills):
            left = kills - len(delivered(root))
            plan = {"kills": left, "seed": rng.randrange(2**32), "within": unbroken / 2, "log": str(root / "kills")}
            status, survivors = launch(
                root, name, *(["resume=auto"] if attempt else []), plan=plan if left > 0 else None
            )
            launches, left_over = launches + 1, left_over + survivors
            if status == 0:
                break
            if status != -signal.SIGKILL:
                raise RuntimeError(f"{name} ended with status {status}: {(root / f'{name}.log').read_text()[-3000:]}")
        runs += 1
        found = outcome(root / name)
        weights_differ += sum(found[part]["weights"] != expected[part]["weights"] for part in PARTS)
        losses_differ += sum(found[part]["losses"] != expected[part]["losses"] for part in PARTS)
    victims = delivered(root)
    return [
        Figure(name="kills", value=len(victims), unit="count", bar=f">= {kills}", ok=len(victims) >= kills),
        *(Figure(name=f"kills of a {kind}", value=victims.count(kind), unit="count") for kind in VICTIMS),
        Figure(name="runs that got through", value=runs, unit="count"),
        Figure(name="commands given", value=launches, unit="count"),
        Figure(name="stages compared", value=runs * len(PARTS), unit="count"),
        Figure(name="stages whose weights differ", value=weights_differ, unit="count", bar="0", ok=weights_differ == 0),
        Figure(name="stages whose losses differ", value=losses_differ, unit="count", bar="0", ok=losses_differ == 0),
        Figure(name="processes left over", value=left_over, unit="count", bar="0", ok=left_over == 0),
        Figure(name="unbroken run", value=unbroken, unit="s"),
        Figure(name="runs under kills", value=time.monotonic() - started, unit="s"),
    ]


def launch(root: Path, name: str, *overrides: str, plan: dict[str, Any] | None = None) -> tuple[int, int]:
    """Runs the command to its end: its exit status, and how many of its processes were still there a minute later."""
    arguments = ["quickstart", f"run.root={root}", f"run.name={name}", *SETTINGS, *overrides]
    mark = uuid.uuid4().hex
    with open(root / f"{name}.log", "a", encoding="utf-8") as log:
        process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-c",
                "from scripts.benchmarks.resume import child; child()",
                json.dumps(plan),
                *arguments,
            ],
            stdout=log,
            stderr=log,
            env={**os.environ, MARK: mark},
            start_new_session=True,
        )
        status = process.wait()
    ends = time.monotonic() + LEFT_SECONDS
    while (left := of_run(mark)) and time.monotonic() < ends:
        time.sleep(0.5)
    for survivor in left:
        survivor.kill()
    return status, len(left)


def of_run(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:  # ended meanwhile, or another user's
            continue
    return found


def outcome(run: Path) -> dict[str, dict[str, Any]]:
    """Weights and losses of every stage."""
    return {
        part: {
            "weights": checkpoint_hash(run / part / "hf"),
            "losses": [
                (line["step"], line.get("train/loss"), line.get("train/grad_norm"), line.get("rollout/tokens"))
                for line in read_metrics(str(run / part / "metrics.jsonl"))
            ],
        }
        for part in PARTS
    }


def delivered(root: Path) -> list[str]:
    """The kinds of victims so far."""
    path = root / "kills"
    return path.read_text().split() if path.exists() else []


def child() -> None:
    """`opd` with a killer at its side, in a process of its own: arguments are the plan, as JSON, and the command's."""
    plan, *arguments = sys.argv[1:]
    sys.argv = ["opd", *arguments]
    if (plan := json.loads(plan)) is not None:
        actors: dict[str, Any] = {}
        spawn = RayRuntime.spawn

        def spawning(runtime: RayRuntime, cls: type, *args: Any, name: str, **kwargs: Any) -> Any:
            actor: Any = spawn(runtime, cls, *args, name=name, **kwargs)
            pid = actor.handle.__ray_call__.remote(lambda _: os.getpid())
            actors[name] = _RayFuture(pid, pid, name, "getpid")
            return actor

        RayRuntime.spawn = spawning  # type: ignore[method-assign]
        threading.Thread(target=kill, args=(plan, actors), daemon=True).start()
    opd()


def kill(plan: dict[str, Any], actors: dict[str, Any]) -> None:
    rng = random.Random(plan["seed"])
    for _ in range(plan["kills"]):
        time.sleep(rng.uniform(0.0, plan["within"]))
        kind = rng.choice(list(VICTIMS))
        process = os.getpid() if kind == "driver" else find(VICTIMS[kind], actors, rng)
        with open(plan["log"], "a", encoding="ascii") as log:
            log.write(kind + "\n")
        os.kill(process, signal.SIGKILL)


def find(prefix: str, actors: dict[str, Any], rng: random.Random) -> int:
    """A living process of that kind, once there is one."""
    while True:
        names = [name for name in list(actors) if name.startswith(prefix)]
        if names:
            try:
                process: int = actors[rng.choice(names)].result(1.0)
                if psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE:
                    return process
            except (TimeoutError, ActorDied, psutil.Error):
                pass
        time.sleep(0.1)
