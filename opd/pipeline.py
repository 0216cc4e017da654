"""The commands: which stages run, from which weights, into which folder.

A run is one folder, `<run.root>/<run.name>`:

    config.yaml                     of the command that wrote here last
    summary.json  report.html
    tokenizer/                      unless the model brings its own
    base/                           the common start: init/hf and a stage's folder
    specialists/<domain>/{sft,grpo} two stage folders, and hf, which is the teacher
    student/                        the distilled model's stage folder
    <stage>/metrics.jsonl findings.jsonl wandb/ hf checkpoints/step_<n>/{hf,state,complete.json}

Every command reads what earlier ones left there, so a pipeline can be run at once or piece by piece. A command checks
first and writes afterwards: one that is refused leaves the folder as it was. With `resume` a command goes through the
same lines: a stage whose last checkpoint is there is done, the one that has others goes on, the rest begins.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any, TextIO

import psutil
import yaml
from safetensors import SafetensorError, safe_open

from opd.actors import Runtime
from opd.chat import Chat, tokenizer_difference, train_tokenizer
from opd.checkpoint import Checkpoint, newest_checkpoint, point_at, read_checkpoint
from opd.config import Config, ConfigError, teacher_routes
from opd.crew import pick_device
from opd.data import Domain, domain_texts, load_domains
from opd.evaluate import compare, write_summary
from opd.health import check_recovery
from opd.memory import give_back_freed_memory
from opd.model import DeepseekV4, check_replay, new_v4, without_weights
from opd.progress import check_start
from opd.report import write_report
from opd.stop import Stop
from opd.train import train
from opd.weights import load_model_config, resolve_checkpoint, save_checkpoint
from rollout.engine import pages_of
from teachers.pool import check_teachers
from teachers.shelf import expected_bytes

log = logging.getLogger(__name__)


@contextlib.contextmanager
def open_run(config: Config) -> Iterator[None]:
    """Takes the run's folder for this process. A folder that is made here and stays empty is removed at the end.

    Raises ConfigError when another process works in it, when it cannot be written, and for a missing device.
    """
    pick_device(config)
    made: list[str] = []
    folder = os.path.abspath(config.run.dir)
    while not os.path.lexists(folder):
        made.append(folder)
        folder = os.path.dirname(folder)
    try:
        os.makedirs(config.run.dir, exist_ok=True)
        lock: TextIO = open(os.path.join(config.run.dir, ".lock"), "a+", encoding="ascii")  # noqa: SIM115
    except OSError as error:
        raise ConfigError(f"run.root={config.run.root}: {config.run.dir} cannot be written: {error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise ConfigError(
                f"run.name={config.run.name}: {config.run.dir} is in use by process {lock.read().strip() or '?'}; "
                "choose another run.name"
            ) from None
        lock.seek(0)
        lock.truncate()
        lock.write(str(os.getpid()))
        lock.flush()
        try:
            yield
        finally:
            if made and os.listdir(config.run.dir) == [".lock"]:
                os.unlink(lock.name)
                for folder in made:
                    os.rmdir(folder)


def student_chat(config: Config) -> Chat:
    """The student's tokenizer: the one named, the one beside the model, or the run's own."""
    named = config.model.tokenizer or config.model.path
    if named:
        return Chat.load(named, config.model.revision)
    folder = _tokenizer_path(config)
    if not os.path.isdir(folder):
        raise ConfigError(f"model.tokenizer is null and {folder} does not exist; run `opd base` first")
    return Chat.load(folder)


def base_path(config: Config) -> str:
    """The weights that specialists and student start from: what `opd base` made in this run, or else `model.path`."""
    made = os.path.join(config.run.dir, "base", "hf")
    return made if os.path.exists(made) or config.model.path is None else config.model.path


def student_path(config: Config) -> str:
    return os.path.join(config.run.dir, "student", "hf")


def run_tokenizer(config: Config) -> None:
    """Trains the run's own tokenizer, unless the run is resumed and has it. Raises ConfigError when the model brings
    one, and for an earlier one that may not be overwritten."""
    if named := config.model.tokenizer or config.model.path:
        raise ConfigError(f"model.tokenizer or model.path is set: the tokenizer is the one of {named}")
    _refuse_existing(config, "tokenizer")
    if config.resume and os.path.isdir(_tokenizer_path(config)):
        log.info("%s is there", _tokenizer_path(config))
        return
    chat = _trained_chat(config)
    _save_tokenizer(config, chat)
    log.info("%d entries, in %s", chat.vocab_size, _tokenizer_path(config))


def run_base(config: Config, runtime: Runtime, stop: Stop | None = None) -> None:
    """The common start: a fresh model (or `model.path`) and a short SFT on all domains."""
    folder = os.path.join(config.run.dir, "base")
    _refuse_existing(config, "base")
    checkpoint = _checkpoint(config, folder)
    is_own = not (config.model.tokenizer or config.model.path)
    is_new = is_own and (config.run.overwrite or not os.path.isdir(_tokenizer_path(config)))
    chat = _trained_chat(config) if is_new and checkpoint is None else student_chat(config)
    domains = _examined(load_domains(config, chat), demonstrated=config.stages.base.steps > 0)
    start = config.model.path and _existing(config.model.path, config.model.revision)
    model = None if start or checkpoint else new_v4(config.model, chat.vocab_size, config.seed)
    if model is not None:  # for later stages, which take long to come
        _check_rollout(config, model)
    if start is not None:
        _check_student(config, start)
    _open_folder(config, "base", checkpoint)
    if is_new and checkpoint is None:
        _save_tokenizer(config, chat)
    if start is None:
        start = os.path.join(folder, "init", "hf")
    if model is not None:
        save_checkpoint(start, model, chat)
    _stage(config, "base", start, folder, domains, chat, runtime, checkpoint, stop)


def run_specialist(config: Config, runtime: Runtime, domain: str, stop: Stop | None = None) -> None:
    """SFT, then GRPO, on one domain; `specialists/<domain>/hf` is the teacher."""
    name = os.path.join("specialists", domain)
    folder = os.path.join(config.run.dir, name)
    _refuse_existing(config, name)
    sft = _checkpoint(config, os.path.join(folder, "sft"))
    grpo = _checkpoint(config, os.path.join(folder, "grpo")) if sft is not None else None
    start = _existing(base_path(config), config.model.revision, "run `opd base` first, or set model.path")
    _check_student(config, start)
    chat = student_chat(config)
    domains = _examined(load_domains(config, chat, [domain]), demonstrated=config.stages.sft.steps > 0)
    _open_folder(config, name, sft)
    for stage, checkpoint in (("sft", sft), ("grpo", grpo)):
        start = _stage(config, stage, start, os.path.join(folder, stage), domains, chat, runtime, checkpoint, stop)
    if not os.path.lexists(os.path.join(folder, "hf")):
        os.symlink(os.path.join("grpo", "hf"), os.path.join(folder, "hf"))


def run_distill(config: Config, runtime: Runtime, stop: Stop | None = None) -> None:
    """All teachers into one student, on-policy."""
    folder = os.path.join(config.run.dir, "student")
    _refuse_existing(config, "student")
    checkpoint = _checkpoint(config, folder)
    chat, domains, lines = _survey(config)
    for line in lines:
        log.info("%s", line)
    _examined(domains, demonstrated=False)
    _open_folder(config, "student", checkpoint)
    _stage(config, "distill", base_path(config), folder, domains, chat, runtime, checkpoint, stop)


def run_evaluate(config: Config, runtime: Runtime) -> dict[str, Any]:
    """Base, teachers and student on held-out prompts; writes summary.json and report.html."""
    student = _existing(student_path(config), None, "run `opd distill` first")
    chat, domains, _ = _survey(config)
    _record(config)
    started = time.perf_counter()
    summary = compare(
        config, runtime, chat, domains, base=base_path(config), student=student, device=pick_device(config)
    )
    summary["findings"] = _findings(config.run.dir) + summary["findings"]
    summary["seconds"] = _seconds(config.run.dir) | {"evaluate": round(time.perf_counter() - started, 3)}
    write_summary(os.path.join(config.run.dir, "summary.json"), summary)
    write_report(config.run.dir)
    for finding in check_recovery(summary):
        log.warning("%s: %s", finding.rule, finding.message)
    return summary


def run_quickstart(config: Config, runtime: Runtime, stop: Stop | None = None) -> dict[str, Any]:
    """The whole chain, and how to repeat each link of it. What is known to fail later is refused at the start."""
    specialists = {domain: os.path.join("specialists", domain) for domain in config.data.domains}
    for name in ("base", *specialists.values(), "student"):
        _refuse_existing(config, name)
    teacher_routes(config)
    made = {os.path.abspath(os.path.join(config.run.dir, name, "hf")) for name in specialists.values()}
    for name, teacher in config.teachers.items():
        if teacher.family != "remote" and os.path.abspath(teacher.path) not in made:
            _existing(teacher.path, teacher.revision, f"it is teachers.{name}.path, and no specialist of this run")
    total = 3 + len(config.data.domains)

    def announce(number: int, command: str, what: str) -> None:
        log.info("[%d/%d] %s  ($ opd %s experiment=quickstart)", number, total, what, command)

    announce(1, "base", "tokenizer and base model: a short SFT on all domains")
    run_base(config, runtime, stop)
    for number, domain in enumerate(config.data.domains):
        announce(2 + number, f"specialist domain={domain}", f"specialist for {domain}: SFT, then GRPO")
        run_specialist(config, runtime, domain, stop)
    announce(total - 1, "distill", "on-policy distillation of all specialists into one student")
    run_distill(config, runtime, stop)
    announce(total, "evaluate", "evaluation of base, teachers and student")
    return run_evaluate(config, runtime)


def check(config: Config) -> list[str]:
    """What `opd distill` would do, line by line: routing, memory; raises ConfigError for what cannot work."""
    _, domains, lines = _survey(config)
    _examined(domains, demonstrated=False)
    return lines


def _survey(config: Config) -> tuple[Chat, dict[str, Domain], list[str]]:
    """The student's tokenizer, the domains, and the lines of `check`."""
    routes = teacher_routes(config)
    path = _existing(base_path(config), config.model.revision, "run `opd base` first, or set model.path")
    _check_student(config, path)
    chat = student_chat(config)
    vocab_size = int(load_model_config(path, config.model.revision).get_text_config().vocab_size)
    teachers = check_teachers(chat, vocab_size, config.teachers, config.model.max_tokens)
    for name, teacher in config.teachers.items():
        if teacher.family != "remote":
            _existing(teacher.path, teacher.revision, f"it is teachers.{name}.path")
    if difference := tokenizer_difference(chat, Chat.load(path, config.model.revision)):
        raise ConfigError(f"model.tokenizer and the tokenizer beside {path} differ: {difference}")
    give_back_freed_memory()  # of the tokenizers that were compared
    domains = load_domains(config, chat)
    width = max(len(name) for name in routes)
    lines = ["routing:", f"  {'domain':<{width}}  train     held out  teacher (weight)"]
    for name, domain in domains.items():
        served = ", ".join(f"{teacher} ({weight:g})" for teacher, weight in routes[name])
        lines.append(f"  {name:<{width}}  {domain.train_size:<8}  {len(domain.eval):<8}  {served}")
    lines += ["teachers:", *(f"  {line}" for line in teachers)]
    return chat, domains, lines + memory_estimate(config)


def memory_estimate(config: Config) -> list[str]:
    """Bytes each kind of actor holds, from the checkpoints' own sizes; a warning line when they exceed the machine."""
    student = _weight_bytes(base_path(config), config.model.revision)
    per_parameter = 16 if config.learner.optimizer.name == "adamw" else 12  # master, gradient, one or two moments
    shards = config.learner.num_ranks if config.learner.zero_stage else 1
    learner = student // 4 * (8 + (per_parameter - 8) / shards) + student
    staying, coming = expected_bytes(config.teachers)
    at_once = min(len(coming), 2 if config.pool.prefetch else 1)
    teachers = sum(staying) + at_once * max(coming, default=0)
    worker = 2 * student  # the policy, and the snapshot it is loaded from
    total = learner * config.learner.num_ranks + worker * config.rollout.num_workers + teachers
    lines = [
        "memory for weights and optimizer, without activations:",
        f"  learner      {config.learner.num_ranks} x {_size(learner)}",
        f"  rollout      {config.rollout.num_workers} x {_size(worker)}",
        f"  teachers     {_size(teachers)} ({len(staying)} that stay, {at_once} at a time of {len(coming)} on disk)",
        f"  in all       {_size(total)} of {_size(psutil.virtual_memory().total)} on this machine",
    ]
    if total > psutil.virtual_memory().total:
        lines.append("  warning: more than this machine has; spread it over a cluster or use residency: disk")
    return lines


def _checkpoint(config: Config, folder: str) -> Checkpoint | None:
    """What a stage's folder goes on from; None: it begins. Raises ConfigError for a checkpoint that is not whole."""
    if config.resume is None:
        return None
    if os.path.dirname(os.path.dirname(os.path.abspath(config.resume))) == os.path.abspath(folder):
        return read_checkpoint(config.resume)
    return newest_checkpoint(folder)


def check_resume(config: Config, command: str) -> None:
    """Raises ConfigError when `resume` is a folder from which the command cannot go on."""
    stages = {
        "base": ["base"],
        "specialist": [os.path.join("specialists", config.domain or "", stage) for stage in ("sft", "grpo")],
        "distill": ["student"],
    }.get(command, [])
    if config.resume in (None, "auto"):
        return
    folders = [os.path.join(config.run.dir, stage, "checkpoints") for stage in stages]
    if not folders:
        raise ConfigError(f"resume={config.resume} is not allowed: opd {command} goes on with resume=auto or null")
    folder = os.path.abspath(config.resume)
    if os.path.dirname(folder) not in map(os.path.abspath, folders) or not os.path.isdir(folder):
        raise ConfigError(
            f"resume={config.resume} is neither auto nor a folder step_<n> in {' or '.join(folders)}; other weights to "
            "start from are model.path"
        )


def _open_folder(config: Config, name: str, checkpoint: Checkpoint | None) -> None:
    """The folder of a stage, empty unless the stage goes on, and the configuration on record: from here on the command
    writes."""
    folder = os.path.join(config.run.dir, name)
    if checkpoint is None:
        _clear(folder)
    os.makedirs(folder, exist_ok=True)
    _record(config)


def _clear(folder: str) -> None:
    if os.path.isdir(folder):
        if os.listdir(folder):
            log.info("%s has nothing to go on from; it begins", folder)
        shutil.rmtree(folder)


def _examined(domains: dict[str, Domain], *, demonstrated: bool) -> dict[str, Domain]:
    for domain in domains.values():
        domain.examine(demonstrated=demonstrated)
    return domains


def _stage(
    config: Config,
    stage: str,
    start: str,
    folder: str,
    domains: dict[str, Domain],
    chat: Chat,
    runtime: Runtime,
    checkpoint: Checkpoint | None,
    stop: Stop | None,
) -> str:
    """One call of `train`, with a seed of the stage's own: no two stages see prompts in the same order."""
    order = ("base", "sft", "grpo", "distill").index(stage)
    seeded = replace(config, seed=config.seed * 4 + order)
    if checkpoint is not None:
        check_start(checkpoint, start, config.run.dir)
        if checkpoint.step >= getattr(config.stages, stage).steps:
            log.info("%s is done", folder)
            return point_at(folder, checkpoint)
        log.info("%s goes on from step %d", folder, checkpoint.step)
    return train(
        seeded,
        stage,
        start=start,
        run_dir=folder,
        domains=domains,
        chat=chat,
        runtime=runtime,
        checkpoint=checkpoint,
        stop=stop,
    )


def _check_student(config: Config, path: str) -> None:
    """Raises ConfigError for settings that the checkpoint's shape rules out: workers and learner would, but later."""
    model, published = config.model, load_model_config(path, config.model.revision)
    if model.family != "deepseek_v4" or published.model_type != model.family:  # whoever loads it says so
        return
    if model.max_tokens > published.max_position_embeddings:
        raise ConfigError(
            f"model.max_tokens={model.max_tokens} exceeds max_position_embeddings={published.max_position_embeddings} "
            f"of {path}"
        )
    _check_rollout(config, without_weights(model, path))


def _check_rollout(config: Config, student: DeepseekV4) -> None:
    rollout = config.rollout
    if rollout.routing_replay:
        check_replay(student.config)
    pages_of(student, rollout.num_slots, config.model.max_tokens, rollout.cache_bytes)


def _tokenizer_path(config: Config) -> str:
    return os.path.join(config.run.dir, "tokenizer")


def _trained_chat(config: Config) -> Chat:
    log.info("training a byte-level BPE of %d entries", config.tokenizer.vocab_size)
    texts = domain_texts(config, config.tokenizer.samples_per_domain)
    return Chat(train_tokenizer(texts, config.tokenizer.vocab_size))


def _save_tokenizer(config: Config, chat: Chat) -> None:
    """As a whole: a resumed run takes the folder for a tokenizer that is finished."""
    folder, unfinished = _tokenizer_path(config), os.path.join(config.run.dir, ".tokenizer.unfinished")
    for old in (folder, unfinished):
        if os.path.isdir(old):
            shutil.rmtree(old)
    chat.save(unfinished)
    os.rename(unfinished, folder)
    _record(config)


def _refuse_existing(config: Config, name: str) -> None:
    """Raises ConfigError when a folder of the run holds an earlier one, and it is neither resumed nor overwritten."""
    folder = os.path.join(config.run.dir, name)
    if not (config.resume or config.run.overwrite) and os.path.isdir(folder) and os.listdir(folder):
        raise ConfigError(
            f"run.name={config.run.name}: {folder} already holds a run; go on with it by resume=auto, replace it by "
            "run.overwrite=true, or choose another run.name"
        )


def _record(config: Config) -> None:
    path = os.path.join(config.run.dir, "config.yaml")
    with open(f"{path}.partial", "w", encoding="utf-8") as file:
        yaml.safe_dump(asdict(config), file, sort_keys=False)
    os.replace(f"{path}.partial", path)


def _existing(path: str, revision: str | None, otherwise: str = "") -> str:
    """The path of a checkpoint whose weights are all there; else ConfigError, with what to do in its message."""
    try:
        folder = resolve_checkpoint(path, revision)
        for name in sorted(os.listdir(folder)):
            if name.endswith(".safetensors"):
                try:
                    with safe_open(folder / name, framework="pt"):
                        pass
                except SafetensorError as error:
                    raise ConfigError(f"{folder / name} is not a complete safetensors file: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{error}; {otherwise}" if otherwise else str(error)) from None
    return path


def _findings(run_dir: str) -> list[dict[str, Any]]:
    found = []
    for folder, _, files in sorted(os.walk(run_dir)):
        if "findings.jsonl" in files:
            with open(os.path.join(folder, "findings.jsonl"), encoding="utf-8") as file:
                found += [json.loads(line) for line in file if line.endswith("\n")]
    return found


def _seconds(run_dir: str) -> dict[str, float]:
    """Seconds of every stage, specialists under "<stage> <domain>"; of steps that were lost and done again, once."""
    seconds = {}
    for folder, folders, _ in sorted(os.walk(run_dir)):
        checkpoint = newest_checkpoint(folder, contents=False) if "checkpoints" in folders else None
        if checkpoint is not None:
            stage, domain = checkpoint.record["stage"], checkpoint.record["domain"]
            seconds[f"{stage} {domain}" if stage in ("sft", "grpo") else stage] = checkpoint.record["seconds"]
    return seconds


def _weight_bytes(path: str, revision: str | None) -> int:
    folder = resolve_checkpoint(path, revision)
    return sum(os.path.getsize(folder / name) for name in os.listdir(folder) if name.endswith(".safetensors"))


def _size(num_bytes: float) -> str:
    power = min(int(math.log(max(num_bytes, 1), 1024)), 4)
    return f"{num_bytes / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
