"""Rollout workers killed at random moments: the same text, every token once, and lengths by their law.

Two Ray workers sample batch after batch from the quickstart's student with random weights, while now one of them and
now the other is ended by signal 9, whatever it is doing. Then the same fleet makes the same batches in peace. Settings:
kills (50), and planted (50): the kills of a fleet that samples unfinished work anew from fresh noise, which its lengths
must betray; 0 leaves that part out.

The law of lengths is known: rows of the output head come in families of FAMILY equal ones, and one member of each ends
the sample. So a token does that with probability 1 / FAMILY whatever was read, while the text depends on all of it.
Lengths are held against that law by the Kolmogorov-Smirnov statistic, at one in a thousand.
"""

from __future__ import annotations

import math
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch

from opd.__main__ import compose
from opd.actors import Runtime, open_runtime
from opd.config import ConfigError, ModelConfig, RolloutConfig, RuntimeConfig, SamplingConfig
from opd.model import new_v4
from opd.types import Actor, Future, Prompt, Trajectory
from opd.weights import save_checkpoint
from rollout.fleet import Fleet
from rollout.request import Request
from rollout.wal import Log, LogKey, read_batch, read_log
from rollout.worker import RolloutWorker
from scripts.benchmarks import Figure, report, split_arguments, whole_numbers

DEFAULTS = {"kills": 50, "planted": 50}
WORKERS, SLOTS, SEED = 2, 64, 0
PROMPTS, GROUP, PROMPT_TOKENS = 48, 8, 32
FAMILY, LONGEST, MAX_TOKENS = 32, 128, 256
SPREAD = 0.7  # a kill comes at most this share of an unbroken batch's time after the worker was replaced
CRITICAL = 1.95  # of the statistic times the root of the number of samples
SAMPLING = SamplingConfig(temperature=1.0, max_new_tokens=LONGEST)


class VisibleWorker(RolloutWorker):
    def process(self) -> int:
        return os.getpid()


class ForgetfulWorker(VisibleWorker):
    """The planted mistake: it keeps what had ended when its predecessor died, and begins the rest with fresh noise."""

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        version: int,
        log: LogKey | None = None,
        *,
        resume: bool = False,
    ) -> list[Trajectory]:
        assert log is not None
        found = read_batch(log) if resume else None
        if found is not None:
            ended = {
                request.trajectory_id: samples
                for request, samples, reason in zip(found.requests, found.sampled, found.reasons, strict=True)
                if reason is not None
            }
            requests = [
                replace(request, sampled=ended[request.trajectory_id]) if request.trajectory_id in ended else request
                for request in requests
            ]
            self.engine.seed = int.from_bytes(os.urandom(4), "little")
        with Log(
            log, requests, sampling, policy_version=version, seed=self.engine.seed, durability="process"
        ) as writer:
            return self.engine.generate(requests, sampling, version, writer)

    def logged_tokens(self, log: LogKey | None) -> int:
        """More each time: it does lose tokens, and the fleet would give up on it for that."""
        return time.monotonic_ns()


class Siege:
    """A fleet and somebody who kills its workers."""

    def __init__(self, runtime: Runtime, worker: type[VisibleWorker], model: ModelConfig, folder: str) -> None:
        self.runtime, self.worker, self.model = runtime, worker, model
        self.log_dir = os.path.join(folder, worker.__name__)
        self.processes: dict[int, Future] = {}
        workers = [self.hire(index) for index in range(WORKERS)]
        self.fleet = Fleet(workers, 1800.0, respawn=self.hire, log_dir=self.log_dir)
        self.fleet.load_checkpoint(cast(str, model.path))
        rng = random.Random(SEED)
        self.prompts = [
            Prompt(
                id=f"p/train/{index}",
                domain="p",
                effort="none",
                token_ids=tuple(rng.choices(range(FAMILY), k=PROMPT_TOKENS)),
                reference={},
            )
            for index in range(PROMPTS)
        ]

    def hire(self, index: int) -> Actor:
        actor = self.runtime.spawn(
            self.worker,
            self.model,
            RolloutConfig(num_slots=SLOTS),
            self.runtime.store,
            stop_ids=range(0, 10**6, FAMILY),
            seed=SEED,
            device="cpu",
            name=f"{self.worker.__name__} {index}",
        )
        self.processes[index] = actor.submit("process")
        return actor

    def batch(self, number: int) -> list[Trajectory]:
        groups = self.fleet.generate(self.prompts, GROUP, SAMPLING, version=0, tag=f"t/{number}")
        return [trajectory for group in groups for trajectory in group.trajectories]

    def batches(self, kills: int) -> tuple[list[list[Trajectory]], int]:
        """The batches made until so many workers have been killed, and the entries of logs that are not what a batch
        is made of: tokens lost, repeated or of somebody else."""
        self.batch(-1)  # warms up
        started = time.perf_counter()
        self.batch(-2)
        seconds = time.perf_counter() - started
        killer = threading.Thread(target=self._kill, args=(kills, SPREAD * seconds), daemon=True)
        killer.start()
        made, wrong = [], 0
        while killer.is_alive() or self.fleet.num_deaths < kills:
            made.append(self.batch(len(made)))
            wrong += self._wrong_entries(made[-1])
        return made, wrong

    def _kill(self, kills: int, longest_wait: float) -> None:
        rng = random.Random(SEED)
        for _ in range(kills):
            index = rng.randrange(WORKERS)
            process = cast(int, self.processes[index].result())
            time.sleep(rng.uniform(0.0, longest_wait))
            os.kill(process, signal.SIGKILL)
            while self.processes[index].result() == process:
                time.sleep(0.05)

    def _wrong_entries(self, batch: Sequence[Trajectory]) -> int:
        """Requests whose log is not just their trajectory's tokens and end, and trajectories without a log."""
        expected = {t.id: (t.token_ids[t.loss_mask].tolist(), t.finish_reason) for t in batch}
        wrong = 0
        for path in Path(self.log_dir).glob("*.wal"):
            log = read_log(path)
            assert log is not None
            for request, samples, reason in zip(log.requests, log.sampled, log.reasons, strict=True):
                wrong += expected.pop(request.trajectory_id, None) != (samples.token_ids.tolist(), reason)
        return wrong + len(expected)


def main(argv: list[str]) -> int:
    """The exit status of `report`. Raises ConfigError for settings that are refused."""
    as_json, overrides = split_arguments(argv)
    settings = whole_numbers(overrides, DEFAULTS, 0)
    if settings["kills"] < 1:
        raise ConfigError(f"kills={settings['kills']} is too small; it must be at least 1")
    config = compose("quickstart", [f"model.max_tokens={MAX_TOKENS}"])[0]
    student = new_v4(config.model, config.tokenizer.vocab_size, SEED)
    with torch.no_grad():
        student.head.copy_(student.head[torch.arange(len(student.head)) // FAMILY * FAMILY])
    with tempfile.TemporaryDirectory(prefix="opd_kills_") as folder, open_runtime(RuntimeConfig()) as runtime:
        path = os.path.join(folder, "student")
        save_checkpoint(path, student, None)
        model = replace(config.model, path=path)
        siege = Siege(runtime, VisibleWorker, model, folder)
        figures = with_log(siege, settings["kills"])
        runtime.dismiss(siege.fleet.workers)
        if settings["planted"]:
            siege = Siege(runtime, ForgetfulWorker, model, folder)
            figures += planted(siege, settings["planted"])
            runtime.dismiss(siege.fleet.workers)
    return report(f"{WORKERS} rollout workers of the quickstart's student that are killed", figures, as_json)


def with_log(siege: Siege, kills: int) -> list[Figure]:
    made, wrong = siege.batches(kills)
    resumed = siege.fleet.resumed_tokens
    pairs = [pair for number, batch in enumerate(made) for pair in zip(batch, siege.batch(number), strict=True)]
    differ = sum(is_different(broken, whole) for broken, whole in pairs)
    rounded = sum(num_rounded(broken, whole) for broken, whole in pairs)
    statistic, samples = scaled_distance(made)
    tokens = sum(trajectory.num_loss_tokens for batch in made for trajectory in batch)
    deaths = siege.fleet.num_deaths
    return [
        Figure(name="kills", value=deaths, unit="count", bar=f">= {kills}", ok=deaths >= kills),
        Figure(name="batches under kills", value=len(made), unit="count"),
        Figure(name="samples", value=samples, unit="count"),
        Figure(name="tokens", value=tokens, unit="tokens"),
        Figure(name="tokens taken up from logs", value=resumed, unit="tokens"),
        Figure(name="tokens lost or repeated in logs", value=wrong, unit="requests", bar="0", ok=wrong == 0),
        Figure(name="text that differs", value=differ, unit="samples", bar="0", ok=differ == 0),
        Figure(name="log-probs that differ, by rounding", value=100 * rounded / tokens, unit="% of tokens"),
        Figure(
            name="lengths against their law, with the log",
            value=statistic,
            unit="D sqrt(n)",
            bar=f"< {CRITICAL}",
            ok=statistic < CRITICAL,
        ),
    ]


def planted(siege: Siege, kills: int) -> list[Figure]:
    made, _ = siege.batches(kills)
    statistic, samples = scaled_distance(made)
    return [
        Figure(name="planted: kills", value=siege.fleet.num_deaths, unit="count"),
        Figure(name="planted: samples", value=samples, unit="count"),
        Figure(
            name="planted: lengths against their law",
            value=statistic,
            unit="D sqrt(n)",
            bar=f"> {CRITICAL}",
            ok=statistic > CRITICAL,
        ),
    ]


def is_different(broken: Trajectory, whole: Trajectory) -> bool:
    assert broken.id == whole.id
    same_end = broken.finish_reason == whole.finish_reason
    return not (same_end and np.array_equal(broken.token_ids, whole.token_ids))


def num_rounded(broken: Trajectory, whole: Trajectory) -> int:
    """Log-probs that are not the same bits, as far as the text is the same."""
    length = min(len(broken.token_ids), len(whole.token_ids))
    same = np.logical_and.accumulate(broken.token_ids[:length] == whole.token_ids[:length])
    return int((same & (broken.sampler_logprobs[:length] != whole.sampler_logprobs[:length])).sum())


def scaled_distance(batches: Sequence[Sequence[Trajectory]]) -> tuple[float, int]:
    """The Kolmogorov-Smirnov statistic of lengths against the geometric law, times the root of their number; and that
    number. All lengths from LONGEST on are one value, at which samples are cut."""
    lengths = np.array([trajectory.num_loss_tokens for batch in batches for trajectory in batch])
    shorter = np.arange(1, LONGEST)
    law = 1 - (1 - 1 / FAMILY) ** shorter
    found = (lengths[:, None] <= shorter).mean(0)
    return math.sqrt(len(lengths)) * float(np.abs(found - law).max()), len(lengths)
