"""Who may teach: teachers that cannot be right are named before the run, and none is exchanged behind its name."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from opd.chat import Chat, train_tokenizer
from opd.config import ConfigError, PoolConfig, TeacherConfig
from opd.health import Health, check_teacher
from opd.weights import save_checkpoint
from teachers.admission import admit, check_teachers, compare_manifests, manifest
from teachers.pool import TeacherPool
from tests.test_teachers import TRAJECTORIES, InProcess, MemoryStore, host_of, v4


def trained(seed: int) -> Any:
    """A model that is sure enough of itself to be more than noise."""
    model = v4(seed)
    nn.init.normal_(model.lm_head.weight, std=0.3)
    return model


def nan(model: Any) -> None:
    model.model.layers[1].attn_hc.base.data[0] = torch.nan


def uniform(model: Any) -> None:
    model.lm_head.weight.data.mul_(1e-3)


def certain(model: Any) -> None:
    model.lm_head.weight.data.mul_(1e5)


def far(model: Any) -> None:
    model.lm_head.weight.data.mul_(20.0)


PLANTED: dict[str, Callable[[Any], None]] = {
    "teacher_not_finite": nan,
    "teacher_uniform": uniform,
    "teacher_certain": certain,
    "teacher_out_of_range": far,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("teachers")
    for seed, name in enumerate(("student", "good")):
        save_checkpoint(root / name, trained(seed), None)
    for name, breaks in PLANTED.items():
        model = trained(7)
        breaks(model)
        save_checkpoint(root / name, model, None)
    return root


def pool_of(folder: Path, names: list[str], **settings: Any) -> tuple[TeacherPool, Any]:
    """Teachers of these folders, each of all domains."""
    teachers = {name: TeacherConfig(path=str(folder / name), residency="disk", **settings) for name in names}
    host = host_of(teachers, MemoryStore())
    routes = {"a": tuple((name, 1.0) for name in names)}
    return TeacherPool([InProcess("0", host)], routes, dict.fromkeys(names, 0)), host


def student(folder: Path) -> TeacherConfig:
    return TeacherConfig(path=str(folder / "student"))


def test_good_teachers_are_let_in_with_their_numbers(folder: Path) -> None:
    pool, host = pool_of(folder, ["good"])
    (line,) = admit(pool, PoolConfig(), TRAJECTORIES, student(folder))
    assert line.startswith("good: entropy ") and "KL(student || teacher)" in line
    assert host._shelf.bytes_in_memory() == 0
    numbers = pool.examine(TRAJECTORIES, student(folder))["good"]
    assert numbers["repeat_error"] == 0.0 and 0 < numbers["kl"] <= numbers["distance"]
    alone = pool.examine(TRAJECTORIES)["good"]
    assert alone == {name: value for name, value in numbers.items() if name not in ("kl", "distance")}


@pytest.mark.parametrize("rule", PLANTED)
def test_a_teacher_that_cannot_be_right_is_named_and_the_run_does_not_start(
    rule: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pool, _ = pool_of(folder, ["good", rule])
    with pytest.raises(ConfigError, match=rf"(?s)cannot be right.*{rule}: teacher {rule}: ") as caught:
        admit(pool, PoolConfig(), TRAJECTORIES, student(folder))
    assert "teacher good" not in str(caught.value)
    with caplog.at_level(logging.WARNING):
        assert len(admit(pool, PoolConfig(examine="warn"), TRAJECTORIES, student(folder))) == 2
    assert f"{rule}: teacher {rule}:" in caplog.text
    assert admit(pool, PoolConfig(examine="off"), TRAJECTORIES, student(folder)) == []


def test_the_student_itself_is_no_teacher(folder: Path) -> None:
    pool, _ = pool_of(folder, ["good", "student"])
    with pytest.raises(ConfigError, match=r"teacher_is_student: teacher student: .*check its path"):
        admit(pool, PoolConfig(), TRAJECTORIES, student(folder))


def test_a_teacher_that_does_not_repeat_itself_is_named(folder: Path) -> None:
    pool, host = pool_of(folder, ["good"])
    turn = host._shelf.turn

    def noisy(*args: Any) -> Any:
        model = turn(*args)
        model.model.norm.register_forward_hook(lambda module, inputs, output: output + torch.randn_like(output))
        return model

    host._shelf.turn = noisy
    with pytest.raises(ConfigError, match=r"teacher_not_repeatable: teacher good: .*drawn at random"):
        admit(pool, PoolConfig(), TRAJECTORIES)


@pytest.mark.parametrize("precision", ["fp8", "fp4"])
def test_what_a_precision_costs_is_measured(precision: str, folder: Path) -> None:
    pool, _ = pool_of(folder, ["good"], precision=precision)
    (line,) = admit(pool, PoolConfig(), TRAJECTORIES, student(folder))
    assert "KL from itself in BF16" in line
    costs = pool.examine(TRAJECTORIES)["good"]["precision_kl"]
    assert 1e-6 < costs < 0.1


def test_rules_fire_on_what_they_name_and_on_nothing_else() -> None:
    good = {"finite": 1.0, "repeat_error": 0.0, "entropy": 1.0, "entropy_share": 0.3, "kl": 0.5, "distance": 2.0}
    assert check_teacher("t", good) == [] == check_teacher("t", {})
    for rule, changes in {
        "teacher_not_finite": {"finite": 0.0},
        "teacher_not_repeatable": {"repeat_error": 0.03},
        "teacher_uniform": {"entropy_share": 0.99},
        "teacher_certain": {"entropy": 1e-5},
        "teacher_is_student": {"distance": 0.0},
        "teacher_out_of_range": {"kl": 11.0},
    }.items():
        (finding,) = check_teacher("t", {**good, **changes})
        assert (finding.rule, finding.subject, finding.severity) == (rule, "t", "error")
    assert check_teacher("t", {"distance": 5e-4})[0].rule == "teacher_is_student"  # of a remote one


def test_a_run_is_watched_by_the_same_rules() -> None:
    health = Health()
    healthy = {"teacher/a/b/reverse_kl": 0.3, "teacher/a/b/entropy_share": 0.4, "teacher/a/b/tokens": 9.0}
    assert health.check(1, healthy) == []
    (finding,) = health.check(2, healthy | {"teacher/a/b/entropy_share": 0.995})
    assert (finding.rule, finding.subject) == ("teacher_uniform", "a/b")
    assert health.check(3, healthy | {"teacher/a/b/reverse_kl": 1e-8}) == []  # it has been learnt
    assert [f.rule for f in Health().check(1, {"teacher/t/reverse_kl": 1e-8})] == ["teacher_is_student"]
    assert [f.rule for f in Health().check(1, {"teacher/t/repeat_error": 0.5})] == ["teacher_not_repeatable"]


# --- vocabulary and tokenizer -----------------------------------------------------------------------------------------


def test_a_padded_vocabulary_is_cut_and_a_short_one_refused(tmp_path: Path) -> None:
    chat = Chat(train_tokenizer(["how much is one and one"], 290))
    entries = chat.vocab_size
    for rows in (entries, entries + 30, entries - 1):
        config = Qwen3Config(
            vocab_size=rows, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16,
        )  # fmt: skip
        Qwen3ForCausalLM(config).save_pretrained(tmp_path / str(rows))
        chat.save(tmp_path / str(rows))

    def check(rows: int, student_rows: int = entries, **settings: Any) -> list[str]:
        teacher = TeacherConfig(path=str(tmp_path / str(rows)), family="hf", **settings)
        return check_teachers(chat, student_rows, {"t": teacher})

    assert f"vocabulary {entries}," in check(entries)[0]
    assert f"vocabulary {entries} of {entries + 30} padded," in check(entries + 30)[0]
    assert check(entries, student_rows=entries + 64)
    assert "qwen3 in fp8" in check(entries, precision="fp8")[0]
    with pytest.raises(ConfigError, match=rf"its vocabulary has {entries - 1} entries, the .* has {entries}"):
        check(entries - 1)
    with pytest.raises(ConfigError, match=rf"the student's output head has {entries - 1} rows"):
        check(entries, student_rows=entries - 1)
    assert check(entries, effort="high")
    chat.tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    plain = Chat(chat.tokenizer)
    plain.save(tmp_path / str(entries))
    with pytest.raises(ConfigError, match=r"teachers\.t\.effort=high is not known to its chat template; it has: none"):
        check_teachers(
            plain, entries, {"t": TeacherConfig(path=str(tmp_path / str(entries)), family="hf", effort="high")}
        )


# --- manifests --------------------------------------------------------------------------------------------------------


def test_a_manifest_survives_json_and_names_content(folder: Path, tmp_path: Path) -> None:
    teachers = {"b": TeacherConfig(path=str(folder / "good"), domains={"a": 0.5}), "a": student(folder)}
    made = manifest(teachers)
    assert json.loads(json.dumps(made)) == made and list(made) == ["a", "b"]
    assert made["a"]["domains"] == {"a": 1.0} and made["a"]["sha256"] != made["b"]["sha256"]
    shutil.copytree(folder / "good", tmp_path / "moved")
    moved = manifest({**teachers, "b": TeacherConfig(path=str(tmp_path / "moved"), domains={"a": 0.5})})
    assert moved["b"]["source"] != made["b"]["source"] and moved["b"]["sha256"] == made["b"]["sha256"]
    assert compare_manifests(made, moved, False) == [] == compare_manifests(made, made, False)


def test_other_weights_under_an_old_name_are_refused(folder: Path) -> None:
    def of(**paths: str) -> Any:
        return manifest({name: TeacherConfig(path=str(folder / path)) for name, path in paths.items()})

    old = of(one="good", two="student")
    with pytest.raises(
        ConfigError, match=r"teachers\.one is not the teacher that this run began with: sha256 .*allow_"
    ):
        compare_manifests(old, of(one="student", two="student"), False)
    (line,) = compare_manifests(old, of(one="student", two="student"), True)
    assert line.startswith("teacher one was changed: sha256")
    assert compare_manifests(old, of(one="good", three="student"), False) == [
        "teacher three is new",
        "teacher two is gone",
    ]
    packed = manifest({"one": TeacherConfig(path=str(folder / "good"), precision="fp8"), "two": student(folder)})
    with pytest.raises(ConfigError, match="precision None -> fp8"):
        compare_manifests(old, packed, False)
    weighed = manifest({"one": TeacherConfig(path=str(folder / "good"), domains={"d": 2.0}), "two": student(folder)})
    (line,) = compare_manifests(old, weighed, False)
    assert line == "teacher one had the weights {'one': 1.0} and has {'d': 2.0}"


def test_a_remote_teacher_is_known_by_where_it_is() -> None:
    def far(url: str) -> Any:
        return manifest({"far": TeacherConfig(path=url, family="remote", tokenizer="x")})

    assert far("http://a:1/v1")["far"]["sha256"] is None
    assert compare_manifests(far("http://a:1/v1"), far("http://a:1/v1"), False) == []
    with pytest.raises(ConfigError, match="source http://a:1/v1 -> http://b:1/v1"):
        compare_manifests(far("http://a:1/v1"), far("http://b:1/v1"), False)
