"""The command line: exit statuses, messages, and that a command which is refused leaves everything as it was."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from opd.__main__ import COMMANDS, compose, main
from opd.chat import Chat, train_tokenizer
from opd.config import ModelConfig
from opd.model import new_v4
from opd.weights import checkpoint_hash, save_checkpoint

ROOT = Path(__file__).parent.parent
SHAPE = {
    "hidden_size": 32,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "q_lora_rank": 16,
    "o_groups": 2,
    "o_lora_rank": 16,
    "layer_types": ["sliding_attention"],
    "mlp_layer_types": ["moe"],
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
}


def checkpoint(folder: Path, chat: Chat, vocab_size: int | None = None) -> None:
    model = ModelConfig(config={**SHAPE, "vocab_size": vocab_size or chat.vocab_size})
    save_checkpoint(folder, new_v4(model, chat.vocab_size, seed=0), chat)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs with one run, "done", in which every stage has left its weights, untrained."""
    runs = tmp_path_factory.mktemp("runs")
    rows = [{"prompt": f"say {number}", "answer": str(number)} for number in range(60)]
    (runs / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for group, text in {
        "data": "# @package data.domains.say\nsource: rows\npath: ???\neval_fraction: 0.3\nnum_eval: 5\n",
        "teachers": "# @package teachers.say\npath: ${run.root}/${run.name}/specialists/say/hf\n",
    }.items():
        (runs / "conf" / group).mkdir(parents=True)
        (runs / "conf" / group / "say.yaml").write_text(text)
    done = runs / "done"
    chat = Chat(train_tokenizer(["say 1"], 300))
    chat.save(done / "tokenizer")
    for part in ("base", "specialists/say", "student"):
        checkpoint(done / part / "hf", chat)
    (done / "config.yaml").write_text("seed: 0\n")
    return runs


@pytest.fixture
def runs(finished: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "runs"))


Opd = Callable[..., tuple[int, str, str]]


@pytest.fixture
def opd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Opd:
    """Runs the command line here: (exit status, standard output, standard error)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["opd", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, printed.out, printed.err

    return run


def settings(runs: Path, run: str = "done") -> list[str]:
    return [
        *("--config-dir", str(runs / "conf"), f"run.root={runs}", f"run.name={run}", "runtime=local"),
        *("data=[say]", "teachers=[say]", "rollout.sampling.max_new_tokens=4", "tracking.wandb=disabled"),
        *("tokenizer.vocab_size=300", "model.max_tokens=32", "~experiment", f"data.domains.say.path={runs}/rows.jsonl"),
        *(f"stages.{stage}.steps=0" for stage in ("base", "sft", "grpo", "distill")),
    ]


def tree(folder: Path) -> dict[str, bytes | str | None]:
    """Everything below a folder: content of files, target of links, None for folders. A lock is no content."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in folder.rglob("*")
        if path.name != ".lock"
    }


def refuse(opd: Opd, runs: Path, command: str, *overrides: str, run: str = "done") -> str:
    """Runs a command that must be refused, with status 2, one message, and nothing touched; returns the message."""
    before = tree(runs)
    status, out, error = opd(command, *settings(runs, run), *overrides)
    message = error.splitlines()[-1]
    assert status == 2, error
    assert message.startswith(f"opd {command}: ") and "Traceback" not in error
    assert out == ""
    assert tree(runs) == before
    return message


# --- the frame --------------------------------------------------------------------------------------------------------


def test_help_names_every_command_and_does_nothing(opd: Opd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, _ = opd("--help")
    assert status == 0
    for command, what in COMMANDS.items():
        assert f"{command} " in out and what in out
    assert "--config-dir" in out and "--cfg" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [[], ["trian"], ["base", "--fast"], ["base", "--cfg", "all"]])
def test_a_command_line_that_is_none(arguments: list[str], opd: Opd) -> None:
    status, _, error = opd(*arguments)
    assert status == 2 and "usage: opd" in error
    if arguments == ["trian"]:
        assert all(command in error for command in COMMANDS), "says what there is"


def test_the_module_is_the_same_program(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "opd", "base", "model.famly=hf"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("opd base: Could not override 'model.famly'") and ended.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_cfg_prints_what_would_run_and_runs_nothing(opd: Opd, runs: Path) -> None:
    before = tree(runs)
    status, out, _ = opd("quickstart", "--cfg", "job", *settings(runs, "fresh"), "stages.base.steps=3")
    assert status == 0 and tree(runs) == before
    printed = yaml.safe_load(out)
    overrides = [*settings(runs, "fresh")[2:], "stages.base.steps=3"]
    _, plain = compose("quickstart", overrides, str(runs / "conf"))
    assert printed == plain
    assert printed["stages"]["base"]["steps"] == 3
    assert printed["teachers"]["say"]["path"] == f"{runs}/fresh/specialists/say/hf", "resolved"


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistake_in_the_configuration(command: str, opd: Opd, runs: Path) -> None:
    assert "learner.zero_stage=7 is not allowed; choose one of 0, 1, 2" in refuse(
        opd, runs, command, "learner.zero_stage=7", run="fresh"
    )


@pytest.mark.parametrize("command", ["base", "specialist", "distill", "evaluate", "quickstart", "tokenizer"])
def test_a_run_that_another_process_works_in(command: str, opd: Opd, runs: Path) -> None:
    with open(runs / "done" / ".lock", "w", encoding="ascii") as lock:
        lock.write("4711")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        message = refuse(opd, runs, command, "domain=say", "run.overwrite=true")
    assert "run.name=done" in message and "in use by process 4711" in message and "choose another run.name" in message


@pytest.mark.parametrize(
    ("command", "part"),
    [
        ("tokenizer", "tokenizer"),
        ("base", "base"),
        ("specialist", "specialists/say"),
        ("distill", "student"),
        ("quickstart", "base"),
    ],
)
def test_a_run_that_is_there_is_not_overwritten(command: str, part: str, opd: Opd, runs: Path) -> None:
    message = refuse(opd, runs, command, "domain=say")
    assert f"run.name=done: {runs}/done/{part} already holds a run" in message
    assert "resume=auto" in message and "run.overwrite=true" in message


def test_quickstart_looks_at_every_stage_before_the_first(opd: Opd, runs: Path) -> None:
    shutil.rmtree(runs / "done" / "base")
    shutil.rmtree(runs / "done" / "specialists")
    assert f"{runs}/done/student already holds a run" in refuse(opd, runs, "quickstart")


@pytest.mark.parametrize("command", ["base", "quickstart", "tokenizer"])
def test_a_folder_that_cannot_be_written(command: str, opd: Opd, runs: Path) -> None:
    file = runs / "rows.jsonl"
    message = refuse(opd, runs, command, f"run.root={file}/below")
    assert f"run.root={file}/below" in message and "cannot be written" in message


@pytest.mark.parametrize(
    ("command", "missing", "advice"),
    [
        ("specialist", "base", "run `opd base` first, or set model.path"),
        ("distill", "base", "run `opd base` first, or set model.path"),
        ("evaluate", "base", "run `opd base` first, or set model.path"),
        ("check", "base", "run `opd base` first, or set model.path"),
        ("evaluate", "student", "run `opd distill` first"),
    ],
)
def test_weights_that_are_not_there(command: str, missing: str, advice: str, opd: Opd, runs: Path) -> None:
    shutil.rmtree(runs / "done" / missing)
    message = refuse(opd, runs, command, "domain=say", "run.overwrite=true")
    assert f"{runs}/done/{missing}/hf does not exist" in message and message.endswith(advice)


def test_a_teacher_that_is_not_there(opd: Opd, runs: Path) -> None:
    message = refuse(opd, runs, "distill", "teachers.say.path=/nowhere/hf", "run.overwrite=true")
    assert "teachers.say.path=/nowhere/hf: /nowhere/hf does not exist" in message
    message = refuse(opd, runs, "quickstart", "teachers.say.path=/nowhere/hf", run="fresh")
    assert "/nowhere/hf does not exist" in message and "teachers.say.path" in message


@pytest.mark.parametrize(
    ("command", "part"),
    [
        ("specialist", "base"),
        ("distill", "base"),
        ("distill", "specialists/say"),
        ("evaluate", "student"),
        ("check", "specialists/say"),
    ],
)
def test_weights_that_are_cut_short(command: str, part: str, opd: Opd, runs: Path) -> None:
    file = runs / "done" / part / "hf" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    message = refuse(opd, runs, command, "domain=say", "run.overwrite=true")
    assert f"{file} is not a complete safetensors file" in message
    if part == "specialists/say":
        assert "teachers.say.path" in message


def test_a_run_without_a_tokenizer(opd: Opd, runs: Path) -> None:
    shutil.rmtree(runs / "done" / "tokenizer")
    message = refuse(opd, runs, "specialist", "domain=say", "run.overwrite=true")
    assert f"model.tokenizer is null and {runs}/done/tokenizer does not exist; run `opd base` first" in message


def test_a_tokenizer_that_the_model_brings(opd: Opd, runs: Path) -> None:
    message = refuse(opd, runs, "tokenizer", f"model.tokenizer={runs}/done/tokenizer", run="fresh")
    assert "model.tokenizer" in message and f"{runs}/done/tokenizer" in message


@pytest.mark.parametrize("command", ["distill", "evaluate", "quickstart", "check"])
def test_a_domain_without_a_teacher(command: str, opd: Opd, runs: Path) -> None:
    run = "fresh" if command == "quickstart" else "done"
    message = refuse(opd, runs, command, "data=[say,leg_counting]", "run.overwrite=true", run=run)
    assert (
        "data.domains.leg_counting has no teacher; teachers: say" in message
        and "conf/teachers/leg_counting.yaml" in message
    )


@pytest.mark.parametrize("command", ["distill", "evaluate", "check"])
def test_a_teacher_with_another_vocabulary(command: str, opd: Opd, runs: Path) -> None:
    chat = Chat.load(str(runs / "done" / "tokenizer"))
    checkpoint(runs / "narrow", chat, vocab_size=chat.vocab_size)
    described = runs / "narrow" / "config.json"
    described.write_text(json.dumps({**json.loads(described.read_text()), "vocab_size": chat.vocab_size - 8}))
    message = refuse(opd, runs, command, f"teachers.say.path={runs}/narrow", "run.overwrite=true")
    assert f"teachers.say.path={runs}/narrow: its vocabulary has {chat.vocab_size - 8} entries" in message


def test_a_teacher_with_another_tokenizer(opd: Opd, runs: Path) -> None:
    chat = Chat.load(str(runs / "done" / "tokenizer"))
    other = Chat(train_tokenizer(["zu zu zu"] * 9, chat.vocab_size))
    assert other.vocab_size <= chat.vocab_size
    checkpoint(runs / "foreign", other, vocab_size=chat.vocab_size)
    message = refuse(opd, runs, "distill", f"teachers.say.path={runs}/foreign", "run.overwrite=true")
    assert f"teachers.say.path={runs}/foreign: its tokenizer is not the student's: id 271 is " in message


def test_a_base_with_another_tokenizer(opd: Opd, runs: Path) -> None:
    chat = Chat.load(str(runs / "done" / "tokenizer"))
    Chat(train_tokenizer(["zu zu zu"] * 9, chat.vocab_size)).save(runs / "done" / "base" / "hf")
    message = refuse(opd, runs, "distill", "run.overwrite=true")
    assert f"the tokenizer beside {runs}/done/base/hf differ: id 271 is " in message


@pytest.mark.parametrize(("command", "run"), [("base", "fresh"), ("specialist", "done"), ("distill", "done")])
def test_an_empty_dataset(command: str, run: str, opd: Opd, runs: Path) -> None:
    (runs / "rows.jsonl").write_text("")
    message = refuse(opd, runs, command, "domain=say", "run.overwrite=true", run=run)
    assert f"data.domains.say.path='{runs}/rows.jsonl' is an empty dataset" in message


@pytest.mark.parametrize(
    ("command", "run"), [("base", "fresh"), ("specialist", "done"), ("distill", "done"), ("check", "done")]
)
def test_a_training_prompt_longer_than_the_context(command: str, run: str, opd: Opd, runs: Path) -> None:
    rows = (runs / "rows.jsonl").read_text().splitlines(keepends=True)
    rows.insert(40, json.dumps({"prompt": "say " + "9" * 40, "answer": "9"}) + "\n")
    (runs / "train.jsonl").write_text("".join(rows))
    files = [f"data.domains.say.path={runs}/train.jsonl"]
    message = refuse(
        opd, runs, command, "domain=say", "run.overwrite=true", *files, "data.domains.say.eval_fraction=0.1", run=run
    )
    assert "data.domains.say: prompt say/train/" in message
    assert "at most 28 fit (model.max_tokens=32 - rollout.sampling.max_new_tokens=4)" in message


@pytest.mark.parametrize(("command", "run"), [("base", "fresh"), ("specialist", "done"), ("evaluate", "done")])
def test_a_prompt_longer_than_the_context(command: str, run: str, opd: Opd, runs: Path) -> None:
    with open(runs / "rows.jsonl", "a", encoding="ascii") as file:
        file.writelines(json.dumps({"prompt": "say " + "9" * 40 + str(n), "answer": "9"}) + "\n" for n in range(60))
    message = refuse(opd, runs, command, "domain=say", "run.overwrite=true", "data.domains.say.num_eval=40", run=run)
    assert "data.domains.say: prompt say/eval/" in message
    assert "at most 28 fit (model.max_tokens=32 - rollout.sampling.max_new_tokens=4)" in message


def test_a_specialist_of_no_domain(opd: Opd, runs: Path) -> None:
    assert "domain is null; choose one of say" in refuse(opd, runs, "specialist")
    assert "domain=algebra is not allowed; choose one of say" in refuse(opd, runs, "specialist", "domain=algebra")


def test_fields_of_the_model_that_cannot_work(opd: Opd, runs: Path) -> None:
    message = refuse(opd, runs, "base", "model.config.hidden_size=40", run="fresh")
    assert "hidden_size" in message and "40" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
@pytest.mark.parametrize("command", ["base", "distill", "quickstart"])
def test_a_device_that_is_not_there(command: str, opd: Opd, runs: Path) -> None:
    message = refuse(opd, runs, command, "runtime.device=cuda", run="fresh")
    assert "runtime.device=cuda, but no CUDA device is available; choose auto or cpu" in message


def test_a_report_of_no_run(opd: Opd, runs: Path) -> None:
    assert f"run.name=fresh: {runs}/fresh is not the folder of a run" in refuse(opd, runs, "report", run="fresh")


# --- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["tokenizer", "quickstart", "evaluate", "check"])
def test_a_folder_to_resume_from_is_for_commands_of_one_stage(command: str, opd: Opd, runs: Path) -> None:
    message = refuse(opd, runs, command, f"resume={runs}/done/base/checkpoints/step_1")
    assert (
        f"resume={runs}/done/base/checkpoints/step_1 is not allowed: opd {command} goes on with resume=auto" in message
    )


@pytest.mark.parametrize("folder", ["base/hf", "student/checkpoints/step_1", "base/checkpoints/step_7", "nowhere"])
def test_a_folder_to_resume_from_is_one_of_the_stage(folder: str, opd: Opd, runs: Path) -> None:
    (runs / "done" / "student" / "checkpoints" / "step_1").mkdir(parents=True)
    message = refuse(opd, runs, "base", f"resume={runs}/done/{folder}")
    assert f"is neither auto nor a folder step_<n> in {runs}/done/base/checkpoints" in message


def test_a_checkpoint_that_is_not_whole_is_not_resumed_from(opd: Opd, runs: Path) -> None:
    folder = runs / "done" / "base" / "checkpoints" / "step_1"
    folder.mkdir(parents=True)
    message = refuse(opd, runs, "base", f"resume={folder}")
    assert f"{folder} is not a complete checkpoint: it has no complete.json" in message


def test_resume_and_overwrite_are_one_too_many(opd: Opd, runs: Path) -> None:
    assert "resume=auto goes on with a run" in refuse(opd, runs, "base", "resume=auto", "run.overwrite=true")


def test_a_tokenizer_that_is_there_is_kept_by_a_resumed_run(opd: Opd, runs: Path) -> None:
    before = tree(runs)
    status, _, _ = opd("tokenizer", *settings(runs), "resume=auto")
    assert status == 0 and tree(runs) == before


class Running:
    """`opd base` of a thousand steps as a process of its own, killed at the end of a test that failed."""

    def __init__(self, runs: Path, *overrides: str, runtime: str = "local") -> None:
        self.runs = runs
        common = [
            setting for setting in settings(runs, "fresh") if not setting.startswith(("runtime=", "stages.base."))
        ]
        shape = [f"model.config.{key}={json.dumps(value)}" for key, value in SHAPE.items()]
        common += ["stages.base.prompts_per_step=4", "stages.base.checkpoint_every=2", "model.fp4_index=false"]
        self.arguments = ["base", *common, *shape, f"runtime={runtime}", *overrides]
        self.log = runs / "log"
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "opd", *self.arguments],
                stdout=log,
                stderr=log,
                cwd=runs,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                start_new_session=True,
            )

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def wait_for_steps(self, steps: int) -> None:
        path = self.runs / "fresh" / "base" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not path.exists() or path.read_text().count("\n") < steps:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def losses(self) -> list[float]:
        lines = (self.runs / "fresh" / "base" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["train/loss"] for line in lines]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_says_how_to_go_on(number: signal.Signals, runs: Path, opd: Opd) -> None:
    with Running(runs, "stages.base.steps=1000") as running:
        running.wait_for_steps(3)
        os.kill(running.process.pid, number)
        assert running.process.wait(60) == 0
        log = running.log.read_text()
    done = len(running.losses())
    assert os.listdir(runs / "fresh" / "base" / "checkpoints").count(f"step_{done}") == 1
    assert f"{number.name}: the run stops when this step is saved" in log
    command = shlex.split(log.splitlines()[-1])
    assert command == ["opd", *running.arguments, "resume=auto"]
    assert log.splitlines()[-2].endswith("opd base: stopped. To go on:")
    if number == signal.SIGTERM:
        status, _, error = opd(*command[1:], f"stages.base.steps={done + 2}")
        assert status == 0, error
        assert len(running.losses()) == done + 2


@pytest.mark.slow
def test_a_second_signal_does_not_wait(runs: Path) -> None:
    with Running(runs, "stages.base.steps=1000", "stages.base.prompts_per_step=20000") as running:  # a step takes long
        deadline = time.monotonic() + 120
        while not (runs / "fresh" / "base" / "metrics.jsonl").exists():
            assert running.process.poll() is None and time.monotonic() < deadline, running.log.read_text()
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(running.process.pid, signal.SIGTERM)
        time.sleep(0.5)
        assert running.process.poll() is None, "the first one waits"
        os.kill(running.process.pid, signal.SIGTERM)
        assert running.process.wait(30) == 130
    assert "opd base: interrupted" in running.log.read_text()


def test_a_killed_run_goes_on_as_if_nothing_had_happened(runs: Path, opd: Opd) -> None:
    with Running(runs, "stages.base.steps=1000") as running:
        running.wait_for_steps(5)
        os.kill(running.process.pid, signal.SIGKILL)
        running.process.wait()
    status, _, error = opd(*running.arguments, "stages.base.steps=12", "resume=auto")
    assert status == 0, error
    resumed = running.losses(), checkpoint_hash(runs / "fresh" / "base" / "hf")
    status, _, error = opd(*running.arguments, "stages.base.steps=12", "run.overwrite=true")
    assert status == 0, error
    assert resumed == (running.losses(), checkpoint_hash(runs / "fresh" / "base" / "hf"))


# --- what needs no actors and works -----------------------------------------------------------------------------------


def test_check_prints_routes_teachers_and_memory_and_writes_nothing(opd: Opd, runs: Path) -> None:
    before = tree(runs)
    chat = Chat.load(str(runs / "done" / "tokenizer"))
    status, out, _ = opd("check", *settings(runs))
    assert status == 0 and tree(runs) == before
    lines = [line.split() for line in out.splitlines()]
    assert any(line[:1] == ["say"] and line[2:] == ["5", "say", "(1)"] for line in lines), out
    assert f"say: deepseek_v4, hidden size 32, vocabulary {chat.vocab_size}, {runs}/done/specialists/say/hf" in out
    assert "learner" in out and "rollout" in out and "on this machine" in out


def test_report_is_written_from_what_is_there(opd: Opd, runs: Path) -> None:
    status, out, _ = opd("report", *settings(runs))
    assert status == 0 and out.strip() == f"{runs}/done/report.html"
    assert "Not evaluated yet" in (runs / "done" / "report.html").read_text()


def test_tokenizer_is_trained_once_and_again_on_request(opd: Opd, runs: Path) -> None:
    status, _, _ = opd("tokenizer", *settings(runs, "fresh"))
    assert status == 0
    folder = runs / "fresh"
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "config.yaml", "tokenizer"]
    recorded = yaml.safe_load((folder / "config.yaml").read_text())
    assert recorded["run"]["name"] == "fresh" and list(recorded["data"]["domains"]) == ["say"]
    first = tree(folder / "tokenizer")
    refuse(opd, runs, "tokenizer", run="fresh")
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    (folder / "tokenizer" / "left_over").touch()
    status, _, _ = opd("tokenizer", *settings(runs, "fresh"), "run.overwrite=true")
    assert status == 0
    assert tree(folder / "tokenizer") == first
