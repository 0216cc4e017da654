"""State on disk: any stretch of any parameter comes back, whoever wrote it, and nothing incomplete is taken."""

from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path

import pytest
import torch

from opd.config import ConfigError
from opd.engine import Fragment
from opd.state import SavedState, Writer, write_description, write_rank


def write(folder: Path, cuts: list[int], num_files: int) -> torch.Tensor:
    """A parameter of 40 numbers cut at `cuts` and dealt to ranks in turn."""
    folder.mkdir()
    values = torch.randn(40, generator=torch.Generator().manual_seed(3))
    ends = [0, *cuts, 40]
    for rank in range(num_files):
        stretches = list(itertools.pairwise(ends))[rank::num_files]
        fragments = [Fragment(name="a/b.weight", key="exp_avg", start=s, value=values[s:e]) for s, e in stretches]
        write_rank(folder, rank, fragments, {"cpu": torch.full((5,), rank, dtype=torch.uint8)})
    write_description(folder, {"step": 7}, num_files)
    return values


@pytest.mark.parametrize(("cuts", "num_files"), [([], 1), ([1, 17, 18], 2), ([5, 10, 15, 39], 3)])
def test_any_stretch_is_put_together(tmp_path: Path, cuts: list[int], num_files: int) -> None:
    values = write(tmp_path / "state", cuts, num_files)
    saved = SavedState(tmp_path / "state")
    assert saved.described["step"] == 7
    for start, end in ((0, 40), (3, 3), (16, 19), (39, 40), (0, 1)):
        assert torch.equal(saved.read("a/b.weight", "exp_avg", start, end), values[start:end])
    assert [int(saved.rng(rank)["cpu"][0]) for rank in range(num_files)] == list(range(num_files))
    assert saved.rng(num_files) == {}
    for name, key, end in (("a/b.weight", "exp_avg", 41), ("a/b.weight", "exp_avg_sq", 2), ("other", "exp_avg", 2)):
        with pytest.raises(ConfigError, match=f"lacks {1 if end == 41 else 2} numbers of the optimizer's {key}"):
            saved.read(name, key, 0, end)


def test_what_is_not_whole_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"learner\.json does not exist"):
        SavedState(tmp_path)
    write(tmp_path / "state", [20], 2)
    description, second = tmp_path / "state" / "learner.json", tmp_path / "state" / "rank_1.safetensors"
    whole = second.read_bytes()
    second.write_bytes(whole[:-8])
    with pytest.raises(ConfigError, match=r"rank_1\.safetensors is not a complete safetensors file"):
        SavedState(tmp_path / "state")
    second.unlink()
    with pytest.raises(ConfigError, match=r"rank_1\.safetensors does not exist"):
        SavedState(tmp_path / "state")
    description.write_text(json.dumps({**json.loads(description.read_text()), "format": 1}))
    with pytest.raises(ConfigError, match="has format 1; this version reads and writes format 2"):
        SavedState(tmp_path / "state")
    description.write_text("{")
    with pytest.raises(ConfigError, match="is not readable as JSON"):
        SavedState(tmp_path / "state")


def test_writing_happens_meanwhile_and_its_failure_comes_out() -> None:
    writer, may_go, done = Writer(), threading.Event(), []

    def slow() -> None:
        assert may_go.wait(10)
        done.append(1)

    writer.start(slow)
    assert not done
    may_go.set()
    writer.finish()
    assert done == [1]

    def broken() -> None:
        raise OSError("no space left")

    writer.start(broken)
    with pytest.raises(OSError, match="no space left"):
        writer.finish()
    writer.finish()  # it was told once
    writer.start(broken)
    with pytest.raises(OSError, match="no space left"):
        writer.start(slow)
