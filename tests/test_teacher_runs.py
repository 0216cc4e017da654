"""Whole runs of `opd` with teachers of every kind: other widths and families, mixtures, servers that come and go.

The world is that of `tests.test_pipeline`. Teachers are never trained: they have to be followed, not to be right.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

import opd.train
from opd.__main__ import compose
from opd.chat import Chat
from opd.config import ModelConfig
from opd.model import load_model, new_v4, with_path
from opd.types import Group, TeacherHidden, Trajectory
from opd.weights import save_checkpoint
from teachers.pool import TeacherPool
from tests.test_pipeline import TEACHER_ONLY, TINY, World, metrics_of, summary_of
from tests.test_remote import SERVER, Server

FEW = ("stages.distill.steps=6", "stages.distill.prompts_per_step=16", "stages.distill.kl_temperature=1")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """With a base, and beside the runs a V4 teacher of another width, two of its own and a dense one, all unlike."""
    world = World(tmp_path_factory.mktemp("world"))
    world.opd("base", "start", "stages.base.steps=6")
    chat = Chat.load(str(start(world) / "tokenizer"))
    model = compose("base", list(TINY))[0].model
    for seed, (name, width) in enumerate({"same": 64, "other": 64, "wide": 96}.items()):
        teacher = new_v4(ModelConfig(config={**model.config, "hidden_size": width}), chat.vocab_size, 10 + seed)
        nn.init.normal_(teacher.lm_head.weight, std=0.15)  # sure enough of itself to be a teacher
        save_checkpoint(world.root / name, teacher, chat)
    for seed, (name, padding) in enumerate({"dense": 7, "served": 0}.items()):
        torch.manual_seed(seed)
        shape: dict[str, Any] = {
            "hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": False,
        }  # fmt: skip
        dense = Qwen3ForCausalLM(Qwen3Config(vocab_size=chat.vocab_size + padding, **shape))
        nn.init.normal_(dense.lm_head.weight, std=0.3)
        dense.save_pretrained(world.root / name)
        chat.save(world.root / name)
    return world


def start(world: World) -> Path:
    return world.root / "runs" / "start"


def teach(world: World, **teachers_: dict[str, Any]) -> str:
    """Writes a YAML file for each teacher; the override that chooses them."""
    for name, settings in teachers_.items():
        settings = {"path": f"{world.root}/{name}", **settings}
        world.add_file("teachers", name, f"teachers.{name}", settings)
    return f"teachers=[{','.join(teachers_)}]"


def distill(world: World, run: str, *overrides: str, command: str = "distill", **settings: Any) -> Path:
    model = f"model.path={start(world)}/base/hf"
    return world.opd(command, run, model, *FEW, *overrides, **settings)


def test_a_v4_student_learns_from_another_width_and_another_family(world: World) -> None:
    """All in one run, which `opd check` describes and `opd evaluate` judges."""
    chosen = teach(
        world,
        wide={"domains": {"copy": 1.0, "next": 0.25}},
        dense={"family": "hf", "domains": {"next": 0.75}, "residency": "disk"},
    )
    folder = distill(world, "families", chosen)
    lines = metrics_of(folder / "student")
    for name in ("wide", "dense"):
        for line in lines:
            told = {key.rpartition("/")[2]: value for key, value in line.items() if key.startswith(f"teacher/{name}/")}
            assert told.keys() >= {
                "tokens", "token_share", "score_seconds", "reverse_kl", "student_entropy", "teacher_entropy",
                "top16_overlap", "entropy_share",
            }  # fmt: skip
        assert f"teacher/{name}/load_seconds" in lines[0]
        assert lines[-1][f"teacher/{name}/reverse_kl"] < 0.9 * lines[0][f"teacher/{name}/reverse_kl"]
        assert lines[-1][f"teacher/{name}/top16_overlap"] > lines[0][f"teacher/{name}/top16_overlap"]
    for line in lines:
        assert line["distill/head_loads"] == 2
        both, in_next = line["teacher/wide/tokens"], line["teacher/dense/tokens"]
        assert both == line["train/tokens"] == line["rollout/tokens"] > in_next > 0
        wide = line["teacher/wide/reverse_kl"] * (both - in_next + 0.25 * in_next)
        dense = line["teacher/dense/reverse_kl"] * 0.75 * in_next
        assert line["train/loss"] == pytest.approx((wide + dense) / both, rel=1e-5)
    manifest = json.loads((folder / "student" / "checkpoints" / "step_6" / "state" / "teachers.json").read_text())
    assert manifest["wide"]["domains"] == {"copy": 1.0, "next": 0.25} and manifest["dense"]["family"] == "hf"
    summary = summary_of(distill(world, "families", chosen, command="evaluate"))
    assert summary["domains"]["copy"]["teacher_name"] == "wide"
    assert summary["domains"]["next"]["teacher_name"] == "dense"


def test_a_mixture_of_a_yaml_file_is_the_geometric_mean_of_its_teachers(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's first step against float64: sum_i w_i KL(p || q_i) = w KL(p || q) - w log Z, q ~ prod_i q_i^(w_i / w), in
    the loss and in the norm of its gradient."""
    weights = {
        "copy": {"same": 0.5, "other": 0.25, "dense": 0.75},
        "next": {"other": 1.0, "dense": 0.2},
    }
    chosen = teach(
        world,
        same={"domains": {"copy": 0.5}, "residency": "disk"},
        other={"domains": {"copy": 0.25, "next": 1.0}},
        dense={"domains": {"copy": 0.75, "next": 0.2}, "family": "hf"},
    )
    seen: list[Trajectory] = []
    score = TeacherPool.score

    def noting(pool: TeacherPool, groups: list[Group]) -> Any:
        seen.extend(one for group in groups for one in group.trajectories)
        return score(pool, groups)

    monkeypatch.setattr(TeacherPool, "score", noting)
    settings = (*TEACHER_ONLY, "stages.distill.steps=1", "stages.distill.hidden_dtype=float32")
    (line,) = metrics_of(distill(world, "mixture", chosen, *settings) / "student")
    assert {one.domain for one in seen} == {"copy", "next"}

    model = with_path(compose("base", list(TINY))[0].model, str(start(world) / "base" / "hf"))
    student: Any = load_model(model)
    vocab_size = len(student.head)

    def logits(model: Any, one: Trajectory) -> torch.Tensor:
        ids = torch.from_numpy(one.token_ids.astype(np.int64))
        hidden = model(ids[None], torch.tensor([len(ids)])).hidden[0]
        predicting = torch.from_numpy(one.loss_mask.nonzero()[0]) - 1
        return hidden[predicting].double() @ model.head.double()[:vocab_size].T

    judges: dict[str, Any] = {
        name: load_model(replace(model, path=str(world.root / name)))
        if name != "dense"
        else load_model(ModelConfig(family="hf", path=str(world.root / name), fp4="none"))
        for name in ("same", "other", "dense")
    }
    total = torch.zeros((), dtype=torch.float64)
    for one in seen:
        p = logits(student, one).log_softmax(-1)
        whole = sum(weights[one.domain].values())
        with torch.no_grad():
            mean = sum(w / whole * logits(judges[name], one).log_softmax(-1) for name, w in weights[one.domain].items())
        assert isinstance(mean, torch.Tensor)
        log_z = mean.logsumexp(-1, keepdim=True)
        total = total + whole * ((p.exp() * (p - (mean - log_z))).sum(-1) - log_z[:, 0]).sum()
    loss = total / sum(one.num_loss_tokens for one in seen)
    loss.backward()
    assert line["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    gradients = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
    assert line["train/grad_norm"] == pytest.approx(torch.nn.utils.get_total_norm(gradients).item(), rel=1e-4)


def test_teachers_come_go_and_change_their_weight_between_steps(
    world: World, caplog: pytest.LogCaptureFixture, capsys: Any
) -> None:
    """A run that goes on with another set: told, examined where new, and refused under an old name."""
    two, four = "stages.distill.steps=2", ("stages.distill.steps=4", "resume=auto")
    copies, nexts = {"domains": {"copy": 1.0}}, {"domains": {"next": 1.0}}
    chosen = teach(world, same=copies, dense={"family": "hf", **nexts})
    folder = distill(world, "changing", chosen, two) / "student"

    def refused(message: str, *overrides: str) -> None:
        before = (folder / "metrics.jsonl").read_text()
        capsys.readouterr()
        distill(world, "changing", *overrides, *four, status=2)
        assert message in capsys.readouterr().err
        assert (folder / "metrics.jsonl").read_text() == before

    chosen = teach(world, same={**copies, "path": f"{world.root}/other"}, dense={"family": "hf", **nexts})
    refused("teachers.same is not the teacher that this run began with: sha256", chosen)
    flat = load_model(ModelConfig(path=str(world.root / "wide"), fp4="none"))
    nn.init.zeros_(flat.lm_head.weight)  # type: ignore[union-attr]
    save_checkpoint(world.root / "flat", flat, Chat.load(str(start(world) / "tokenizer")))
    refused("teacher_uniform: teacher flat: ", teach(world, same=copies, flat=nexts))

    half = {"domains": {"copy": 0.5}}
    caplog.clear()
    distill(world, "changing", teach(world, same=half, wide={"domains": {"copy": 0.5, "next": 1.0}}), *four)
    for told in (
        "teacher wide is new",
        "teacher dense is gone",
        "teacher same had the weights {'copy': 1.0} and has {'copy': 0.5}",
        "wide: entropy ",
    ):
        assert told in caplog.text
    lines = metrics_of(folder)
    taught = [{key.split("/")[1] for key in line if key.startswith("teacher/")} for line in lines]
    assert taught == [{"same", "dense"}] * 2 + [{"same", "wide"}] * 2
    manifest = json.loads((folder / "checkpoints" / "step_4" / "state" / "teachers.json").read_text())
    assert list(manifest) == ["same", "wide"] and manifest["same"]["domains"] == {"copy": 0.5}
    chosen = teach(world, same={**half, "path": f"{world.root}/other"}, wide={"domains": {"copy": 0.5, "next": 1.0}})
    distill(world, "changing", chosen, "stages.distill.steps=5", "resume=auto", "pool.allow_changed=true")
    assert "teacher same was changed: sha256" in caplog.text and len(metrics_of(folder)) == 5


def test_a_steps_states_are_gone_before_the_next_steps_come(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = teach(world, same={"domains": {"copy": 1.0}}, wide={"domains": {"next": 1.0}, "residency": "disk"})
    step, left = opd.train._judge, []

    def judging(*args: Any) -> Any:
        gc.collect()
        alive = sum(isinstance(found, TeacherHidden) for found in gc.get_objects())
        left.append((alive, len(list((Path(args[0].run_dir) / "hidden").iterdir()))))
        return step(*args)

    monkeypatch.setattr(opd.train, "_judge", judging)
    distill(world, "gone", chosen, "stages.distill.steps=3", "pool.hidden_bytes=2000")
    assert left == [(0, 2)] * 3  # the heads, which are larger than that


# --- servers ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(world: World) -> Iterator[Server]:
    started = Server.start(SERVER, str(world.root / "served"))
    yield started
    started.stop()


FAR = ("stages.distill.loss=topk_tail_reverse_kl", "stages.distill.top_k=8")


def far(server: Server, world: World, **settings: Any) -> dict[str, Any]:
    remote = {"top_k": 8, "timeout_seconds": 10.0, "max_retries": 0, "concurrency": 4, **settings}
    return {"family": "remote", "path": f"{server.root}/v1", "tokenizer": f"{world.root}/served", "remote": remote}


def test_a_run_with_a_server_among_its_teachers(world: World, server: Server, capsys: Any) -> None:
    """`opd check` greets it, `opd distill` follows it, `opd evaluate` does without its accuracy."""
    chosen = teach(world, far={**far(server, world), "domains": {"next": 1.0}}, wide={"domains": {"copy": 1.0}})
    distill(world, "far", chosen, *FAR, command="check")
    out = capsys.readouterr().out
    assert f"far: vllm at {server.root}/v1" in out and "(1 that stay, 0 at a time of 0 on disk)" in out
    folder = distill(world, "far", chosen, *FAR)
    lines = metrics_of(folder / "student")
    assert lines[-1]["teacher/far/reverse_kl"] < lines[0]["teacher/far/reverse_kl"]
    assert lines[0]["teacher/far/score_seconds"] > 0 and "teacher/far/teacher_entropy" not in lines[0]
    assert lines[0]["teacher/far/student_entropy"] > 0 and lines[0]["distill/head_loads"] == 1
    rows = summary_of(distill(world, "far", chosen, *FAR, command="evaluate"))["domains"]
    assert rows["next"]["teacher_name"] == "far" and "teacher" not in rows["next"] and rows["next"]["recovery"] is None
    assert rows["copy"]["teacher"]["pass@1"] <= 1
    assert "far" in (folder / "report.html").read_text()


@pytest.mark.parametrize("fault", ["hang", "drip", "dies", "text", "nan", "logits", "broken"])
def test_a_server_that_fails_for_a_while_costs_a_run_nothing(
    fault: str, world: World, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No replica makes up for it and no request is tried again: the step's rollouts wait until the server is back."""
    monkeypatch.setattr("teachers.pool.PAUSE_SECONDS", 0.05)
    settings = far(server, world, timeout_seconds=0.5) | {"domains": {"next": 1.0, "copy": 0.5}}
    chosen = teach(world, far=settings, wide={"domains": {"copy": 0.5}})
    three = ("stages.distill.steps=3",)
    names = ("train/loss", "train/tokens", "rollout/tokens", "teacher/far/reverse_kl")
    if not (start(world).parent / "steady").exists():
        distill(world, "steady", chosen, *FAR, *three)
    expected = metrics_of(start(world).parent / "steady" / "student")
    step = opd.train._judge
    calls: list[int] = []

    def judging(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:  # in the middle of the run
            httpx.post(f"{server.root}/control", json={"mode": fault, "requests": 3})
        return step(*args)

    monkeypatch.setattr(opd.train, "_judge", judging)
    lines = metrics_of(distill(world, fault, chosen, *FAR, *three) / "student")
    assert [[line[name] for name in names] for line in lines] == [[line[name] for name in names] for line in expected]
    warned = [record.getMessage() for record in caplog.records if record.name == "teachers.pool"]
    assert warned and all("teacher 'far' could not score" in message for message in warned)
    assert all("the rollouts of the step wait for it" in message for message in warned)


def test_a_server_that_stays_away_ends_the_run_which_goes_on_later(
    world: World, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("teachers.pool.PAUSE_SECONDS", 0.05)
    own = Server.start(SERVER, str(world.root / "served"))
    settings = far(own, world) | {"domains": {"next": 1.0, "copy": 0.5}}
    chosen = teach(world, far=settings, wide={"domains": {"copy": 0.5}})
    four = ("stages.distill.steps=4", "stages.distill.checkpoint_every=1", "pool.patience_seconds=0.2")
    expected = metrics_of(distill(world, "there", chosen, *FAR, *four) / "student")
    step = opd.train._judge
    calls: list[int] = []

    def judging(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            own.stop()
        return step(*args)

    monkeypatch.setattr(opd.train, "_judge", judging)
    capsys.readouterr()
    distill(world, "away", chosen, *FAR, *four, status=1)
    error = capsys.readouterr().err
    told = f"opd distill: teacher 'far' could not score a question of before in 1 attempts: {own.root}/v1: ConnectError"
    assert told in error and "Traceback" not in error and "resume=auto" in error.splitlines()[-1]
    monkeypatch.setattr(opd.train, "_judge", step)
    again = Server.start(SERVER, str(world.root / "served"), own.root.rpartition(":")[2])
    try:
        lines = metrics_of(distill(world, "away", chosen, *FAR, *four, "resume=auto") / "student")
    finally:
        again.stop()
    for name in ("train/loss", "rollout/tokens", "teacher/far/reverse_kl"):
        assert [line[name] for line in lines] == [line[name] for line in expected], name
