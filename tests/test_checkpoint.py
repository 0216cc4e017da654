"""Checkpoints on disk: whole or not there, whenever a kill comes; which ones stay; what a rewind takes back."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import opd.checkpoint
from opd.checkpoint import RECORD, RESTARTED, Saver, newest_checkpoint, point_at, read_checkpoint, rewind
from opd.config import CheckpointConfig, ConfigError


class Killed(BaseException):
    """What follows does not happen, as after signal 9."""


def ranks(content: str = "weights", pending: list[str] | None = None) -> Callable[..., list[Any]]:
    """Two ranks that write small files; with `pending`, only once they are asked to finish."""

    def write(folder: str) -> None:
        os.makedirs(os.path.join(folder, "hf"), exist_ok=True)
        Path(folder, "hf", "model.safetensors").write_text(content)
        for rank in range(2):
            Path(folder, "state", f"rank_{rank}.safetensors").write_text(f"{content} of rank {rank}")

    def on_all_ranks(method: str, *args: Any) -> list[Any]:
        if method == "save":
            write(args[0]) if pending is None else pending.append(args[0])
        elif pending:
            write(pending.pop())
        return [None, None]

    return on_all_ranks


def record(step: int, score: float | None = None) -> dict[str, Any]:
    return {RECORD: {"step": step, "score": score}}


def save(folder: Path, *steps: int, keep: CheckpointConfig | None = None, score: float | None = None) -> None:
    with Saver(str(folder), keep or CheckpointConfig(), ranks()) as saver:
        for step in steps:
            saver.begin(step, record(step, score))
            saver.finish()


def steps_of(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").glob("step_*"))


# --- writing ----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_has_no_name_until_it_is_whole(tmp_path: Path) -> None:
    pending: list[str] = []
    with Saver(str(tmp_path), CheckpointConfig(), ranks(pending=pending)) as saver:
        saver.begin(3, record(3))
        assert pending and newest_checkpoint(str(tmp_path)) is None and not os.path.lexists(tmp_path / "hf")
        saver.finish()
    found = newest_checkpoint(str(tmp_path))
    assert found is not None and found.step == 3 and found.record == {"step": 3, "score": None}
    assert found.folder == str(tmp_path / "checkpoints" / "step_3")
    assert (tmp_path / "hf" / "model.safetensors").read_text() == "weights"
    assert os.readlink(tmp_path / "hf") == "checkpoints/step_3/hf", "relative: a run may be moved"
    files = json.loads((tmp_path / "hf" / ".." / "complete.json").read_text())["files"]
    names = {"hf/model.safetensors", "state/rank_0.safetensors", "state/rank_1.safetensors", "state/run.json"}
    assert files.keys() == names
    assert all(about["bytes"] == (tmp_path / "hf" / ".." / name).stat().st_size for name, about in files.items())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_3"]


def test_the_next_checkpoint_waits_for_the_one_before(tmp_path: Path) -> None:
    pending: list[str] = []
    with Saver(str(tmp_path), CheckpointConfig(), ranks(pending=pending)) as saver:
        saver.begin(1, record(1))
        saver.begin(2, record(2))
        assert steps_of(tmp_path) == [1]
        saver.settle()
        saver.settle()  # nothing is left to wait for
        saver.finish()
        assert steps_of(tmp_path) == [1, 2]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 4)
    with Saver(str(tmp_path), CheckpointConfig(), ranks("other")) as saver:
        saver.begin(4, record(4))
        saver.finish()
    assert (tmp_path / "hf" / "model.safetensors").read_text() == "other"
    assert read_checkpoint(str(tmp_path / "checkpoints" / "step_4")).step == 4
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_4"]


def test_what_cannot_be_written_is_said_by_the_next_call(tmp_path: Path) -> None:
    def full(method: str, *args: Any) -> list[Any]:
        if method == "finish_saving":
            raise OSError(28, "No space left on device")
        return []

    with Saver(str(tmp_path), CheckpointConfig(), full) as saver:
        saver.begin(1, record(1))
        with pytest.raises(OSError, match="No space left"):
            saver.begin(2, record(2))
    assert newest_checkpoint(str(tmp_path)) is None


CALLS = ("os.rename", "os.replace", "os.symlink", "os.unlink", "shutil.rmtree", "flush", "_sha256")


def dying_after(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """The process dies at the `calls`-th call by which the module changes the disk, inside a removal half way."""
    left = calls

    def dying(name: str) -> Callable[..., Any]:
        owner, _, function = name.rpartition(".")
        original = getattr({"os": os, "shutil": shutil}.get(owner, opd.checkpoint), function)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                if name == "shutil.rmtree" and os.path.isdir(args[0]):
                    files = sorted(path for path in Path(args[0]).rglob("*") if path.is_file())
                    files[0].unlink() if files else None
                raise Killed
            if left < 0:
                raise Killed  # the dead do nothing more
            return original(*args, **kwargs)

        return call

    for name in CALLS:
        owner = {"os": os, "shutil": shutil}.get(name.rpartition(".")[0], opd.checkpoint)
        monkeypatch.setattr(owner, name.rpartition(".")[2], dying(name))


def test_a_kill_at_any_moment_leaves_the_last_whole_one(tmp_path: Path) -> None:
    """At every call that touches the disk, while a third checkpoint is written and the first is removed for it."""
    keep = CheckpointConfig(keep_last=2)
    moments = survived = 0
    for calls in range(1, 1000):
        folder = tmp_path / str(calls)
        save(folder, 10, 20, keep=keep)
        with pytest.MonkeyPatch.context() as patch:
            dying_after(patch, calls)
            try:
                save(folder, 30, keep=keep)
                finished = True
            except Killed:
                finished = False
        found = newest_checkpoint(str(folder))
        assert found is not None and found.step in (20, 30)
        assert (folder / "hf" / "model.safetensors").is_file()
        survived += found.step == 20
        point_at(str(folder), found)
        assert os.path.realpath(folder / "hf") == f"{found.folder}/hf"
        save(folder, 40, keep=keep)  # and the next run is not bothered by what lies there
        assert steps_of(folder) == [found.step, 40] and len(list((folder / "checkpoints").iterdir())) == 2
        if finished:
            assert found.step == 30
            break
        moments += 1
    assert moments > 15 and 5 < survived < moments


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "complete.json").unlink(), "not a complete checkpoint: it has no complete.json"),
        (lambda folder: (folder / "complete.json").write_text('{"format": 99}'), "has format 99; this version reads 1"),
        (lambda folder: (folder / "complete.json").write_text("{"), "complete.json cannot be read"),
        (lambda folder: (folder / "state" / "rank_1.safetensors").unlink(), "rank_1.safetensors has None bytes"),
        (lambda folder: (folder / "hf" / "model.safetensors").write_text("weight"), "has 6 bytes, and 7 were written"),
        (lambda folder: (folder / "hf" / "model.safetensors").write_text("Weights"), "not what was written"),
    ],
)
def test_a_damaged_one_is_passed_over_with_a_warning(
    damage: Callable[[Path], Any], message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1, 2)
    damage(tmp_path / "checkpoints" / "step_2")
    with pytest.raises(ConfigError, match=message):
        read_checkpoint(str(tmp_path / "checkpoints" / "step_2"))
    with caplog.at_level(logging.WARNING):
        found = newest_checkpoint(str(tmp_path))
    assert found is not None and found.step == 1
    assert message in caplog.text and "passed over" in caplog.text


def test_contents_may_be_taken_on_trust(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "hf" / "model.safetensors").write_text("Weights")
    assert newest_checkpoint(str(tmp_path), contents=False) is not None
    assert newest_checkpoint(str(tmp_path)) is None


def test_a_folder_without_checkpoints(tmp_path: Path) -> None:
    assert newest_checkpoint(str(tmp_path / "nowhere")) is None
    with pytest.raises(ConfigError, match="not a complete checkpoint"):
        read_checkpoint(str(tmp_path))


# --- which ones stay --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_the_last_and_the_best_are_kept(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    keep = CheckpointConfig(keep_last=rng.randint(1, 3), keep_best=rng.randint(0, 2))
    scores: dict[int, float | None] = {}
    present: set[int] = set()
    for step in range(1, 11):
        scores[step] = rng.choice([None, rng.randint(0, 3) / 4])  # with ties, of which the later one counts
        save(tmp_path, step, keep=keep, score=scores[step])
        present.add(step)
        ranked = sorted((s for s in present if scores[s] is not None), key=lambda s: (scores[s] or 0.0, s))[::-1]
        best = ranked[: keep.keep_best]
        present = set(sorted(present)[-keep.keep_last :]) | set(best)
        assert set(steps_of(tmp_path)) == present
        assert os.path.realpath(tmp_path / "hf") == str(tmp_path / "checkpoints" / f"step_{step}" / "hf")
        if best:
            assert os.path.realpath(tmp_path / "best") == str(tmp_path / "checkpoints" / f"step_{best[0]}" / "hf")
        else:
            assert keep.keep_best == 0 or not ranked


# --- rewinding --------------------------------------------------------------------------------------------------------


def test_a_rewind_takes_back_what_came_after(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 2, 4)
    metrics = [json.dumps({"step": step, "train/loss": 0.1 * step}) + "\n" for step in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(metrics) + '{"step": 6, "tra')
    findings = [{"rule": "spike", "step": 1}, {"rule": "spike", "step": 3}, {"rule": RESTARTED, "step": 4}]
    (tmp_path / "findings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in findings))
    with caplog.at_level(logging.WARNING):
        rewind(str(tmp_path), 2)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(metrics[:2])
    kept = [json.loads(line) for line in (tmp_path / "findings.jsonl").read_text().splitlines()]
    assert kept == [findings[0], findings[2]], "a restart stays on record"
    assert steps_of(tmp_path) == [2] and "step_4 is removed" in caplog.text
    rewind(str(tmp_path / "nothing"), 0)
