"""The loop: that a stage which stops, or whose actors die, ends as if nothing had happened; and rollouts run ahead."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import pytest

import opd.crew
import opd.train
from opd.__main__ import compose
from opd.actors import ActorDied, LocalRuntime, RayActor, Runtime, open_runtime
from opd.ahead import Act, Ahead
from opd.chat import Chat, train_tokenizer
from opd.checkpoint import RESTARTED, newest_checkpoint, read_checkpoint
from opd.config import CheckpointConfig, Config, ConfigError, DomainConfig, PoolConfig, RolloutConfig, RuntimeConfig
from opd.crew import Crew, Watched
from opd.data import Domain, PromptStream, load_domains
from opd.metrics import read_metrics
from opd.model import new_v4
from opd.observe import rollout_metrics
from opd.progress import check_start
from opd.stop import Stop, Stopped
from opd.train import train
from opd.types import Group, Prompt, Trajectory, VersionSpan, no_routing
from opd.weights import checkpoint_hash, save_checkpoint

SHAPE = {
    "hidden_size": 32, "moe_intermediate_size": 32, "num_hidden_layers": 1, "layer_types": ["sliding_attention"],
    "mlp_layer_types": ["moe"], "n_routed_experts": 2, "num_experts_per_tok": 1, "num_attention_heads": 2,
    "head_dim": 16, "q_lora_rank": 16, "o_groups": 2, "o_lora_rank": 16, "index_n_heads": 2, "index_head_dim": 32,
}  # fmt: skip
STEPS = 6


@dataclasses.dataclass(frozen=True)
class World:
    """Two domains of a few questions, an untrained policy, another one as the teacher of both."""

    config: Config
    chat: Chat
    domains: dict[str, Domain]
    start: str
    root: Path

    def config_of(self, **stage: Any) -> Config:
        stages = {
            name: dataclasses.replace(getattr(self.config.stages, name), **stage) for name in ("sft", "grpo", "distill")
        }
        return dataclasses.replace(self.config, stages=dataclasses.replace(self.config.stages, **stages))

    def train(
        self,
        run_dir: Path,
        stage: str,
        runtime: Runtime | None = None,
        config: Config | None = None,
        **options: Any,
    ) -> Path:
        config = config or self.config_of()
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, root=str(run_dir.parent)))
        with contextlib.ExitStack() as stack:
            if runtime is None:
                runtime = stack.enter_context(open_runtime(dataclasses.replace(config.runtime, kind="local")))
            train(
                config,
                stage,
                start=self.start,
                run_dir=str(run_dir),
                domains=self.domains,
                chat=self.chat,
                runtime=runtime,
                **options,
            )
        return run_dir


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    config = compose("distill", ["~experiment", "run.name=tiny", "learner=adamw", "tracking.wandb=disabled"])[0]
    config.data.domains, texts = {}, []
    for name, shift in (("copy", 0), ("next", 1)):
        questions = [
            (f"{name} {letter}{n}", "abcdefghi"[i + shift]) for i, letter in enumerate("abcdefgh") for n in range(9)
        ]
        (root / f"{name}.jsonl").write_text(
            "".join(json.dumps({"prompt": q, "answer": a}) + "\n" for q, a in questions)
        )
        path = str(root / f"{name}.jsonl")
        config.data.domains[name] = DomainConfig(source="rows", path=path, eval_fraction=0.25, num_eval=8)
        texts += [question for question, _ in questions]
    config.model.max_tokens, config.model.config = 32, {**config.model.config, **SHAPE}
    config.rollout = RolloutConfig(num_workers=1, num_slots=16)
    config.rollout.sampling.max_new_tokens = 4
    config.pool = PoolConfig(examine="off")
    config.runtime.timeout_seconds = 120.0
    chat = Chat(train_tokenizer(texts, 300))
    for seed, name in enumerate(("start", "teacher")):
        save_checkpoint(root / name, new_v4(config.model, chat.vocab_size, seed), chat)
    teacher = next(iter(config.teachers.values()))
    config.teachers = {
        "both": dataclasses.replace(teacher, path=str(root / "teacher"), domains={"copy": 1.0, "next": 2.0})
    }
    for name in ("sft", "grpo", "distill"):
        stage = getattr(config.stages, name)
        stage.steps, stage.prompts_per_step, stage.checkpoint_every, stage.eval_every = STEPS, 6, 2, 3
        stage.learning_rate, stage.warmup_steps, stage.decay_fraction = 3e-3, 2, 0.5
    config.stages.grpo.group_size = 4
    config.stages.grpo.kl_coefficient = 0.1
    return World(config=config, chat=chat, domains=load_domains(config, chat), start=str(root / "start"), root=root)


@pytest.fixture(scope="module")
def unbroken(world: World) -> Callable[[str], Path]:
    """The folder of a stage that ran through, in this process."""
    done: dict[str, Path] = {}

    def run(stage: str) -> Path:
        if stage not in done:
            done[stage] = world.train(world.root / "unbroken" / stage, stage)
        return done[stage]

    return run


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    """What was logged, without times."""
    timed = ("phase/", "perf/", "teacher/both/")
    return [
        {key: value for key, value in line.items() if key != "time" and not key.startswith(timed)}
        for line in read_metrics(str(run_dir / "metrics.jsonl"))
    ]


def state_of(run_dir: Path, step: int = STEPS) -> dict[str, bytes]:
    """Everything that resume takes up from the last checkpoint."""
    folder = run_dir / "checkpoints" / f"step_{step}"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


def same(run_dir: Path, other: Path, *, states: bool = True) -> None:
    assert numbers(run_dir) == numbers(other)
    assert checkpoint_hash(run_dir / "hf") == checkpoint_hash(other / "hf")
    assert not states or state_of(run_dir) == state_of(other), "optimizer and random states"
    assert findings(run_dir, restarts=False) == findings(other, restarts=False)
    newest, reference = newest_checkpoint(str(run_dir)), newest_checkpoint(str(other))
    assert newest is not None and reference is not None
    for key in ("stage", "domain", "step", "total_steps", "policy_version", "start", "data", "score"):
        if key != "start":
            assert newest.record[key] == reference.record[key], key


def findings(run_dir: Path, *, restarts: bool) -> list[dict[str, Any]]:
    path = run_dir / "findings.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if (line["rule"] == RESTARTED) == restarts]


def stopped_after(world: World, run_dir: Path, stage: str, steps: int, **options: Any) -> None:
    """Asks the stage to stop while step `steps` is being judged."""
    stop, judge, left = Stop(), opd.train._judge, steps

    def judging(*args: Any) -> Any:
        nonlocal left
        left -= 1
        stop.asked = stop.asked or left == 0
        return judge(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opd.train, "_judge", judging)
        with pytest.raises(Stopped):
            world.train(run_dir, stage, stop=stop, **options)


# --- stopping and going on --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["sft", "grpo", "distill"])
@pytest.mark.parametrize("steps", [1, 3, 4])
def test_a_stage_that_stops_goes_on_bit_for_bit(
    stage: str, steps: int, world: World, unbroken: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / stage
    stopped_after(world, folder, stage, steps)
    found = newest_checkpoint(str(folder))
    assert found is not None and found.step == steps
    assert len(numbers(folder)) == steps
    same(world.train(folder, stage, checkpoint=found), unbroken(stage))


@pytest.mark.parametrize("stage", ["grpo", "distill"])
def test_a_stage_that_is_cut_short_goes_on_from_its_last_checkpoint(
    stage: str, world: World, unbroken: Callable[[str], Path], tmp_path: Path
) -> None:
    """At an exception there is nothing to save any more: lines and findings after the checkpoint are taken back."""
    folder, plan, left = tmp_path / stage, opd.train._plan, 6
    with pytest.MonkeyPatch.context() as patch:

        def planning(*args: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise ValueError("cut short")
            return plan(*args)

        patch.setattr(opd.train, "_plan", planning)
        with pytest.raises(ValueError, match="cut short") as raised:
            world.train(folder, stage)
    assert "in phase train of step 5" in "".join(raised.value.__notes__)
    found = newest_checkpoint(str(folder))
    assert found is not None and found.step == 4 and len(numbers(folder)) == 5
    same(world.train(folder, stage, checkpoint=found), unbroken(stage))


def test_going_back_to_an_earlier_checkpoint(world: World, unbroken: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "grpo"
    shutil.copytree(unbroken("grpo"), folder, symlinks=True)
    assert [path.name for path in (folder / "checkpoints").iterdir()].count("step_4") == 1
    earlier = read_checkpoint(str(folder / "checkpoints" / "step_4"))
    stopped_after(world, folder, "grpo", 1, checkpoint=earlier)
    assert not (folder / "checkpoints" / "step_6").exists() and len(numbers(folder)) == 5
    same(world.train(folder, "grpo", checkpoint=newest_checkpoint(str(folder))), unbroken("grpo"))


def test_a_finished_stage_keeps_the_last_and_the_best(world: World, tmp_path: Path) -> None:
    config = dataclasses.replace(world.config_of(eval_every=1), checkpoint=CheckpointConfig(keep_last=1, keep_best=1))
    folder = world.train(tmp_path / "sft", "sft", config=config)
    scores = [
        (np.mean([line["eval/pass_at_1/copy"], line["eval/pass_at_1/next"]]), line["step"]) for line in numbers(folder)
    ]
    assert len(scores) == STEPS
    best = max(scores)[1]
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {f"step_{STEPS}", f"step_{best}"}
    assert os.path.realpath(folder / "best") == str(folder / "checkpoints" / f"step_{best}" / "hf")


def test_a_stage_without_steps_is_a_copy(world: World, tmp_path: Path) -> None:
    folder = world.train(tmp_path / "sft", "sft", config=world.config_of(steps=0))
    assert checkpoint_hash(folder / "hf") == checkpoint_hash(world.start)
    found = newest_checkpoint(str(folder))
    assert found is not None and found.step == 0


def test_what_a_checkpoint_cannot_go_on_as(
    world: World, unbroken: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = newest_checkpoint(str(unbroken("distill")))
    assert found is not None
    with pytest.raises(ConfigError, match="is of stage distill and domain None; it cannot go on as stage grpo"):
        world.train(tmp_path / "grpo", "grpo", checkpoint=found)
    other = dataclasses.replace(world.config_of(), seed=5)
    with pytest.raises(ConfigError, match="the data position was saved with seed 0, but the run now has 5"):
        world.train(tmp_path / "seed", "distill", config=other, checkpoint=found)
    teachers = {"both": dataclasses.replace(world.config.teachers["both"], path=world.start)}
    other = dataclasses.replace(world.config_of(), teachers=teachers)
    with pytest.raises(ConfigError, match=r"teachers\.both is not the teacher that this run began with: sha256"):
        world.train(tmp_path / "teacher", "distill", config=other, checkpoint=found)
    with pytest.raises(ConfigError, match="was trained from .*start, and the stage's start is now .*teacher"):
        check_start(found, str(world.root / "teacher"), str(tmp_path))
    with caplog.at_level(logging.WARNING):
        world.train(tmp_path / "rate", "distill", config=world.config_of(learning_rate=1e-4), checkpoint=found)
    assert "another setting than it was begun with: stages.distill.learning_rate 0.003 -> 0.0001" in caplog.text


# --- how a run is asked to stop ---------------------------------------------------------------------------------------


def asked(stop: Stop, number: signal.Signals, reached: list[bool]) -> None:
    """What a loop of one step does that gets a signal in the middle."""
    with stop.at_step_ends():
        os.kill(os.getpid(), number)
        reached.append(stop.asked)


def test_the_first_signal_waits_for_the_end_of_a_step_and_the_second_does_not() -> None:
    stop, reached = Stop(), list[bool]()
    before = signal.getsignal(signal.SIGTERM)
    with stop.signals():
        with pytest.raises(Stopped):
            asked(stop, signal.SIGTERM, reached)
        with pytest.raises(KeyboardInterrupt):
            asked(stop, signal.SIGINT, reached)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "a third one is not held up"
    assert reached == [True]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_outside_of_a_step_a_signal_stops_at_once(number: signal.Signals) -> None:
    stop = Stop()
    with stop.signals(), pytest.raises(Stopped):
        os.kill(os.getpid(), number)
    assert stop.asked


def test_another_thread_does_not_listen() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[Any] = []

    def listen() -> None:
        with Stop().signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [before]


# --- rollouts that run ahead ------------------------------------------------------------------------------------------


class Learners:
    """The part of a crew that `Ahead` sees: what is published, and when."""

    def __init__(self) -> None:
        self.fleet: Any = self
        self.events: list[tuple[str, Any]] = []

    def snapshot(self, version: int) -> Any:
        future: Future[int] = Future()
        future.set_result(version)
        return future

    def publish(self, snapshot: Future[int]) -> None:
        self.events.append(("publish", snapshot.result()))


class Prompts:
    """A stream of numbers."""

    def __init__(self) -> None:
        self.drawn = 0

    def state(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def next(self, n: int) -> list[Any]:
        self.drawn += n
        return list(range(self.drawn - n, self.drawn))


def trajectory(version: int, step: int = 0, spans: Sequence[tuple[int, int]] | None = None) -> Trajectory:
    mask = np.array([False, False, True, True, True])
    return Trajectory(
        id=f"copy/train/1#0@grpo/{step}",
        prompt_id="copy/train/1",
        domain="copy",
        token_ids=np.arange(5, dtype=np.int32),
        loss_mask=mask,
        sampler_logprobs=np.zeros(5, dtype=np.float32),
        version_spans=tuple(VersionSpan(start=s, policy_version=v) for s, v in spans or [(2, version)]),
        finish_reason="stop",
        routing=no_routing(5),
    )


def group(*trajectories: Trajectory) -> Group:
    prompt = Prompt(id="copy/train/1", domain="copy", effort="none", token_ids=(0, 1), reference={})
    return Group(prompt=prompt, trajectories=trajectories)


def ahead_of(
    crew: Learners, stream: Prompts, act: Act, steps: range, max_staleness: int, prompts_per_step: int = 1
) -> Ahead:
    stand_ins = cast(Crew, crew), cast(PromptStream, stream)
    return Ahead(*stand_ins, act, steps=steps, prompts_per_step=prompts_per_step, max_staleness=max_staleness)


@pytest.mark.parametrize("ahead_by", [0, 1, 3])
@pytest.mark.parametrize("first", [0, 4])
def test_rollouts_are_as_old_as_is_allowed_and_no_older(ahead_by: int, first: int) -> None:
    crew, stream, steps = Learners(), Prompts(), first + 7
    begun: list[tuple[int, int, list[int]]] = []
    threads: set[int] = set()

    def act(step: int, version: int, prompts: Sequence[Any]) -> list[Group]:
        begun.append((step, version, list(prompts)))
        crew.events.append(("act", step))
        threads.add(threading.get_ident())
        return [group(trajectory(version, step))]

    positions: dict[int, int] = {}
    with ahead_of(crew, stream, act, range(first, steps), ahead_by, prompts_per_step=2) as line:
        line.publish(first)
        for step in range(first, steps):
            groups = line.take(step)
            assert groups[0].trajectories[0].id.endswith(f"/{step}")
            positions[step] = line.position()["drawn"]
            line.publish(step + 1)
        assert line.measure(lambda version: version) == steps
    assert [(step, version) for step, version, _ in begun] == [
        (step, max(first, step - ahead_by)) for step in range(first, steps)
    ]
    assert [prompts for _, _, prompts in begun] == [[2 * i, 2 * i + 1] for i in range(7)], "in the stream's order"
    assert positions == {step: 2 * (step - first + 1) for step in range(first, steps)}, "of what was trained on"
    assert (threads == {threading.get_ident()}) == (ahead_by == 0)
    loaded = -1
    for what, number in crew.events:
        if what == "publish":
            assert number > loaded, "never an older one again, and none twice"
            loaded = number
        else:
            assert loaded == max(first, number - ahead_by)
    assert loaded == steps


def test_rollouts_go_on_while_the_step_before_is_trained() -> None:
    crew, stream = Learners(), Prompts()
    started = threading.Event()
    go_on = threading.Event()

    def act(step: int, version: int, prompts: Sequence[Any]) -> list[Group]:
        if step == 1:
            started.set()
            assert go_on.wait(10)
        return [group(trajectory(version, step))]

    with ahead_of(crew, stream, act, range(2), 1) as line:
        line.publish(0)
        line.take(0)
        assert started.wait(10), "step 1 is sampled while step 0 is learned from"
        line.publish(1)
        go_on.set()
        assert line.take(1)[0].trajectories[0].version_spans[0].policy_version == 0
        assert line.seconds > 0


@pytest.mark.parametrize("version", [1, 4])
def test_rollouts_of_another_version_are_refused(version: int) -> None:
    def act(step: int, _: int, prompts: Sequence[Any]) -> list[Group]:
        return [group(trajectory(3), trajectory(version))]

    line = ahead_of(Learners(), Prompts(), act, range(3, 5), 1)
    with line, pytest.raises(ValueError, match=f"has tokens of policy version {version}; step 3 .* learns from 2 to 3"):
        line.take(3)


def test_what_rollouts_raise_comes_out_of_the_step_that_takes_them() -> None:
    def act(step: int, version: int, prompts: Sequence[Any]) -> list[Group]:
        if step == 1:
            raise ValueError("no such token")
        return [group(trajectory(version, step))]

    with ahead_of(Learners(), Prompts(), act, range(3), 2) as line:
        line.publish(0)
        line.take(0)
        with pytest.raises(ValueError, match="no such token"):
            line.take(1)


def test_ages_are_counted_token_by_token() -> None:
    values = rollout_metrics([group(trajectory(7), trajectory(0, spans=[(2, 4), (4, 6)]))], 7)
    assert values["rollout/staleness"] == pytest.approx((0 + 0 + 0 + 3 + 3 + 1) / 6)
    assert values["rollout/max_staleness"] == 3


# --- a crew -----------------------------------------------------------------------------------------------------------


class Rank:
    """An actor whose answers are set beforehand: a value, an exception, or None for no answer at all."""

    def __init__(self, name: str, answer: Any) -> None:
        self.name, self.answer = name, answer

    def submit(self, method: str, *args: Any, **kwargs: Any) -> Any:
        rank = self

        class Answer:
            def result(self, timeout_seconds: float | None = None) -> Any:
                answer = rank.answer.pop(0) if isinstance(rank.answer, list) else rank.answer
                if answer is None:
                    time.sleep(min(timeout_seconds or 0.0, 0.01))
                    raise TimeoutError
                if isinstance(answer, Exception):
                    raise answer
                return answer

        return Answer()


def crew_of(*answers: Any, **runtime: Any) -> Crew:
    return Crew(
        runtime=RuntimeConfig(**runtime),
        learners=[Watched(Rank(f"learner rank {rank}", answer)) for rank, answer in enumerate(answers)],
    )


def test_answers_come_by_rank() -> None:
    assert crew_of([None, None, "a"], ["b"]).on_all_ranks("step") == ["a", "b"]


def test_a_death_comes_before_what_other_ranks_made_of_it() -> None:
    lost = RuntimeError("connection closed by peer")
    crew = crew_of(lost, [None, None, ActorDied("learner rank 1", "during step")])
    with pytest.raises(ActorDied, match="learner rank 1 died") as raised:
        crew.on_all_ranks("step")
    assert crew.casualty(raised.value) == "learner rank 1"


def test_a_rank_that_fails_is_not_waited_for_by_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opd.crew, "GRACE_SECONDS", 0.5)
    with pytest.raises(ValueError, match="not finite"):
        crew_of(ValueError("not finite"), None).on_all_ranks("step")


def test_a_missed_deadline_names_the_rank_and_what_all_are_at() -> None:
    crew = crew_of("a", None, deadlines={"train": 0.3, "checkpoint": 60.0})
    with pytest.raises(TimeoutError, match=r"learner rank 1.step did not answer within 0.3 s") as raised:
        crew.on_all_ranks("step")
    assert crew.casualty(raised.value) == "learner rank 1"
    assert crew.doing() == "learner rank 0: idle; learner rank 1: step for 0 s"


def test_a_value_that_is_gone_with_its_owner_is_the_owners_death() -> None:
    crew = crew_of("a", ActorDied("learner rank 1", "before"))
    assert crew.casualty(RuntimeError("a stored value is gone")) == "learner rank 1"
    assert crew_of("a", "b").casualty(RuntimeError("cannot multiply")) is None


def test_a_rank_that_hangs_when_another_one_fails_is_the_one_to_blame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opd.crew, "GRACE_SECONDS", 0.5)
    crew = crew_of(None, RuntimeError("connection closed by peer"))
    with pytest.raises(RuntimeError, match="closed by peer") as raised:
        crew.on_all_ranks("step")
    crew.learners[1] = Watched(Rank("learner rank 1", "b"))
    assert crew.casualty(raised.value) == "learner rank 0"


@pytest.mark.parametrize(("num_ranks", "failed"), [(1, False), (1, True), (2, False), (2, True)])
def test_ranks_that_failed_or_had_peers_are_not_used_again(num_ranks: int, failed: bool) -> None:
    ended: list[tuple[str, bool]] = []

    class Dismissing(LocalRuntime):
        def __init__(self) -> None:
            pass

        def dismiss(self, actors: list[Any]) -> None:
            ended.extend((actor.name, actor.reserves) for actor in actors)

    *ranks, host = [RayActor(name, None, None, False) for name in (*(["learner rank"] * num_ranks), "teacher host 0")]
    crew = Crew(runtime=RuntimeConfig(), learners=[Watched(rank) for rank in ranks], hosts=[Watched(host)])
    crew.dismiss(Dismissing(), failed=failed)
    assert ended == [("learner rank", failed or num_ranks > 1)] * num_ranks + [("teacher host 0", False)]


# --- deaths and hangs, for real ---------------------------------------------------------------------------------------


class Assassin:
    """Sends a signal to the process of an actor, by name, at the start of a phase of a step."""

    def __init__(self, patch: pytest.MonkeyPatch, runtime: Any) -> None:
        self.actors: dict[str, Any] = {}
        spawn = runtime.spawn

        def spawning(cls: type, *args: Any, name: str, **kwargs: Any) -> Any:
            actor = self.actors[name] = spawn(cls, *args, name=name, **kwargs)
            return actor

        patch.setattr(runtime, "spawn", spawning)

    def process_of(self, name: str) -> int:
        import opd.actors

        actor = self.actors[name]
        reference = actor.handle.__ray_call__.remote(lambda process: os.getpid())
        return opd.actors._RayFuture(actor.built, reference, name, "getpid").result(60)

    def strike(self, name: str, number: signal.Signals) -> None:
        os.kill(self.process_of(name), number)


def struck(
    world: World,
    run_dir: Path,
    runtime: Runtime,
    stage: str,
    name: str,
    number: signal.Signals,
    at: tuple[str, int],
    config: Config | None = None,
) -> None:
    """Runs a stage in which the actor `name` is hit when function `at[0]` of the loop is called for the n-th time."""
    with pytest.MonkeyPatch.context() as patch:
        assassin = Assassin(patch, runtime)
        function, left = getattr(opd.train, at[0]), at[1]

        def called(*args: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                assassin.strike(name, number)
            return function(*args)

        patch.setattr(opd.train, at[0], called)
        world.train(run_dir, stage, runtime, config)


@pytest.mark.ray
def test_a_dead_learner_costs_the_steps_since_the_checkpoint(
    world: World, unbroken: Callable[[str], Path], ray_cluster: Runtime, tmp_path: Path
) -> None:
    folder = tmp_path / "struck" / "grpo"
    struck(world, folder, ray_cluster, "grpo", "learner rank 0", signal.SIGKILL, ("_plan", 4))
    same(folder, unbroken("grpo"), states=False)  # of another process, so its random state is another one
    (finding,) = findings(folder, restarts=True)
    assert finding["subject"] == "learner rank 0" and finding["step"] == 2
    for part in (
        "learner rank 0 died",
        " of step 3 after ",
        "learner rank 0: dead; rollout worker 0: idle",
        "goes on from step 2",
    ):
        assert part in finding["message"], finding["message"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_dead_rank_of_two(world: World, ray_cluster: Runtime, tmp_path: Path) -> None:
    config = world.config_of()
    config.learner = dataclasses.replace(config.learner, num_ranks=2)
    reference = world.train(tmp_path / "unbroken" / "distill", "distill", ray_cluster, config)
    folder = tmp_path / "struck" / "distill"
    struck(world, folder, ray_cluster, "distill", "learner rank 1", signal.SIGKILL, ("_plan", 4), config)
    same(folder, reference)
    (finding,) = findings(folder, restarts=True)
    assert finding["subject"] == "learner rank 1" and finding["step"] == 2
    assert "learner rank 0: " in finding["message"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_while_they_meet(rank: int, world: World, ray_cluster: Runtime, tmp_path: Path) -> None:
    config = world.config_of(steps=2)
    config.learner = dataclasses.replace(config.learner, num_ranks=2)
    reference = world.train(tmp_path / "unbroken" / "sft", "sft", ray_cluster, config)
    on_all_ranks, strikes = Crew.on_all_ranks, iter([0.1, 0.5])  # seconds into the first two meetings
    with pytest.MonkeyPatch.context() as patch:
        assassin = Assassin(patch, ray_cluster)

        def meeting(crew: Crew, method: str, *args: Any) -> list[Any]:
            if method == "join" and (wait := next(strikes, None)) is not None:
                victim = assassin.process_of(f"learner rank {rank}")
                threading.Timer(wait, os.kill, (victim, signal.SIGKILL)).start()
            return on_all_ranks(crew, method, *args)

        patch.setattr(Crew, "on_all_ranks", meeting)
        started = time.monotonic()
        folder = world.train(tmp_path / "struck" / "sft", "sft", ray_cluster, config)
    same(folder, reference)
    found = findings(folder, restarts=True)
    assert [finding["subject"] for finding in found] == [f"learner rank {rank}"] * 2
    assert time.monotonic() - started < 2 * opd.crew.GRACE_SECONDS  # which a rank that waits in vain costs


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_between_two_stages_is_not_missed(
    rank: int, world: World, ray_cluster: Runtime, tmp_path: Path
) -> None:
    config = world.config_of(steps=2)
    config.learner = dataclasses.replace(config.learner, num_ranks=2)
    dismiss = ray_cluster.dismiss
    with pytest.MonkeyPatch.context() as patch:
        assassin = Assassin(patch, ray_cluster)

        def dismissing(actors: list[Any]) -> None:
            assassin.strike(f"learner rank {rank}", signal.SIGKILL)
            dismiss(actors)

        patch.setattr(ray_cluster, "dismiss", dismissing)
        first = world.train(tmp_path / "first" / "sft", "sft", ray_cluster, config)
    started = time.monotonic()
    second = world.train(tmp_path / "second" / "sft", "sft", ray_cluster, config)
    same(second, first)
    assert findings(second, restarts=True) == []
    assert time.monotonic() - started < 2 * opd.crew.GRACE_SECONDS  # which a rank that waits in vain costs


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "at"),
    [("teacher host 0", ("_judge", 4)), ("teacher host 0", ("_plan", 1)), ("rollout worker 0", ("_act", 5))],
)
def test_a_dead_teacher_or_worker_changes_nothing(
    name: str, at: tuple[str, int], world: World, ray_cluster: Runtime, tmp_path: Path
) -> None:
    reference = world.train(tmp_path / "unbroken" / "distill", "distill", ray_cluster)
    folder = tmp_path / "struck" / "distill"
    struck(world, folder, ray_cluster, "distill", name, signal.SIGKILL, at)
    same(folder, reference)
    found = findings(folder, restarts=True)
    assert [finding["subject"] for finding in found] == ([] if name.startswith("rollout") else [name])


@pytest.mark.ray
@pytest.mark.slow
def test_a_rank_that_hangs_misses_its_deadline_and_is_replaced(
    world: World, ray_cluster: Runtime, tmp_path: Path
) -> None:
    config = world.config_of()
    config.runtime = dataclasses.replace(config.runtime, deadlines={"train": 20.0})
    reference = world.train(tmp_path / "unbroken" / "grpo", "grpo", ray_cluster, config)
    folder = tmp_path / "struck" / "grpo"
    struck(world, folder, ray_cluster, "grpo", "learner rank 0", signal.SIGSTOP, ("_plan", 4), config)
    same(folder, reference)
    (finding,) = findings(folder, restarts=True)
    assert "learner rank 0.step did not answer within 20 s" in finding["message"]
    assert "rollout worker 0: idle" in finding["message"]
    assert not [child for child in psutil.Process().children(recursive=True) if child.status() == psutil.STATUS_STOPPED]


@pytest.mark.ray
@pytest.mark.slow
def test_one_that_always_dies_is_given_up(world: World, ray_cluster: Runtime, tmp_path: Path) -> None:
    config = world.config_of(checkpoint_every=0)
    config.runtime = dataclasses.replace(config.runtime, max_restarts=1)
    with pytest.MonkeyPatch.context() as patch:
        assassin, plan = Assassin(patch, ray_cluster), opd.train._plan

        def planning(*args: Any) -> Any:
            assassin.strike("learner rank 0", signal.SIGKILL)
            return plan(*args)

        patch.setattr(opd.train, "_plan", planning)
        with pytest.raises(ActorDied, match="learner rank 0 died") as raised:
            world.train(tmp_path / "grpo", "grpo", ray_cluster, config)
    assert "given up: runtime.max_restarts=1 from step 0" in "".join(raised.value.__notes__)
    assert len(findings(tmp_path / "grpo", restarts=True)) == 1


@pytest.mark.ray
@pytest.mark.parametrize("stage", ["grpo", pytest.param("distill", marks=pytest.mark.slow)])
def test_a_stage_whose_rollouts_run_ahead(stage: str, world: World, ray_cluster: Runtime, tmp_path: Path) -> None:
    config = world.config_of()
    config.stages.grpo.max_staleness = config.stages.distill.max_staleness = 2
    folder = world.train(tmp_path / stage, stage, ray_cluster, config)
    assert [line["rollout/max_staleness"] for line in numbers(folder)] == [0, 1, 2, 2, 2, 2]
    assert all(line["rollout/staleness"] == line["rollout/max_staleness"] for line in numbers(folder))
    found = newest_checkpoint(str(folder))
    assert found is not None and sum(found.record["data"]["drawn"].values()) == STEPS * 6
    # Going on, the first steps are sampled under the weights there are.
    earlier = read_checkpoint(str(folder / "checkpoints" / "step_4"))
    world.train(folder, stage, ray_cluster, config, checkpoint=earlier)
    assert [line["rollout/max_staleness"] for line in numbers(folder)] == [0, 1, 2, 2, 0, 1]


@pytest.mark.parametrize("stage", ["grpo", "distill"])
def test_a_stage_that_replays_routing(
    stage: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An untrained policy is wrong throughout, which teaches nothing.
    monkeypatch.setattr(opd.train, "group_advantages", lambda rewards: [1.0, -1.0] * (len(rewards) // 2))
    config = replaying(world)
    folder = world.train(tmp_path / stage, stage, config=config)
    # What it was sampled with is what is trained: the routers agree but for rounding. Evaluations have no record.
    assert [line["gap/rerouted_share"] < 0.01 for line in numbers(folder)] == [True] * 2
    plain = world.train(tmp_path / "plain" / stage, stage, config=world.config_of(steps=2))
    assert not any("gap/rerouted_share" in line for line in numbers(plain))
    assert numbers(folder)[0]["rollout/tokens"] == numbers(plain)[0]["rollout/tokens"]


@pytest.mark.ray
def test_routing_is_replayed_the_same_in_processes_of_their_own(
    world: World, ray_cluster: Runtime, tmp_path: Path
) -> None:
    config = replaying(world)
    alone = world.train(tmp_path / "alone", "distill", config=config)
    same(world.train(tmp_path / "ray", "distill", ray_cluster, config), alone)
    config.stages.distill.max_staleness, config.stages.distill.steps = 2, 4
    folder = world.train(tmp_path / "ahead", "distill", ray_cluster, config)
    assert [line["rollout/max_staleness"] for line in numbers(folder)] == [0, 1, 2, 2]
    assert all("gap/rerouted_share" in line for line in numbers(folder))


def replaying(world: World) -> Config:
    config = world.config_of(steps=2)
    return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, routing_replay=True))


def test_a_long_training_prompt_is_found_before_the_first_step(world: World, tmp_path: Path) -> None:
    rows = [{"prompt": f"copy {letter}{n}", "answer": letter} for letter in "abcdefgh" for n in range(9)]
    rows[40]["prompt"] = "copy " + "ab" * 40
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = DomainConfig(
        source="rows", path=str(tmp_path / "rows.jsonl"), eval_path=str(world.root / "next.jsonl"), num_eval=4
    )
    domain = Domain("copy", settings, world.chat, 32, 4)
    with pytest.raises(ConfigError, match=r"data.domains.copy: prompt copy/train/\d+ has \d+ tokens; at most 28 fit"):
        domain.examine(demonstrated=False)
    rows[40] = {"prompt": "copy a1", "answer": "ab" * 40}
    (tmp_path / "rows2.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    domain = Domain("copy", dataclasses.replace(settings, path=str(tmp_path / "rows2.jsonl")), world.chat, 32, 4)
    domain.examine(demonstrated=False)
    with pytest.raises(
        ConfigError, match=r"the demonstration of prompt copy/train/\d+ has \d+ tokens; model.max_tokens=32"
    ):
        domain.examine(demonstrated=True)
