"""The shelf: the right weights at each turn, read ahead, within their bound, from the files they were loaded from."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from opd.config import ConfigError, ModelConfig, TeacherConfig
from opd.model import load_model
from opd.weights import save_checkpoint
from teachers.shelf import Checkpoint, Shelf, checkpoint_of
from tests.test_teachers import VOCAB, v4

IDS = torch.arange(24).view(2, 12) * 7 % VOCAB
LENGTHS = torch.tensor([12, 5])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four V4 checkpoints of one architecture, one of them in the released layout, and two Qwen3 ones."""
    root = tmp_path_factory.mktemp("checkpoints")
    for seed, name in enumerate(("a", "b", "c", "released")):
        save_checkpoint(root / name, v4(seed), None)
    weights = load_file(root / "released" / "model.safetensors")
    for name in [name for name in weights if name.endswith((".gate_up_proj", ".down_proj"))]:
        stack, prefix = weights.pop(name), name.rpartition(".")[0]
        for expert, matrix in enumerate(stack):
            parts = [("w2", matrix)] if name.endswith("down_proj") else zip(("w1", "w3"), matrix.chunk(2), strict=True)
            for part, value in parts:
                weights[f"{prefix}.{expert}.{part}.weight"] = value.contiguous()
    save_file(weights, root / "released" / "model.safetensors")
    for seed, name in enumerate(("p", "q")):
        config = Qwen3Config(
            vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, tie_word_embeddings=True,
        )  # fmt: skip
        torch.manual_seed(seed)
        Qwen3ForCausalLM(config).save_pretrained(root / name)
    return root


def teachers_of(folder: Path, names: str | list[str], **settings: Any) -> dict[str, TeacherConfig]:
    return {
        name: TeacherConfig(path=str(folder / name), family="hf" if name in "pq" else "deepseek_v4", **settings)
        for name in names
    }


@pytest.fixture
def shelf_of() -> Iterator[Any]:
    opened: list[Shelf] = []

    def make(teachers: dict[str, TeacherConfig], **settings: Any) -> Shelf:
        defaults: dict[str, Any] = {"fp4": "none", "fp4_index": False, "device": torch.device("cpu")}
        opened.append(Shelf(teachers, **{**defaults, **settings}))
        return opened[-1]

    yield make
    for shelf in opened:
        shelf.close()


def states(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, LENGTHS).hidden[0] @ model.head.T


def expected(folder: Path, name: str) -> torch.Tensor:
    family = "hf" if name in "pq" else "deepseek_v4"
    return states(load_model(ModelConfig(family=family, path=str(folder / name), fp4="none")))


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("residency", ["device", "host", "disk"])
def test_each_turn_has_its_own_weights_bit_for_bit(residency: str, prefetch: bool, folder: Path, shelf_of: Any) -> None:
    names = ["a", "b", "c", "released", "p", "q"]
    teachers = teachers_of(folder, names, residency=residency)
    shelf = shelf_of(teachers, prefetch=prefetch)
    wanted = {name: expected(folder, name) for name in names}
    order = torch.randperm(24, generator=torch.Generator().manual_seed(5)).tolist()
    visits = [names[number % len(names)] for number in order]
    for visit, then in zip(visits, [*visits[1:], None], strict=True):
        model = shelf.turn(checkpoint_of(teachers[visit]), None if then is None else checkpoint_of(teachers[then]))
        assert torch.equal(states(model), wanted[visit])
    shells = {id(known.shell) for known in shelf._known.values()}
    assert len(shells) == 2 and len(shelf._known) == len(names)
    assert [known.by_name for known in shelf._known.values()].count(False) == 1  # the released layout


def test_the_next_teacher_is_read_while_the_present_one_works(
    folder: Path, shelf_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    teachers = teachers_of(folder, "abc", residency="disk")
    a, b, c = (checkpoint_of(teacher) for teacher in teachers.values())
    shelf = shelf_of(teachers)
    for checkpoint in (a, b, c):
        shelf.turn(checkpoint)
    started, threads = threading.Event(), []
    read = Shelf._read

    def watched(self: Shelf, checkpoint: Checkpoint) -> Any:
        threads.append(threading.current_thread().name)
        started.set()
        return read(self, checkpoint)

    monkeypatch.setattr(Shelf, "_read", watched)
    model = shelf.turn(a, b)
    assert started.wait(10) and shelf._ahead is not None and shelf._ahead[0] == b
    wanted = expected(folder, "a")
    assert torch.equal(states(model), wanted)
    shelf._ahead[1].result()
    assert torch.equal(states(model), wanted)  # the shell's own weights are as they were
    assert torch.equal(states(shelf.turn(b, c)), expected(folder, "b"))
    assert len(threads) == 3 and threads[0] == "MainThread" and set(threads[1:]) == {"teacher weights_0"}
    assert torch.equal(states(shelf.turn(a, b)), wanted)  # announced was c: it is dropped
    shelf.release()
    assert shelf.bytes_in_memory() == 0 and shelf._ahead is None


def test_no_more_than_the_bound_is_ever_held(folder: Path, shelf_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = teachers_of(folder, "abc", residency="disk")
    probe = shelf_of(plain)
    probe.turn(checkpoint_of(plain["a"]))
    one = probe.bytes_in_memory()
    assert one == sum(t.numel() * t.element_size() for t in v4(0).state_dict().values())
    largest = 0
    read = Shelf._read

    def weighed(self: Shelf, checkpoint: Checkpoint) -> Any:
        nonlocal largest
        present = [] if self._present is None else [self._present[0]]
        largest = max(largest, len({*self._kept, *present, checkpoint}))
        return read(self, checkpoint)

    monkeypatch.setattr(Shelf, "_read", weighed)
    mixed = {**teachers_of(folder, "a", residency="host"), **teachers_of(folder, "bc", residency="disk")}
    for teachers, bound, seen in ((plain, 1, 1), (plain, 2, 2), (mixed, 2, 2), (mixed, 3, 3)):
        largest = 0
        shelf = shelf_of(teachers, weight_bytes=bound * one)
        for visit, then in zip("abcabcab", "bcabcabc", strict=True):
            shelf.turn(checkpoint_of(teachers[visit]), checkpoint_of(teachers[then]))
            assert shelf.bytes_in_memory() <= bound * one
            if shelf._ahead is not None:
                shelf._ahead[1].result()
        assert largest == seen
    for teachers, bound in ((plain, one - 1), (mixed, 2 * one - 1)):
        with pytest.raises(
            ConfigError, match=rf"pool\.weight_bytes={bound} is too small: teachers\.\w takes {one} byt"
        ):
            shelf_of(teachers, weight_bytes=bound)
    packed = teachers_of(folder, "a", residency="host", precision="fp8")
    with pytest.raises(ConfigError, match=rf"teachers\.a takes {one} bytes while it is loaded, .*raise it to {one}"):
        shelf_of(packed, weight_bytes=one - 1)
    shelf_of(packed, weight_bytes=one).turn(checkpoint_of(packed["a"]))


@pytest.mark.parametrize("how", ["replaced", "written to", "cut", "removed", "linked"])
def test_a_teacher_whose_files_were_swapped_is_named(how: str, folder: Path, tmp_path: Path, shelf_of: Any) -> None:
    for name in ("one", "two"):
        shutil.copytree(folder / ("a" if name == "one" else "b"), tmp_path / name)
    teachers = {name: TeacherConfig(path=str(tmp_path / name), residency="disk") for name in ("one", "two")}
    one, two = (checkpoint_of(teacher) for teacher in teachers.values())
    shelf = shelf_of(teachers)
    shelf.turn(one)
    shelf.turn(two)
    mine, other = tmp_path / "one" / "model.safetensors", tmp_path / "two" / "model.safetensors"
    stamps = mine.stat()
    match how:
        case "replaced":
            shutil.copy(other, tmp_path / "new")
            os.utime(tmp_path / "new", ns=(stamps.st_atime_ns, stamps.st_mtime_ns))
            os.replace(tmp_path / "new", mine)
        case "written to":
            with open(mine, "r+b") as file:
                file.write(other.read_bytes())
            os.utime(mine, ns=(stamps.st_atime_ns, stamps.st_mtime_ns))
        case "cut":
            os.truncate(mine, 1000)
        case "removed":
            mine.unlink()
        case _:
            mine.unlink()
            mine.symlink_to(other)
    for announced in (False, True):
        shelf.turn(two, one if announced else None)
        with pytest.raises(ValueError, match=r"teachers\.one\.path=.*one: the weight files in .* are not the ones"):
            shelf.turn(one)
    assert torch.equal(states(shelf.turn(two)), expected(folder, "b"))  # the others do not suffer


@pytest.mark.parametrize("precision", [None, "fp32", "bf16", "fp8", "fp4"])
def test_what_is_read_again_lies_as_what_was_loaded_first(precision: str | None, folder: Path, shelf_of: Any) -> None:
    """Bit for bit the same weights, aligned the same: products of others are rounded otherwise on some machines."""
    teacher = TeacherConfig(path=str(folder / "a"), residency="disk", precision=precision)
    checkpoint = checkpoint_of(teacher)
    shelf = shelf_of({"t": teacher}, fp4="experts")
    shelf.turn(checkpoint)
    first, again = shelf._present[1], shelf._read(checkpoint)
    assert first.keys() == again.keys()
    for name, entry in first.items():
        pairs = [(entry, again[name])]
        if isinstance(entry, torch.nn.Module):
            pairs = list(zip(entry.buffers(), again[name].buffers(), strict=True))
        for one, other in pairs:
            assert torch.equal(one, other) and one.dtype == other.dtype
            assert one.data_ptr() % 64 == other.data_ptr() % 64 == 0


def test_links_are_the_folder_they_lead_to(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder / "a")
    linked, plain = TeacherConfig(path=str(tmp_path / "link")), TeacherConfig(path=str(folder / "a"))
    assert checkpoint_of(linked) == checkpoint_of(plain)
    assert checkpoint_of(TeacherConfig(path="org/name", family="hf", revision="x")) == ("hf", "org/name", "x", None)
    assert checkpoint_of(TeacherConfig(path=str(folder / "a"), precision="fp8")) != checkpoint_of(plain)


def test_precisions_of_one_checkpoint_are_loaded_apart(folder: Path, shelf_of: Any) -> None:
    teachers = {
        p: TeacherConfig(path=str(folder / "a"), residency="disk", precision=p) for p in ("fp32", "fp8", "bf16")
    }
    shelf = shelf_of(teachers)
    logits = {}
    for _ in range(2):
        for name, teacher in teachers.items():
            found = states(shelf.turn(checkpoint_of(teacher))).float()
            assert name not in logits or torch.equal(logits[name], found)
            logits[name] = found
    assert torch.equal(logits["fp32"], expected(folder, "a"))
    assert 0 < (logits["bf16"] - logits["fp32"]).abs().max() < 0.2 * logits["fp32"].abs().max()
    assert 0 < (logits["fp8"] - logits["fp32"]).abs().max() < 0.5 * logits["fp32"].abs().max()


def test_a_checkpoint_that_does_not_load_is_named(tmp_path: Path, folder: Path, shelf_of: Any) -> None:
    shutil.copytree(folder / "a", tmp_path / "a")
    os.truncate(tmp_path / "a" / "model.safetensors", 5000)
    teachers = {"bad": TeacherConfig(path=str(tmp_path / "a")), "good": TeacherConfig(path=str(folder / "b"))}
    shelf = shelf_of(teachers)
    with pytest.raises(ConfigError, match=r"teachers\.bad\.path=.*/a: .* not a complete safetensors file"):
        shelf.turn(checkpoint_of(teachers["bad"]))
    assert torch.equal(states(shelf.turn(checkpoint_of(teachers["good"]))), expected(folder, "b"))
    with pytest.raises(ConfigError, match=r"teachers\.bad\.path=.*not a complete safetensors file"):
        shelf_of(teachers, weight_bytes=10**9)
