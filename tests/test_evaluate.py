"""Evaluation and the workers it hires: a run leaves logs that can be read, and dead workers are replaced from them."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

import opd.evaluate
from opd.__main__ import compose
from opd.actors import Runtime, open_runtime
from opd.chat import Chat, train_tokenizer
from opd.config import Config, DomainConfig, SamplingConfig
from opd.data import Domain, load_domains
from opd.evaluate import hire_fleet, recovery
from opd.model import new_v4, with_path
from opd.train import train
from opd.types import Group, Prompt, Trajectory
from opd.weights import save_checkpoint
from rollout.fleet import Fleet
from rollout.wal import read_log
from rollout.worker import RolloutWorker

LETTERS = "abcdefgh"
SETTINGS = (
    "~experiment", "run.name=tiny", "learner=adamw", "tracking.wandb=disabled", "data=[chain_sum]",
    "model.max_tokens=64", "model.config.hidden_size=32", "model.config.moe_intermediate_size=32",
    "model.config.num_hidden_layers=2", "model.config.layer_types=[sliding_attention,compressed_sparse_attention]",
    "model.config.mlp_layer_types=[moe,moe]", "model.config.n_routed_experts=2", "model.config.num_attention_heads=2",
    "model.config.head_dim=16", "model.config.q_lora_rank=16", "model.config.o_lora_rank=16",
    "model.config.index_n_heads=2", "model.config.index_head_dim=32", "rollout.num_workers=2", "rollout.num_slots=8",
    "rollout.sampling.max_new_tokens=40", "stages.grpo.steps=3", "stages.grpo.prompts_per_step=4",
    "stages.grpo.group_size=4", "stages.grpo.eval_every=3", "stages.grpo.warmup_steps=1", "eval.inline_prompts=4",
)  # fmt: skip
Drawn = Mapping[str, tuple[list[int], str | None]]


@dataclasses.dataclass(frozen=True)
class World:
    """One domain of a few questions, an untrained policy and its tokenizer."""

    config: Config
    chat: Chat
    domains: dict[str, Domain]
    start: str  # the policy's checkpoint

    def settings(self, root: Path, **rollout: Any) -> Config:
        run = dataclasses.replace(self.config.run, root=str(root))
        return dataclasses.replace(self.config, run=run, rollout=dataclasses.replace(self.config.rollout, **rollout))

    def hire(self, config: Config, runtime: Runtime) -> Fleet:
        fleet = hire_fleet(config, with_path(config.model, self.start), self.chat, runtime, "cpu")
        fleet.load_checkpoint(self.start)
        return fleet

    def prompts(self, count: int) -> list[Prompt]:
        return list(self.domains["copy"].eval[:count])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    questions = [(f"copy {letter}{n}", letter) for letter in LETTERS for n in range(10)]
    (folder / "copy.jsonl").write_text("".join(json.dumps({"prompt": q, "answer": a}) + "\n" for q, a in questions))
    config = compose("specialist", list(SETTINGS))[0]
    rows = DomainConfig(source="rows", path=str(folder / "copy.jsonl"), eval_fraction=0.25, num_eval=8)
    config.data.domains = {"copy": rows}
    chat = Chat(train_tokenizer([question for question, _ in questions], 300))
    start = str(folder / "start")
    save_checkpoint(start, new_v4(config.model, chat.vocab_size, 0), chat)
    return World(config=config, chat=chat, domains=load_domains(config, chat), start=start)


def logged(folder: Path) -> Drawn:
    """What the logs of a folder hold: the tokens drawn for a trajectory, by its id, and why they ended."""
    found: dict[str, tuple[list[int], str | None]] = {}
    for path in sorted(folder.glob("*.wal")):
        log = read_log(path)
        assert log is not None and log.torn_bytes == 0
        for request, samples, reason in zip(log.requests, log.sampled, log.reasons, strict=True):
            assert request.trajectory_id not in found
            found[request.trajectory_id] = samples.token_ids.tolist(), reason
    return found


def drawn(groups: Sequence[Group]) -> Drawn:
    return {t.id: (t.token_ids[t.loss_mask].tolist(), t.finish_reason) for t in flat(groups)}


def flat(groups: Sequence[Group]) -> list[Trajectory]:
    return [trajectory for group in groups for trajectory in group.trajectories]


def test_a_finished_run_left_its_last_batch_in_its_logs(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every batch the logs hold that batch and nothing more, so that they do not grow with the run."""
    wal, batches = tmp_path / "tiny" / "wal", []
    generate = Fleet.generate

    def seen(fleet: Fleet, *args: Any, **settings: Any) -> list[Group]:
        groups = generate(fleet, *args, **settings)
        assert logged(wal) == drawn(groups)
        batches.append(groups)
        return groups

    monkeypatch.setattr(Fleet, "generate", seen)
    config = world.settings(tmp_path)
    with open_runtime(dataclasses.replace(config.runtime, kind="local")) as runtime:
        for stage in ("first", "second"):  # in folders of their own, with one place for logs
            folder = str(tmp_path / "tiny" / stage)
            train(
                config,
                "grpo",
                start=world.start,
                run_dir=folder,
                domains=world.domains,
                chat=world.chat,
                runtime=runtime,
            )
    assert len(batches) == 2 * 4  # three steps and an evaluation
    assert logged(wal) == drawn(batches[-1]) and len(logged(wal)) == 4
    last = [f"rollout_worker_{index}.wal{end}" for index in range(2) for end in ("", ".3")]  # its own, the first's
    assert sorted(os.listdir(wal)) == last


@pytest.mark.parametrize(("policy", "flushes"), [("none", False), ("process", False), ("machine", True)])
def test_the_fleet_logs_as_the_run_says(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, flushes: bool
) -> None:
    synced = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    config = world.settings(tmp_path, wal=policy)
    with open_runtime(dataclasses.replace(config.runtime, kind="local")) as runtime:
        fleet = world.hire(config, runtime)
        sampling = SamplingConfig(max_new_tokens=5)
        groups = fleet.generate(world.prompts(2), 2, sampling, version=0, tag="t")
    assert (tmp_path / "tiny" / "wal").exists() == (policy != "none")
    assert logged(tmp_path / "tiny" / "wal") == ({} if policy == "none" else drawn(groups))
    assert len(synced) >= 5 if flushes else not synced


class Visible(RolloutWorker):
    def process(self) -> int:
        return os.getpid()


@pytest.mark.ray
def test_a_killed_worker_of_a_hired_fleet_is_replaced(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: Runtime
) -> None:
    monkeypatch.setattr(opd.evaluate, "RolloutWorker", Visible)
    fleet = world.hire(world.settings(tmp_path), ray_cluster)
    try:
        pids = [cast(int, worker.submit("process").result(600.0)) for worker in fleet.workers]
        sampling = SamplingConfig(max_new_tokens=40)
        prompts = world.prompts(6)
        expected = fleet.generate(prompts, 16, sampling, version=0, tag="t")
        path = tmp_path / "tiny" / "wal" / "rollout_worker_1.wal"
        whole = read_log(path)
        assert whole is not None

        def kill() -> None:
            while (log := read_log(path)) is None or log.batch == 1 or log.num_tokens < 0.5 * whole.num_tokens:
                time.sleep(0.002)
            os.kill(pids[1], signal.SIGKILL)

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        produced = fleet.generate(prompts, 16, sampling, version=0, tag="t")
        killer.join(60.0)
        after = [cast(int, worker.submit("process").result(600.0)) for worker in fleet.workers]
    finally:
        ray_cluster.dismiss(fleet.workers)
    assert fleet.num_deaths == 1 and fleet.resumed_tokens > 0
    assert after[0] == pids[0] and after[1] != pids[1]
    assert drawn(produced) == drawn(expected) == logged(path.parent)


def test_recovery_is_undefined_without_a_margin() -> None:
    assert recovery(0.2, 0.6, 0.5) == pytest.approx(0.75)
    assert recovery(0.2, 0.6, 0.1) == pytest.approx(-0.25)
    assert recovery(0.5, 0.54, 0.9) is None
