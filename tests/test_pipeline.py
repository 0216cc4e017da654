"""Whole runs in a tiny world, end to end: what they write, that they learn, and what they find wrong.

The world has two domains, "copy a7" -> "a" and "next a7" -> "b", so that the same question has another answer in the
other domain: a student that has learnt from the wrong teacher is wrong, not merely weak. Runs go through the command
line in this process (runtime=local), so the order of tests does not matter; those marked `ray` share one cluster.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

import opd.crew
import opd.train
from opd.__main__ import main
from opd.actors import Runtime
from opd.chat import Chat, train_tokenizer
from opd.metrics import CATALOGUE, describe, read_metrics
from opd.model import HubModel
from opd.weights import checkpoint_hash

LETTERS = "abcdefgh"
TINY = (
    "~experiment",
    "learner=adamw",
    "tracking.wandb=disabled",
    "tokenizer.vocab_size=320",
    "model.max_tokens=32",
    "model.config.hidden_size=64",
    "model.config.moe_intermediate_size=32",
    "model.config.num_hidden_layers=2",
    "model.config.layer_types=[sliding_attention,compressed_sparse_attention]",
    "model.config.mlp_layer_types=[moe,moe]",
    "model.config.n_routed_experts=4",
    "model.config.num_attention_heads=2",
    "model.config.head_dim=32",
    "model.config.q_lora_rank=32",
    "model.config.o_lora_rank=32",
    "model.config.index_n_heads=2",
    "model.config.index_head_dim=32",
    "rollout.sampling.max_new_tokens=4",
    "eval.samples=2",
    "stages.base.steps=12",
    "stages.base.prompts_per_step=32",
    "stages.base.learning_rate=1e-2",
    "stages.sft.steps=30",
    "stages.sft.prompts_per_step=32",
    "stages.sft.learning_rate=1e-2",
    "stages.sft.decay_fraction=0.5",
    "stages.grpo.steps=2",
    "stages.grpo.prompts_per_step=8",
    "stages.grpo.group_size=4",
    "stages.distill.steps=45",
    "stages.distill.prompts_per_step=64",
    "stages.distill.learning_rate=5e-3",
    "stages.distill.decay_fraction=0.5",
    "stages.distill.kl_temperature=2",  # teachers this sure of themselves leave wrong modes little gradient at 1
)
# The whole of a step's change is the teacher's: nothing else moves the weights.
TEACHER_ONLY = ("learner.balance_loss=0", "learner.balance_bias_speed=0", "learner.optimizer.weight_decay=0")


class World:
    """A folder with the two domains' rows and YAML files, and with the runs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.add_domain("copy", [(f"copy {letter}{n}", letter) for letter in LETTERS for n in range(40)])
        self.add_domain(
            "next", [(f"next {letter}{n}", LETTERS[(i + 1) % 8]) for i, letter in enumerate(LETTERS) for n in range(40)]
        )

    def add_domain(self, name: str, questions: list[tuple[str, str]], **settings: Any) -> None:
        rows = "".join(json.dumps({"prompt": question, "answer": answer}) + "\n" for question, answer in questions)
        (self.root / f"{name}.jsonl").write_text(rows)
        settings = {"path": f"{self.root}/{name}.jsonl", "eval_fraction": 0.25, "num_eval": 60} | settings
        self.add_file("data", name, f"data.domains.{name}", {"source": "rows"} | settings)
        path = f"${{run.root}}/${{run.name}}/specialists/{name}/hf"
        self.add_file("teachers", name, f"teachers.{name}", {"path": path})

    def add_file(self, group: str, name: str, package: str, settings: dict[str, Any]) -> None:
        folder = self.root / "conf" / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.yaml").write_text(f"# @package {package}\n" + yaml.safe_dump(settings))

    def opd(
        self,
        command: str,
        run: str,
        *overrides: str,
        domains: str = "copy,next",
        runtime: str = "local",
        status: int = 0,
    ) -> Path:
        """Runs a command of this world, checks its exit status and returns the run's folder."""
        arguments = [command, "--config-dir", str(self.root / "conf"), f"run.root={self.root}/runs", f"run.name={run}"]
        arguments += [f"data=[{domains}]", f"teachers=[{domains}]", f"runtime={runtime}", *TINY, *overrides]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["opd", *arguments])
            with pytest.raises(SystemExit) as ended:
                main()
        assert ended.value.code == status
        return self.root / "runs" / run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def finished(world: World) -> Path:
    """The whole chain, run once."""
    return world.opd("quickstart", "whole")


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return read_metrics(str(folder / "metrics.jsonl"))


def teachers_at(**folders: Path) -> list[str]:
    return [f"teachers.{name}.path={folder}" for name, folder in folders.items()]


# --- the chain --------------------------------------------------------------------------------------------------------


def test_the_chain_writes_what_it_says(finished: Path) -> None:
    for name in ("config.yaml", "summary.json", "report.html", "tokenizer/tokenizer.json", "base/init/hf/config.json"):
        assert (finished / name).is_file(), name
    stages = {"base": 12, "student": 45}
    for domain in ("copy", "next"):
        stages |= {f"specialists/{domain}/sft": 30, f"specialists/{domain}/grpo": 2}
        assert (finished / "specialists" / domain / "hf").resolve() == (
            finished / "specialists" / domain / "grpo" / "checkpoints" / "step_2" / "hf"
        )
    for stage, steps in stages.items():
        folder = finished / stage
        assert (folder / "hf").resolve() == folder / "checkpoints" / f"step_{steps}" / "hf"
        state = {path.name for path in (folder / "checkpoints" / f"step_{steps}" / "state").iterdir()}
        manifest = {"teachers.json"} if stage == "student" else set[str]()
        assert state == {"learner.json", "rank_0.safetensors", "run.json"} | manifest
        lines = metrics_of(folder)
        assert [line["step"] for line in lines] == list(range(1, steps + 1))
        undescribed = {key for line in lines for key in line if "/" in key and describe(key) is None}
        assert not undescribed, f"not in CATALOGUE ({len(CATALOGUE)} keys)"
        for line in lines:
            phases = [value for key, value in line.items() if key.startswith("phase/") and key != "phase/total_seconds"]
            assert sum(phases) <= line["phase/total_seconds"] + 1e-6
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["run"]["name"] == "whole" and list(config["data"]["domains"]) == ["copy", "next"]
    assert not list(finished.rglob(".*unfinished*")) and not list(finished.rglob("*.partial"))


def test_every_checkpoint_opens_with_transformers_and_nothing_else(finished: Path) -> None:
    folders = ["base/init/hf", "base/hf", "specialists/copy/hf", "specialists/next/sft/hf", "student/hf"]
    for folder in folders:
        tokenizer: Any = AutoTokenizer.from_pretrained(finished / folder)
        model: Any = AutoModelForCausalLM.from_pretrained(finished / folder)
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": "copy c7"}], add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        with torch.no_grad():
            logits = model(ids).logits[0, -1]
        assert logits.shape == (len(tokenizer),) and torch.isfinite(logits).all()
        if folder in ("specialists/copy/hf", "student/hf"):
            assert tokenizer.decode(logits.argmax()) == "c", "the weights are the ones that were trained"
    assert len({checkpoint_hash(finished / folder) for folder in folders}) == len(folders)


def test_the_summary_has_its_shape_and_the_report_shows_it(finished: Path) -> None:
    summary = summary_of(finished)
    assert summary.keys() == {
        *("run", "seed", "finished", "domains", "mean_recovery", "eval", "seconds", "versions", "findings"),
    }
    assert (summary["run"], summary["seed"]) == ("whole", 0)
    assert summary["eval"] == {"prompts_per_domain": 60, "k": 2}
    assert summary["seconds"].keys() == {
        *("base", "sft copy", "grpo copy", "sft next", "grpo next", "distill", "evaluate"),
    }
    assert all(seconds > 0 for seconds in summary["seconds"].values())
    page = (finished / "report.html").read_text()
    for domain, row in summary["domains"].items():
        assert (
            row.keys() == {"teacher_name", "base", "teacher", "student", "recovery"} and row["teacher_name"] == domain
        )
        for model in ("base", "teacher", "student"):
            score = row[model]
            assert score.keys() == {"pass@1", "pass@k", "mean_length", "truncated_share", "verifier_errors"}
            assert f"{score['pass@1']:.3f}" in page and score["verifier_errors"] == 0
        base, teacher, student = (row[model]["pass@1"] for model in ("base", "teacher", "student"))
        assert row["recovery"] == pytest.approx((student - base) / (teacher - base))
        assert f"{row['recovery']:.2f}" in page
    for finding in summary["findings"]:
        assert finding.keys() == {"rule", "severity", "subject", "message", "step", "stage"}


def test_the_student_recovers_what_its_teachers_know(finished: Path) -> None:
    for row in summary_of(finished)["domains"].values():
        assert row["base"]["pass@1"] < 0.8
        assert row["teacher"]["pass@1"] > 0.9
        assert row["recovery"] > 0.8
    first, *_, last = metrics_of(finished / "student")
    assert last["distill/reverse_kl"] < first["distill/reverse_kl"] / 10
    assert last["gap/k3"] < 1e-3, "the sampler is the policy"
    for domain in ("copy", "next"):
        start, *_, end = metrics_of(finished / "specialists" / domain / "sft")
        assert end[f"sft/nll/{domain}"] < start[f"sft/nll/{domain}"] / 10


# --- what goes wrong is said ------------------------------------------------------------------------------------------


def test_swapped_teachers_are_found_out(world: World, finished: Path) -> None:
    copy, following = finished / "specialists" / "copy" / "hf", finished / "specialists" / "next" / "hf"
    settings = [f"model.path={finished}/base/hf", *teachers_at(copy=following, next=copy)]
    world.opd("distill", "swapped", *settings)
    folder = world.opd("evaluate", "swapped", *settings)
    summary = summary_of(folder)
    right = summary_of(finished)["domains"]
    for domain, row in summary["domains"].items():
        assert row["base"] == right[domain]["base"], "the same base"
        assert row["student"]["pass@1"] < 0.2 < 0.8 < right[domain]["student"]["pass@1"]
        assert row["recovery"] is None or row["recovery"] < 0.2
    found = {finding["subject"]: finding for finding in summary["findings"] if finding["rule"] == "recovery_collapsed"}
    assert found.keys() == {"copy", "next"}
    page = (folder / "report.html").read_text()
    for domain, finding in found.items():
        assert finding["severity"] == "error" and finding["stage"] == "evaluate"
        assert f"check teachers.{domain}.path and teachers.{domain}.domains" in finding["message"]
        assert f"Teacher {domain} seems to be the wrong teacher for domain {domain}" in page
    # The training signal itself looked well: nothing but the evaluation can tell.
    lines = metrics_of(folder / "student")
    assert lines[-1]["distill/reverse_kl"] < lines[0]["distill/reverse_kl"] / 5


def test_a_verifier_that_raises_is_a_reward_of_zero_and_is_counted(world: World, finished: Path) -> None:
    world.add_domain(
        "broken", [(f"copy {letter}{n}", letter) for letter in LETTERS for n in range(40)], verifier="number"
    )
    settings = [
        f"model.path={finished}/specialists/copy/hf",
        "stages.sft.steps=0",
        "stages.grpo.steps=2",
        "domain=broken",
    ]
    folder = world.opd("specialist", "broken", *settings, domains="broken")
    lines = metrics_of(folder / "specialists" / "broken" / "grpo")
    assert [line["reward/verifier_errors"] for line in lines] == [32, 32]
    assert all(line["reward/mean"] == line["reward/mean/broken"] == 0 for line in lines)
    assert all(line["grpo/zero_advantage_share"] == 1 for line in lines)
    findings = (folder / "specialists" / "broken" / "grpo" / "findings.jsonl").read_text()
    assert "verifier_errors" in findings
    # A step without a signal is no step: the weights are those the stage started from.
    assert checkpoint_hash(folder / "specialists" / "broken" / "hf") == checkpoint_hash(
        finished / "specialists" / "copy" / "hf"
    )


# --- distillation -----------------------------------------------------------------------------------------------------


def test_a_student_has_nothing_to_learn_from_itself(world: World, finished: Path) -> None:
    itself = finished / "base" / "hf"  # unsure enough for rounding to show
    settings = [f"model.path={itself}", *teachers_at(copy=itself, next=itself), *TEACHER_ONLY]
    settings += ["stages.distill.steps=2", "stages.distill.learning_rate=0", "stages.distill.kl_temperature=1"]
    settings += ["pool.examine=warn"]
    runs = {
        dtype: metrics_of(world.opd("distill", dtype, *settings, f"stages.distill.hidden_dtype={dtype}") / "student")
        for dtype in ("float32", "bfloat16")
    }
    # Teacher and learner run the same rows in other batches, so what is left is the rounding of a float32 product.
    for line in runs["float32"]:
        assert abs(line["distill/reverse_kl"]) < 5e-8 and abs(line["distill/kl_max/next"]) < 1e-5
        assert line["train/grad_norm"] < 5e-6
        assert line["distill/top1_agreement/copy"] == line["distill/top1_agreement/next"] == 1
    for line, exact in zip(runs["bfloat16"], runs["float32"], strict=True):
        assert 10 * abs(exact["distill/reverse_kl"]) < line["distill/reverse_kl"] < 1e-4
        assert 10 * exact["train/grad_norm"] < line["train/grad_norm"] < 0.05
        assert line["train/tokens"] == exact["train/tokens"], "the same rollouts"
    assert checkpoint_hash(world.root / "runs" / "float32" / "student" / "hf") == checkpoint_hash(itself)


def test_a_domain_added_by_files_alone(world: World, finished: Path) -> None:
    world.add_domain("again", [(f"again {letter}{n}", letter) for letter in LETTERS for n in range(40)], num_eval=30)
    settings = [
        f"model.path={finished}/base/hf",
        *teachers_at(**{name: finished / "specialists" / name / "hf" for name in ("copy", "next")}),
        *teachers_at(again=finished / "specialists" / "copy" / "hf"),
        *("stages.distill.steps=3", "stages.distill.eval_every=3"),
    ]
    world.opd("distill", "more", *settings, domains="copy,next,again")
    folder = world.opd("evaluate", "more", *settings, domains="copy,next,again")
    lines = metrics_of(folder / "student")
    for line in lines:
        for key in ("distill/reverse_kl", "reward/mean", "rollout/mean_length"):
            assert f"{key}/again" in line, key
        assert line["teacher/again/tokens"] > 0
        assert sum(line[f"teacher/{name}/token_share"] for name in ("copy", "next", "again")) == pytest.approx(1)
    assert "eval/pass_at_1/again" in lines[-1]
    summary = summary_of(folder)
    assert list(summary["domains"]) == ["copy", "next", "again"]
    assert summary["domains"]["again"]["teacher_name"] == "again"
    assert ">again<" in (folder / "report.html").read_text()


def test_stages_run_one_by_one_are_the_quickstart(world: World, finished: Path) -> None:
    """Piece by piece, with a base that is there already; the pieces' seeds are the chain's."""
    world.opd("base", "pieces")
    folder = world.opd("specialist", "pieces", "domain=next")
    for part in ("base/init/hf", "base/hf", "specialists/next/sft/hf", "specialists/next/hf"):
        assert checkpoint_hash(folder / part) == checkpoint_hash(finished / part), part
    world.opd("base", "pieces", status=2)
    world.opd("base", "pieces", "run.overwrite=true", "stages.base.steps=1", "seed=1")
    assert checkpoint_hash(folder / "base/init/hf") != checkpoint_hash(finished / "base/init/hf")
    assert len(metrics_of(folder / "base")) == 1, "nothing of the earlier one is left"


def test_routing_that_cannot_be_replayed_is_refused_at_the_start(
    world: World, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    hashed = ("rollout.routing_replay=true", "model.config.mlp_layer_types=[hash_moe,hash_moe]")
    for command in ("quickstart", "base"):
        folder = world.opd(command, "refused", *hashed, status=2)
        assert "rollout.routing_replay=true cannot work" in capsys.readouterr().err + caplog.text
        assert not folder.exists()
    # Of a base that is there it is known as soon as somebody would sample from it.
    folder = world.opd("base", "hashed", hashed[1], "stages.base.steps=1")
    for command in ("specialist", "distill", "check"):
        world.opd(command, "hashed", *hashed, *(["domain=copy"] if command == "specialist" else []), status=2)
        assert "rollout.routing_replay=true cannot work" in capsys.readouterr().err + caplog.text
    assert not (folder / "specialists").exists() and not (folder / "student").exists()


def test_a_context_below_the_probes_length_trains(world: World) -> None:
    narrow = ("model.max_tokens=14", "model.config.max_position_embeddings=14")
    steps = ("stages.base.steps=1", "stages.sft.steps=1", "stages.grpo.steps=1")
    world.opd("base", "narrow", *narrow, *steps)
    folder = world.opd("specialist", "narrow", "domain=copy", *narrow, *steps)
    assert len(metrics_of(folder / "specialists/copy/grpo")) == 1


def test_what_the_students_shape_rules_out_is_refused_at_the_start(
    world: World, finished: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not by the first worker, after hours of training, nor by the first long completion."""
    long = ("model.max_tokens=2048", "learner.micro_batch_tokens=4096")
    own = (f"model.path={finished}/base/hf",)
    for command, fields in (("quickstart", ()), ("base", ()), ("base", own), ("distill", own), ("check", own)):
        for setting, message in (
            (("rollout.cache_bytes=9",), "rollout.cache_bytes=9 is too small: num_slots=64 need "),
            (long, "model.max_tokens=2048 exceeds "),
        ):
            caplog.clear()
            folder = world.opd(command, "ruled_out", *fields, *setting, status=2)
            assert message in capsys.readouterr().err + caplog.text
            assert not folder.exists()


# --- a run that is resumed --------------------------------------------------------------------------------------------

SHORT = (
    *("stages.base.steps=4", "stages.sft.steps=4", "stages.grpo.steps=2", "stages.distill.steps=4"),
    *(f"stages.{stage}.checkpoint_every=2" for stage in ("base", "sft", "grpo", "distill")),
    *("stages.base.prompts_per_step=8", "stages.sft.prompts_per_step=8", "stages.distill.prompts_per_step=8"),
    *("pool.examine=warn", "eval.samples=0"),
)
PARTS = ("base", "specialists/copy/sft", "specialists/copy/grpo", "specialists/next/grpo", "student")


class CutShort(BaseException):
    """A kill: nothing that a run does in the face of an error is done."""


def cut_short(world: World, run: str, at: int, *overrides: str) -> None:
    """A quickstart that ends at the `at`-th step of all its stages, before it is learned from."""
    plan, left = opd.train._plan, at

    def planning(*args: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise CutShort
        return plan(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opd.train, "_plan", planning)
        patch.setattr(opd.crew.Crew, "dismiss", lambda self, runtime, failed: None)
        with pytest.raises(CutShort):
            world.opd("quickstart", run, *SHORT, *overrides)


@pytest.fixture(scope="module")
def short(world: World) -> Path:
    return world.opd("quickstart", "short", *SHORT)


@pytest.mark.parametrize("at", [15, 20, *(pytest.param(at, marks=pytest.mark.slow) for at in (1, 4, 7, 9, 16))])
def test_a_quickstart_goes_on_wherever_it_was_cut_short(
    at: int, world: World, short: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = f"cut{at}"
    cut_short(world, run, at)
    caplog.clear()
    folder = world.opd("quickstart", run, *SHORT, "resume=auto")
    if at in (15, 20):  # first step of GRPO, and the second of distillation after a checkpoint: drawn and logged
        assert caplog.text.count("tokens that an earlier run logged") == 1
    for part in PARTS:
        assert checkpoint_hash(folder / part / "hf") == checkpoint_hash(short / part / "hf"), part
        for line, expected in zip(metrics_of(folder / part), metrics_of(short / part), strict=True):
            for key in ("step", "train/loss", "train/grad_norm", "reward/mean"):
                assert line.get(key) == expected.get(key), (part, key)
    mine, theirs = summary_of(folder), summary_of(short)
    assert mine["domains"] == theirs["domains"] and mine["seconds"].keys() == theirs["seconds"].keys()
    assert (folder / "tokenizer" / "tokenizer.json").read_bytes() == (
        short / "tokenizer" / "tokenizer.json"
    ).read_bytes()
    assert not list(folder.rglob("*unfinished*")) and not list(folder.rglob("*.partial"))


def test_a_finished_run_that_is_resumed_is_evaluated_again(world: World, short: Path) -> None:
    before = {part: os.stat(short / part / "hf" / "model.safetensors").st_mtime_ns for part in PARTS}
    summary = summary_of(short)
    world.opd("quickstart", "short", *SHORT, "resume=auto")
    assert before == {part: os.stat(short / part / "hf" / "model.safetensors").st_mtime_ns for part in PARTS}
    assert summary_of(short)["domains"] == summary["domains"]


def test_single_commands_are_resumed(world: World, short: Path) -> None:
    cut_short(world, "single", 6)
    folder = world.opd("base", "single", *SHORT, "resume=auto")
    world.opd("specialist", "single", *SHORT, "domain=copy", "resume=auto")
    world.opd("specialist", "single", *SHORT, "domain=next", "resume=auto")  # which has not begun
    world.opd("distill", "single", *SHORT, "resume=auto")
    for part in PARTS:
        assert checkpoint_hash(folder / part / "hf") == checkpoint_hash(short / part / "hf"), part
    # From an earlier checkpoint the same steps are done again.
    world.opd("distill", "single", *SHORT, f"resume={folder}/student/checkpoints/step_2")
    assert checkpoint_hash(folder / "student" / "hf") == checkpoint_hash(short / "student" / "hf")
    # A stage may be made longer, and what was built on it is then no longer what it was built on.
    world.opd("base", "single", *SHORT, "stages.base.steps=6", "resume=auto")
    assert len(metrics_of(folder / "base")) == 6
    world.opd("specialist", "single", *SHORT, "domain=copy", "resume=auto", status=2)


# --- data and model families ------------------------------------------------------------------------------------------


def test_base_on_rows_in_verls_form(world: World) -> None:
    rows = [
        {
            "data_source": source,
            "prompt": [{"role": "system", "content": "Answer."}, {"role": "user", "content": f"{source} {letter}{n}"}],
            "ability": "letters",
            "reward_model": {"style": "rule", "ground_truth": letter},
            "extra_info": {"index": n},
        }
        for source in ("one", "two")
        for letter in LETTERS
        for n in range(10)
    ]
    (world.root / "verl.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("one", "two"):
        path = f"{world.root}/verl.jsonl"
        settings = {
            "source": "rows",
            "path": path,
            "eval_fraction": 0.2,
            "num_eval": 8,
            "weight": 1.0 + (name == "two"),
        }
        world.add_file("data", name, f"data.domains.{name}", settings)
        world.add_file("teachers", name, f"teachers.{name}", {"path": "/none"})
    settings = ["stages.base.steps=8", "stages.base.prompts_per_step=30", "stages.base.eval_every=4"]
    folder = world.opd("base", "verl", *settings, domains="one,two") / "base"
    lines = metrics_of(folder)
    assert lines[-1]["train/loss"] < lines[0]["train/loss"] / 2
    assert all(line["train/tokens"] == 60 for line in lines), "a letter and the end, 30 times"
    assert [line["step"] for line in lines if "eval/pass_at_1/one" in line] == [4, 8]
    record = json.loads((folder / "checkpoints" / "step_8" / "state" / "run.json").read_text())
    assert record["data"]["drawn"] == {"one": 80, "two": 160}, "by weight"


@pytest.mark.skipif(not hasattr(HubModel, "extend"), reason="HubModel cannot decode yet")
def test_a_hugging_face_student(world: World) -> None:
    texts = [f"{word} {letter}{n}" for word in ("copy", "next") for letter in LETTERS for n in range(10)]
    chat = Chat(train_tokenizer([*texts, *LETTERS], 320))
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "tie_word_embeddings": True,
    }  # fmt: skip
    # Published models pad their vocabulary beyond the tokenizer's.
    config = Qwen3Config(**shape, vocab_size=320, bos_token_id=chat.bos_id, eos_token_id=chat.eos_id, pad_token_id=1)
    assert chat.vocab_size < config.vocab_size
    Qwen3ForCausalLM(config).save_pretrained(world.root / "qwen")
    chat.save(world.root / "qwen")
    settings = [
        "model.family=hf",
        "model.fp4=none",
        "model.fp4_index=false",
        f"model.path={world.root}/qwen",
        "stages.sft.learning_rate=5e-3",
    ]
    settings += ["teachers.copy.family=hf", "teachers.next.family=hf", "stages.distill.eval_every=40"]
    settings += ["stages.distill.steps=80", "stages.distill.learning_rate=2e-3", "stages.distill.kl_temperature=1"]
    world.opd("base", "qwen", *settings, "stages.base.learning_rate=5e-3")
    for domain in ("copy", "next"):
        world.opd("specialist", "qwen", *settings, f"domain={domain}")
    world.opd("distill", "qwen", *settings)
    folder = world.opd("evaluate", "qwen", *settings)
    assert not (folder / "tokenizer").exists()
    summary = summary_of(folder)
    assert summary["mean_recovery"] is not None and summary["mean_recovery"] > 0.8
    lines = metrics_of(folder / "student")
    assert lines[-1]["gap/k3"] < 1e-3, "the engine samples from what the learner trains"
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "student" / "hf")
    assert isinstance(model, Qwen3ForCausalLM) and len(AutoTokenizer.from_pretrained(folder / "student" / "hf")) < 320


# --- runtimes ---------------------------------------------------------------------------------------------------------


@pytest.mark.ray
def test_ray_and_local_are_the_same_run(world: World, finished: Path, ray_cluster: Runtime) -> None:
    """Also with two learner ranks, two workers and two teacher hosts: only rounding may differ."""
    settings = [
        f"model.path={finished}/base/hf",
        *teachers_at(**{name: finished / "specialists" / name / "hf" for name in ("copy", "next")}),
        *("stages.distill.steps=3", "stages.distill.prompts_per_step=16", "stages.distill.eval_every=3"),
    ]
    local = metrics_of(world.opd("distill", "local", *settings) / "student")
    alone = metrics_of(world.opd("distill", "ray", *settings, runtime="ray") / "student")
    two = ["learner.num_ranks=2", "rollout.num_workers=2", "runtime.num_teacher_hosts=2"]
    pairs = metrics_of(world.opd("distill", "pairs", *settings, *two, runtime="ray") / "student")
    assert len(local) == 3
    compared = [
        key for key in local[0] if key.startswith(("train/loss", "distill/", "reward/", "rollout/", "teacher/"))
    ]
    # Which teacher of a host is asked something twice, by how it is placed.
    compared = [key for key in compared if not key.endswith(("_seconds", "/repeat_error"))]
    assert {"train/loss", "distill/reverse_kl/copy", "distill/reverse_kl/next", "rollout/tokens"} <= set(compared)
    for other in (alone, pairs):
        for expected, line in zip(local, other, strict=True):
            for key in compared:
                assert line[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-5), (key, line["step"])
        assert other[-1]["eval/pass_at_1/copy"] == pytest.approx(local[-1]["eval/pass_at_1/copy"], abs=0.02)
