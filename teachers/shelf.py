"""Which teachers' weights are in memory: loading on demand, reading ahead, a bound on bytes.

The one idea: one teacher is at work at a time, so memory need hold the weights that were asked to stay, those of the
teacher whose turn it is, and those of the next, which a thread reads in the meantime (DeepSeek-V4, section 5.2.2). A
checkpoint is loaded in full, with all checks, at its first turn; afterwards its files are read by tensor name into the
shell of its architecture, and must be the files they were.

Consumes: turns, in calls that one caller makes in order. Produces: models, each usable until the next call. Waits for:
the disk; a turn that was announced waits only for what its reading still lacks. Left out: what is done with a model
(`teachers.local`).
"""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from opd.config import ConfigError, ModelConfig, TeacherConfig
from opd.memory import give_back_freed_memory
from opd.model import CausalLM, load_model
from opd.stored import STORED_DTYPES, FileMarks, file_marks, read_whole, same_files, stored_shapes, stored_tensors
from opd.weights import named_weights, resolve_checkpoint
from teachers.precision import Entries, Shell, entry_bytes, held_bytes, take_weights


class Checkpoint(NamedTuple):
    """What two teachers have in common if they are the same weights, held the same way."""

    family: str
    path: str
    revision: str | None
    precision: str | None


def checkpoint_of(teacher: TeacherConfig) -> Checkpoint:
    """A local folder counts as the one it links to."""
    is_local = teacher.family != "remote" and Path(teacher.path).is_dir()
    path = str(Path(teacher.path).resolve()) if is_local else teacher.path
    return Checkpoint(teacher.family, path, teacher.revision, teacher.precision)


def expected_bytes(teachers: Mapping[str, TeacherConfig]) -> tuple[list[int], list[int]]:
    """Bytes that the weights of these teachers take in memory, by checkpoint: of those that stay, and of those that are
    read when their turn comes. Reads headers of files. Raises ConfigError as `resolve_checkpoint` does."""
    local = [teacher for teacher in teachers.values() if teacher.family != "remote"]
    stay = {checkpoint_of(teacher) for teacher in local if teacher.residency != "disk"}
    sizes = {checkpoint: _held_bytes(checkpoint) for checkpoint in dict.fromkeys(map(checkpoint_of, local))}
    return [sizes[c] for c in sizes if c in stay], [sizes[c] for c in sizes if c not in stay]


def _held_bytes(checkpoint: Checkpoint, precision: str | None = None) -> int:
    """Of a checkpoint's weights in memory, in its precision or another."""
    shapes = stored_shapes(resolve_checkpoint(checkpoint.path, checkpoint.revision))
    return held_bytes(shapes, checkpoint.family, precision or checkpoint.precision)


@dataclass(slots=True)
class _Known:
    """A checkpoint that was loaded once."""

    folder: Path
    marks: FileMarks  # of its files at that time
    shell: Shell
    num_bytes: int  # of its weights as they are held
    by_name: bool  # its files hold the model's tensors under their names, unchanged
    is_whole: bool  # and nothing else, in the model's own dtypes


class Shelf:
    """The weights of some checkpoints. `load_seconds`: time spent on reading them, `wait_seconds`: the part of it that
    a turn had to wait for, by checkpoint, both since they were last taken out."""

    def __init__(
        self,
        teachers: Mapping[str, TeacherConfig],
        *,
        fp4: str,
        fp4_index: bool,
        device: torch.device,
        weight_bytes: int | None = None,
        prefetch: bool = True,
    ) -> None:
        """`fp4` and `fp4_index` are the student's `ModelConfig` choices. Of teachers that share a checkpoint the one
        that stays in memory decides. Raises ConfigError when `weight_bytes` cannot hold what must stay and, beside it,
        any one of the others. A checkpoint that is held in fewer than 32 bits is counted with them: its first loading
        makes that many."""
        self._fp4, self._fp4_index, self._device = fp4, fp4_index, device
        self._limit, self._prefetch = weight_bytes, prefetch
        self._names: dict[Checkpoint, str] = {}  # of the first teacher that has it, for messages
        self._stays: dict[Checkpoint, str] = {}  # residency host or device
        for name, teacher in teachers.items():
            checkpoint = checkpoint_of(teacher)
            self._names.setdefault(checkpoint, name)
            if teacher.residency == "device" or (teacher.residency == "host" and checkpoint not in self._stays):
                self._stays[checkpoint] = teacher.residency
        self._known: dict[Checkpoint, _Known] = {}
        self._kept: dict[Checkpoint, Entries] = {}
        self._present: tuple[Checkpoint, Entries] | None = None  # its weights are in their shell
        self._reader: ThreadPoolExecutor | None = None
        self._ahead: tuple[Checkpoint, Future[tuple[Entries, float]]] | None = None
        self._check_limit()
        self.load_seconds: dict[Checkpoint, float] = defaultdict(float)
        self.wait_seconds: dict[Checkpoint, float] = defaultdict(float)

    def turn(self, checkpoint: Checkpoint, then: Checkpoint | None = None) -> CausalLM:
        """The model with this checkpoint's weights, on the device. `then` is whose turn is next: its reading starts
        now, if it was loaded before and there is room.

        Raises ConfigError for a checkpoint that does not load, and ValueError, naming teacher and files, for one whose
        files are no longer those that were loaded first.
        """
        if self._present is None or self._present[0] != checkpoint:
            self._clear_present()
            give_back_freed_memory()  # with what the last one's work took: the next one's is another size
            entries = self._entries(checkpoint)
            shell = self._known[checkpoint].shell
            shell.install(self._on_device(checkpoint, entries))
            self._present = (checkpoint, entries)
        self._read_ahead(then)
        return self._known[checkpoint].shell.model

    def release(self) -> None:
        """Lets go of all weights but those that were asked to stay, and of what was read ahead."""
        self._clear_present()
        self._drop_ahead()
        give_back_freed_memory()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        self._kept.clear()
        self.release()
        if self._reader is not None:
            self._reader.shutdown()
            self._reader = None

    def bytes_in_memory(self) -> int:
        """Of weights, those being read included."""
        held = {checkpoint: entry_bytes(entries) for checkpoint, entries in self._kept.items()}
        if self._present is not None:
            held.setdefault(self._present[0], entry_bytes(self._present[1]))
        if self._ahead is not None:
            held.setdefault(self._ahead[0], self._known[self._ahead[0]].num_bytes)
        return sum(held.values())

    # --- reading ------------------------------------------------------------------------------------------------------

    def _entries(self, checkpoint: Checkpoint) -> Entries:
        """Its weights on the host, from memory, from what is being read, or from disk."""
        if checkpoint in self._kept:
            return self._kept[checkpoint]
        started = time.perf_counter()
        if self._ahead is not None and self._ahead[0] == checkpoint:
            ahead, self._ahead = self._ahead[1], None
            entries, seconds = ahead.result()
            self.load_seconds[checkpoint] += seconds
        else:
            self._drop_ahead()  # what was read for nothing makes room
            entries = self._read(checkpoint) if checkpoint in self._known else self._load(checkpoint)
            self.load_seconds[checkpoint] += time.perf_counter() - started
        self.wait_seconds[checkpoint] += time.perf_counter() - started
        if checkpoint in self._stays:
            if self._stays[checkpoint] == "device":
                entries = self._on_device(checkpoint, entries)
            self._kept[checkpoint] = entries
        return entries

    def _load(self, checkpoint: Checkpoint) -> Entries:
        """In full, with every check that a model's loading makes; from then on the checkpoint is known."""
        family, path, revision, precision = checkpoint
        try:
            folder = resolve_checkpoint(path, revision)
            marks = file_marks(folder)
            loaded = load_model(
                ModelConfig(
                    family=family,
                    path=path,
                    revision=revision,
                    fp4="none",  # rounded once, below, instead of in every forward
                    fp4_index=self._fp4_index and family == "deepseek_v4",
                )
            )
            weights = named_weights(loaded)
            by_name = _holds(folder, weights)
            stored = stored_shapes(folder)
            is_whole = by_name and all(
                name in weights and weights[name].dtype == STORED_DTYPES[dtype] for name, (dtype, _) in stored.items()
            )
            del weights
            shell, entries = take_weights(loaded, family, precision, self._rounded(family))
        except ConfigError as error:
            raise ConfigError(f"{self._key(checkpoint)}: {error}") from None
        for known in self._known.values():
            if _same_shell(known.shell, shell):
                shell = known.shell
                break
        else:
            cast(nn.Module, shell.model).to(self._device)  # what little it has of its own
        self._known[checkpoint] = _Known(folder, marks, shell, entry_bytes(entries), by_name, is_whole)
        self._check_unchanged(checkpoint)
        return entries

    def _read(self, checkpoint: Checkpoint) -> Entries:
        """Once more. Runs in the reading thread too: touches nothing but files and the known's fixed fields."""
        known = self._known[checkpoint]
        self._check_unchanged(checkpoint)
        shell = known.shell
        if known.is_whole and shell.keeps_stored_bytes:
            entries = shell.rounded_in_place(read_whole(known.folder))
        elif known.by_name:
            entries: Entries = {}
            for name, tensor in stored_tensors(known.folder, shell.forms.keys()):
                entries[name] = shell.held(name, tensor)
        else:
            family, _, _, precision = checkpoint
            model = load_model(ModelConfig(family=family, path=str(known.folder), fp4="none"))
            entries = take_weights(model, family, precision, self._rounded(family))[1]
        self._check_unchanged(checkpoint)  # also while it was read
        return entries

    def _rounded(self, family: str) -> str:
        """The `model.fp4` choice that holds for a teacher of no stated precision."""
        return self._fp4 if family == "deepseek_v4" and self._fp4 == "experts" else "none"

    def _key(self, checkpoint: Checkpoint) -> str:
        name = self._names.get(checkpoint)
        return f"checkpoint {checkpoint.path}" if name is None else f"teachers.{name}.path={checkpoint.path}"

    def _check_unchanged(self, checkpoint: Checkpoint) -> None:
        known = self._known[checkpoint]
        if not same_files(known.marks):
            raise ValueError(
                f"{self._key(checkpoint)}: the weight files in {known.folder} are not the ones that were "
                "loaded first; they were replaced or written to since. Put them back, or start anew with the new ones"
            )

    def _read_ahead(self, then: Checkpoint | None) -> None:
        """Starts reading a known checkpoint that is not in memory, unless it would not fit."""
        if self._ahead is not None and self._ahead[0] == then:
            return
        self._drop_ahead()
        if then is None or not self._prefetch or then not in self._known or then in self._kept:
            return
        if self._present is not None and self._present[0] == then:
            return
        known = self._known[then]
        needed = known.num_bytes if known.by_name else max(known.num_bytes, _held_bytes(then, "fp32"))
        if self._limit is not None and self.bytes_in_memory() + needed > self._limit:
            return
        if self._reader is None:
            self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="teacher weights")
        self._ahead = (then, self._reader.submit(self._timed_read, then))

    def _timed_read(self, checkpoint: Checkpoint) -> tuple[Entries, float]:
        started = time.perf_counter()
        with torch.no_grad():
            entries = self._read(checkpoint)
        return entries, time.perf_counter() - started

    def _drop_ahead(self) -> None:
        if self._ahead is not None:
            ahead, self._ahead = self._ahead[1], None
            if not ahead.cancel():
                ahead.exception()  # waits: until it is done, its memory is taken

    def _clear_present(self) -> None:
        if self._present is not None:
            self._known[self._present[0]].shell.clear()
            self._present = None

    def _on_device(self, checkpoint: Checkpoint, entries: Entries) -> Entries:
        if self._device.type == "cpu" or (checkpoint in self._kept and self._stays[checkpoint] == "device"):
            return entries
        return {
            name: entry.to(self._device) if isinstance(entry, Tensor) else copy.deepcopy(entry).to(self._device)
            for name, entry in entries.items()
        }

    # --- bytes --------------------------------------------------------------------------------------------------------

    def _check_limit(self) -> None:
        """Raises ConfigError when the limit is too small for some moment of the run."""
        if self._limit is None:
            return
        held: dict[Checkpoint, int] = {}
        full: dict[Checkpoint, int] = {}
        for checkpoint, name in self._names.items():
            try:
                held[checkpoint], full[checkpoint] = _held_bytes(checkpoint), _held_bytes(checkpoint, "fp32")
            except ConfigError as error:
                raise ConfigError(f"teachers.{name}.path={checkpoint.path}: {error}") from None
        staying = sum(held[checkpoint] for checkpoint in self._stays)
        for checkpoint, name in self._names.items():
            others = staying - (held[checkpoint] if checkpoint in self._stays else 0)
            needed = others + max(held[checkpoint], full[checkpoint])
            if needed > self._limit:
                raise ConfigError(
                    f"pool.weight_bytes={self._limit} is too small: teachers.{name} takes {needed - others} bytes "
                    f"while it is loaded, beside {others} of teachers that stay in memory; raise it to {needed}, or "
                    "set residency: disk on more teachers"
                )


def _holds(folder: Path, weights: Mapping[str, Tensor]) -> bool:
    """Whether a checkpoint's files hold exactly these values under these names, so that they may be read from there."""
    found = 0
    for name, tensor in stored_tensors(folder, weights.keys()):
        if tensor.shape != weights[name].shape or not torch.equal(tensor.to(weights[name].dtype), weights[name]):
            return False
        found += 1
    return found == len(weights)


def _same_shell(a: Shell, b: Shell) -> bool:
    """Whether the weights of one may be put into the other: the same architecture, option by option."""
    if type(a.model) is not type(b.model) or a.forms != b.forms:
        return False
    described = []
    for shell in (a, b):
        assert isinstance(shell.model, nn.Module)
        config = shell.model.config.to_dict()
        for unrelated in ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "architectures"):
            config.pop(unrelated, None)
        described.append(config)
    return described[0] == described[1]
