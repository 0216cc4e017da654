"""The loop, for every stage: act, judge, learn, publish, log.

Stages differ in two places only. SFT (`base`, `sft`) acts by demonstration and its signal says "these tokens"; GRPO
and OPD act by sampling, and judge by a verifier or by teachers. The rest of a step is the same lines of `_steps`.

A step consumes prompts and weights of version v, and produces weights of version v + 1. Each phase waits for the one
before it: rollout for the published version, scoring for all rollouts, the learner for all signals, publish for the
learner. With `max_staleness` rollouts are begun that many steps earlier (`opd.ahead`), and nothing else changes. A
checkpoint is begun between two steps, and waited for between the next two.

An actor that dies or hangs costs the steps since the last checkpoint: `train` hires everybody anew and goes on there.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from opd.actors import Runtime
from opd.ahead import Ahead
from opd.batching import Plan, plan
from opd.chat import Chat
from opd.checkpoint import RESTARTED, Checkpoint, Saver, newest_checkpoint, rewind
from opd.config import Config, DistillConfig, GrpoConfig, SamplingConfig, TeacherConfig
from opd.crew import SAMPLES, Crew, Signals, demonstrations, hire
from opd.data import Domain
from opd.evaluate import judge, measure
from opd.health import Finding
from opd.learner import merge_stats
from opd.losses import group_advantages
from opd.observe import Clock, reward_metrics, rollout_metrics
from opd.progress import Progress, Stage
from opd.stop import Stop, Stopped
from opd.types import Advantage, Demonstration, Group, Prompt

log = logging.getLogger(__name__)


def train(
    config: Config,
    stage: str,
    *,
    start: str,
    run_dir: str,
    domains: Mapping[str, Domain],
    chat: Chat,
    runtime: Runtime,
    checkpoint: Checkpoint | None = None,
    stop: Stop | None = None,
) -> str:
    """Trains `start` (a checkpoint folder) through one stage; returns the folder of the weights it ends with.

    `stage` is base, sft, grpo or distill. Writes metrics.jsonl, findings.jsonl and checkpoints/ into `run_dir`, and
    leaves `run_dir`/hf pointing at the newest checkpoint's weights. With `checkpoint`, the stage goes on from there: on
    the layout that wrote it, and without `max_staleness`, bit for bit as if it had never stopped. When an actor dies or
    misses its deadline, the stage goes on from the newest checkpoint with fresh actors, at most `runtime.max_restarts`
    times in a row without a new checkpoint.

    Raises Stopped when `stop` was asked for, once the step is saved; ConfigError for what the configuration got wrong;
    and what ended an actor that is not to be replaced any more.
    """
    this = Stage(config=config, name=stage, start=start, run_dir=run_dir, domains=domains, chat=chat)
    os.makedirs(run_dir, exist_ok=True)
    restarts, first = 0, checkpoint.step if checkpoint else 0
    while True:
        rewind(run_dir, first)
        progress = Progress(this, checkpoint)
        crew = hire(config, stage, start, run_dir, chat, runtime)
        failed = True
        try:
            _meet(this, crew, checkpoint, examine=progress.has_new_teachers)
            _steps(this, crew, progress, stop or Stop())
            failed = False
            return os.path.join(run_dir, "hf")
        except (RuntimeError, TimeoutError) as error:
            name = crew.casualty(error)
            if name is None:
                raise
            doing = crew.doing()
            checkpoint = newest_checkpoint(run_dir) or checkpoint
            reached = checkpoint.step if checkpoint else 0
            restarts, first = (restarts + 1 if reached == first else 1), reached
            if restarts > config.runtime.max_restarts:
                error.add_note(f"given up: runtime.max_restarts={config.runtime.max_restarts} from step {first}")
                error.add_note(f"the actors at that moment: {doing}")
                raise
            what = "; ".join([str(error), *getattr(error, "__notes__", ())])
            message = f"{what}. The actors at that moment: {doing}. The stage goes on from step {first} with fresh ones"
        finally:
            crew.dismiss(runtime, failed=failed)
        _report(this, first, [Finding(rule=RESTARTED, severity="warning", message=message, subject=name)])


def _meet(stage: Stage, crew: Crew, checkpoint: Checkpoint | None, *, examine: bool) -> None:
    """Everybody ready for the first step, or for the one after the checkpoint; teachers examined if asked."""
    crew.meet()
    if crew.pool is not None:
        model = stage.config.model
        student = TeacherConfig(path=stage.start, family=model.family, revision=model.revision)
        crew.meet_teachers(stage.config.pool, demonstrations(stage.domains) if examine else [], student)
    if checkpoint is not None:  # last: in one process, whatever is loaded moves the random state that it sets
        crew.on_all_ranks("load", checkpoint.folder)


def _steps(stage: Stage, crew: Crew, progress: Progress, stop: Stop) -> None:
    """The steps of the stage that are left."""
    settings, chat = stage.settings, stage.chat
    saver = Saver(stage.run_dir, stage.config.checkpoint, crew.on_all_ranks)
    ahead = Ahead(
        crew,
        progress.stream,
        lambda step, version, prompts: _act(stage, crew, step, version, prompts),
        steps=range(progress.first, settings.steps),
        prompts_per_step=settings.prompts_per_step,
        max_staleness=settings.max_staleness if isinstance(settings, GrpoConfig | DistillConfig) else 0,
    )
    with stop.at_step_ends(), ahead, saver, progress.metrics() as metrics:
        ahead.publish(progress.first)
        for step in range(progress.first, settings.steps):
            clock = Clock(step)
            with clock.phase("rollout"):
                groups = ahead.take(step)
            with clock.phase("score"):
                signals, values = _judge(stage, crew, groups, step)
            with clock.phase("train"):
                work = _plan(stage, groups, signals)
                values |= merge_stats(crew.on_all_ranks("step", work, crew.heads)) if work else {}
                crew.free(signals)
                del signals, work  # with the last handle goes what lies in memory, before the next step's comes
            last = step + 1 == settings.steps
            evaluates = settings.eval_every > 0 and (last or (step + 1) % settings.eval_every == 0)
            if stage.name in SAMPLES or evaluates:
                with clock.phase("publish"):
                    ahead.publish(step + 1)
            if evaluates:
                with clock.phase("evaluate"):
                    values |= ahead.measure(lambda version: _evaluate(stage, crew, version))
            with clock.phase("checkpoint"):
                saver.settle()
                if last or stop.asked or _is_due(stage, step + 1, evaluates):
                    saver.begin(step + 1, progress.files(step + 1, ahead.position(), values, metrics), chat)
            values |= clock.metrics(groups, ahead.seconds) | {"policy/version": step + 1}
            metrics.log(step + 1, values)
            _report(stage, step + 1, progress.health.check(step + 1, values))
            if stop.asked:
                break
        if settings.steps == 0:
            saver.begin(0, progress.files(0, ahead.position(), {}, metrics), chat)
        saver.finish()
        if stop.asked:
            raise Stopped


def _act(stage: Stage, crew: Crew, step: int, version: int, prompts: Sequence[Prompt]) -> list[Group]:
    """Demonstrations, or the policy's own completions under `version`, which is published."""
    if stage.name not in SAMPLES:
        return [Group(prompt=p, trajectories=(stage.domains[p.domain].demonstration(p),)) for p in prompts]
    assert crew.fleet is not None
    sampling = SamplingConfig(**asdict(stage.config.rollout.sampling), temperature=stage.settings.temperature)
    tag = f"{stage.name}/{step}"
    return crew.fleet.generate(prompts, stage.settings.group_size, sampling, version=version, tag=tag)


def _judge(stage: Stage, crew: Crew, groups: Sequence[Group], version: int) -> tuple[Signals, dict[str, float]]:
    """The signal of every trajectory, and what was learnt about the rollouts on the way."""
    if stage.name not in SAMPLES:
        return [[Demonstration() for _ in group.trajectories] for group in groups], {}
    verdicts = judge(groups, stage.domains, stage.chat)
    values = rollout_metrics(groups, version) | reward_metrics(groups, verdicts)
    if stage.name == "distill":
        assert crew.pool is not None
        signals = crew.pool.score(groups)
        return signals, values | crew.pool.metrics()
    advantages = [group_advantages([verdict.reward for verdict in row]) for row in verdicts]
    values["grpo/zero_advantage_share"] = sum(not any(row) for row in advantages) / len(advantages)
    return [[Advantage(value=value) for value in row] for row in advantages], values


def _plan(stage: Stage, groups: list[Group], signals: Signals) -> Plan | None:
    """The step's work; None when GRPO has nothing to say because every group was all right or all wrong."""
    kept = [index for index, row in enumerate(signals) if not all(s == Advantage(value=0.0) for s in row)]
    if not kept:
        return None
    learner = stage.config.learner
    return plan(
        [groups[index] for index in kept],
        [signals[index] for index in kept],
        num_ranks=learner.num_ranks,
        micro_batch_tokens=learner.micro_batch_tokens,
    )


def _evaluate(stage: Stage, crew: Crew, version: int) -> dict[str, float]:
    assert crew.fleet is not None
    scores = measure(
        crew.fleet,
        stage.domains,
        stage.chat,
        version=version,
        samples=0,
        temperature=stage.config.eval.temperature,
        max_new_tokens=stage.config.rollout.sampling.max_new_tokens,
        limit=stage.config.eval.inline_prompts,
    )
    accuracy = {f"eval/pass_at_1/{name}": score.pass_at_1 for name, score in scores.items()}
    return accuracy | {f"eval/mean_length/{name}": score.mean_length for name, score in scores.items()}


def _is_due(stage: Stage, step: int, evaluated: bool) -> bool:
    every = stage.settings.checkpoint_every
    return (every > 0 and step % every == 0) or (evaluated and stage.config.checkpoint.keep_best > 0)


def _report(stage: Stage, step: int, findings: Sequence[Finding]) -> None:
    """What was found: to the log, and to findings.jsonl for the report."""
    for finding in findings:
        level = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}[finding.severity]
        log.log(level, "%s: %s", finding.rule, finding.message)
        line = {
            "rule": finding.rule,
            "severity": finding.severity,
            "subject": finding.subject,
            "message": finding.message,
            "step": step,
            "stage": stage.name,
        }
        with open(os.path.join(stage.run_dir, "findings.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
