"""The store of hidden states: whatever lies where, readers get the same bits, and files come and go with their use."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from opd.types import WeightSnapshot
from teachers.store import HiddenStore, Spilled
from tests.test_teachers import MemoryStore


def tensors(seed: int = 0) -> list[torch.Tensor]:
    """Some of bfloat16 and some of float32, an empty one among them; 96 to 384 bytes."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(3 + index, 16, generator=generator) for index in range(4)]
    return [*made[:2], *(tensor.bfloat16() for tensor in made[2:]), torch.empty(0, 16)]


@pytest.mark.parametrize("budget", [None, 0, 100, 300, 500, 10**6])
def test_no_bit_depends_on_where_a_tensor_lies(budget: int | None, tmp_path: Path) -> None:
    inner = MemoryStore()
    store = HiddenStore(inner, str(tmp_path / "spill"), budget)
    values = tensors()
    handles = [store.put(value, f"t on {index}") for index, value in enumerate(values)]
    in_memory = sum(value.numel() * value.element_size() for value in inner.values)
    assert budget is None or in_memory <= budget
    spilled = [handle for handle in handles if isinstance(handle, Spilled)]
    assert len(spilled) + len(inner.values) == len(values) and bool(spilled) == (budget in (0, 100, 300, 500))
    reader = HiddenStore(inner, str(tmp_path / "spill"))  # of another process, which has no budget to keep
    for handle, value in zip(handles, values, strict=True):
        found = reader.get(copy.deepcopy(handle))
        assert found.dtype == value.dtype and torch.equal(found, value) and found.data_ptr() % 64 == 0


def test_the_budget_is_of_one_step(tmp_path: Path) -> None:
    store = HiddenStore(MemoryStore(), str(tmp_path), 200)
    row = torch.zeros(48)  # 192 bytes
    assert [isinstance(store.put(row), Spilled) for _ in range(3)] == [False, True, True]
    store.start_over()
    assert not isinstance(store.put(row), Spilled) and isinstance(store.put(row), Spilled)
    assert isinstance(HiddenStore(MemoryStore(), str(tmp_path)).put(row, on_disk=True), Spilled)
    assert not isinstance(HiddenStore(MemoryStore()).put(row, on_disk=True), Spilled)  # there is no folder
    with pytest.raises(ValueError, match="memory_bytes=5 needs a folder"):
        HiddenStore(MemoryStore(), None, 5)


def test_what_was_used_is_deleted_and_nothing_else(tmp_path: Path) -> None:
    store = HiddenStore(MemoryStore(), str(tmp_path / "spill"), 0)
    first, second = store.put(torch.ones(4), "t on 1"), store.put(torch.ones(4), "t on 2")
    (tmp_path / "spill" / "notes.txt").write_text("mine")
    held = store.get(first)
    for _ in range(2):
        store.free(first)
    assert torch.equal(held, torch.ones(4))  # who read it may go on using it
    assert torch.equal(store.get(second), torch.ones(4))
    with pytest.raises(ValueError, match="t on 1 is not to be read from"):
        store.get(first)
    store.clear()
    assert [path.name for path in (tmp_path / "spill").iterdir()] == ["notes.txt"]
    HiddenStore(MemoryStore(), str(tmp_path / "never_made")).clear()


def test_a_file_is_known_by_its_key(tmp_path: Path) -> None:
    store = HiddenStore(MemoryStore(), str(tmp_path), 0)
    one, two = store.put(torch.ones(4), "t on 1"), store.put(torch.zeros(4), "t on 2")
    assert isinstance(one, Spilled) and isinstance(two, Spilled)
    content = Path(one.path).read_bytes()
    Path(one.path).write_bytes(Path(two.path).read_bytes())
    with pytest.raises(ValueError, match=r"holds 't on 2', it was written for 't on 1'"):
        store.get(one)
    Path(two.path).write_bytes(content[:-3])
    with pytest.raises(ValueError, match="t on 2 is not to be read from"):
        store.get(two)


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = HiddenStore(MemoryStore(), str(tmp_path / "file" / "spill"), 0)
    with pytest.raises(RuntimeError, match=r"t on 1 of 16 bytes cannot be written to .*spill"):
        store.put(torch.ones(4), "t on 1")


def test_other_values_are_the_inner_stores_business(tmp_path: Path) -> None:
    inner = MemoryStore()
    store = HiddenStore(inner, str(tmp_path), 0)
    snapshot = WeightSnapshot(policy_version=3)
    handle = store.put(snapshot)
    assert handle == 0 and store.get(handle) is snapshot
    store.free(handle)
    assert store.get(handle) is snapshot and not list(tmp_path.iterdir())
