"""A checkpoint's files: all ways of reading them agree, and any change of them shows."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from opd.config import ConfigError
from opd.stored import file_marks, read_whole, same_files, stored_shapes, stored_tensors
from opd.weights import checkpoint_hash
from tests.test_weights import assert_same, model, saved

__all__ = ["model", "saved"]  # fixtures


def sharded(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Two shards and their index."""
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / shard, metadata={"format": "pt"})
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("is_sharded", [False, True])
def test_all_ways_of_reading_give_the_same_bits(saved: Path, tmp_path: Path, is_sharded: bool) -> None:
    tensors = load_file(saved / "model.safetensors")
    tensors |= {"half": torch.randn(3, 5).bfloat16(), "odd": torch.randn(7).half(), "none": torch.empty(0, 4)}
    shutil.copy(saved / "config.json", tmp_path)
    if is_sharded:
        sharded(tmp_path, tensors)
    else:
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    whole = read_whole(tmp_path)
    assert_same(whole, tensors)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in whole.values())
    assert_same(dict(stored_tensors(tmp_path)), tensors)
    some = set(sorted(tensors)[:5])
    assert_same(dict(stored_tensors(tmp_path, some)), {name: tensors[name] for name in some})
    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}
    shapes = {name: (names[dtype], shape) for name, (dtype, shape) in stored_shapes(tmp_path).items()}
    assert shapes == {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    before = (tmp_path / "b.safetensors" if is_sharded else tmp_path / "model.safetensors").read_bytes()
    for tensor in whole.values():
        tensor.zero_()  # it is the reader's own
    assert (tmp_path / "b.safetensors" if is_sharded else tmp_path / "model.safetensors").read_bytes() == before


def test_what_is_torn_is_not_read_whole(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "cut")
    size = os.path.getsize(saved / "model.safetensors")
    for length in (size - 1, 1000, 20, 3):
        os.truncate(tmp_path / "cut" / "model.safetensors", length)
        with pytest.raises(ConfigError, match=r"cut/model.safetensors is not a complete safetensors file"):
            read_whole(tmp_path / "cut")


def test_marks_change_with_every_change_of_a_file_and_with_nothing_else(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "one")
    path = tmp_path / "one" / "model.safetensors"
    marks, stamps, content = file_marks(tmp_path / "one"), path.stat(), path.read_bytes()
    load_file(path)
    checkpoint_hash(tmp_path / "one")
    (tmp_path / "one" / "notes.txt").write_text("of no matter")
    assert file_marks(tmp_path / "one") == marks and same_files(marks)

    def rewrite() -> None:
        path.write_bytes(content)

    def replace() -> None:
        shutil.copy2(path, tmp_path / "new")
        os.replace(tmp_path / "new", path)

    for change in (rewrite, replace):
        before = file_marks(tmp_path / "one")
        change()
        os.utime(path, ns=(stamps.st_atime_ns, stamps.st_mtime_ns))
        assert file_marks(tmp_path / "one") != before and not same_files(before)
    path.unlink()
    assert not same_files(marks)
