"""Checkpoints of a stage: written whole or not at all, found again, kept or removed.

    <stage>/checkpoints/step_<n>/hf/             the weights, as transformers opens them
                                 state/          what exact resume needs beside them: each learner rank's part, run.json
                                 complete.json   size and sha256 of every file above; written last
    <stage>/hf, <stage>/best                     links to the newest one's weights, and to those of the best one

The one idea: a checkpoint gets its name when everything in it is on disk. It is written under a hidden name beside its
place, flushed, and renamed; a kill or a power failure at any moment leaves the one before it. Writing overlaps
training: a `Saver` has the ranks copy what they save at the end of a step, waits for their files at the end of the next
one, and then hashes, flushes and renames on a thread of its own, which the next checkpoint or the end of the stage
waits for.

Left out: what a rank writes (`opd.learner`) and when (`opd.train`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

from opd.config import CheckpointConfig, ConfigError
from opd.weights import flush

log = logging.getLogger(__name__)

FORMAT = 1
MARKER = "complete.json"
RECORD = os.path.join("state", "run.json")
FOLLOWS = ("metrics.jsonl", "findings.jsonl")  # a stage's files of lines that grow with its steps
RESTARTED = "restarted"  # the rule of findings that outlive the steps they speak of
_STEP = re.compile(r"step_(\d+)")


@dataclass(slots=True, kw_only=True, frozen=True)
class Checkpoint:
    """One that is whole. `record` is what the loop was at after `step` steps; see `opd.train`."""

    folder: str
    step: int
    record: dict[str, Any]


def read_checkpoint(folder: str, *, contents: bool = True) -> Checkpoint:
    """The checkpoint in `folder`, once every file of it has the size and (with `contents`) the hash it was written
    with. Raises ConfigError saying what is missing or changed."""
    folder = os.path.abspath(folder)
    marker = os.path.join(folder, MARKER)
    if not os.path.isfile(marker):
        raise ConfigError(f"{folder} is not a complete checkpoint: it has no {MARKER}")
    written = _read_json(marker)
    if written.get("format") != FORMAT:
        raise ConfigError(f"{marker} has format {written.get('format')}; this version reads {FORMAT}")
    for name, about in written["files"].items():
        path = os.path.join(folder, name)
        size = os.path.getsize(path) if os.path.isfile(path) else None
        if size != about["bytes"]:
            raise ConfigError(f"{path} has {size} bytes, and {about['bytes']} were written: the checkpoint is damaged")
        if contents and _sha256(path) != about["sha256"]:
            raise ConfigError(f"{path} is not what was written (another sha256): the checkpoint is damaged")
    record = _read_json(os.path.join(folder, RECORD))
    return Checkpoint(folder=folder, step=int(record["step"]), record=record)


def newest_checkpoint(run_dir: str, *, contents: bool = True) -> Checkpoint | None:
    """The whole checkpoint of the most steps in a stage's folder; a damaged one costs a warning and is passed over."""
    for _, folder in sorted(_folders(run_dir), reverse=True):
        try:
            return read_checkpoint(folder, contents=contents)
        except ConfigError as error:
            log.warning("%s; it is passed over", error)
    return None


def rewind(run_dir: str, step: int) -> None:
    """Makes a stage's folder what it was when the checkpoint of `step` was written: later checkpoints, metrics and
    findings go, except the findings that tell of restarts."""
    for later, folder in _folders(run_dir):
        if later > step:
            log.warning("%s is removed: the run goes on from step %d", folder, step)
            shutil.rmtree(folder)
    for name in FOLLOWS:
        path = os.path.join(run_dir, name)
        if os.path.exists(path):
            _write(path, "".join(_lines_up_to(path, step)))


def point_at(run_dir: str, checkpoint: Checkpoint) -> str:
    """Lets a stage's `hf` be the checkpoint's weights (a kill may have come between the two); returns its path."""
    _link(run_dir, "hf", checkpoint.step)
    return os.path.join(run_dir, "hf")


def _lines_up_to(path: str, step: int) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n") and line.strip():  # a crash may have cut the last one
                entry = json.loads(line)
                if entry["step"] <= step or entry.get("rule") == RESTARTED:
                    yield line


class Saver:
    """Writes a stage's checkpoints, at most one at a time."""

    def __init__(self, run_dir: str, keep: CheckpointConfig, on_all_ranks: Callable[..., list[Any]]) -> None:
        """`on_all_ranks(method, *args)` calls a method of every learner rank: `save` and `finish_saving` here."""
        self._run_dir, self._keep, self._on_all_ranks = os.path.abspath(run_dir), keep, on_all_ranks
        self._written: int | None = None  # the step whose files the ranks may still be writing
        self._sealing: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def begin(self, step: int, files: Mapping[str, Any], *tokenizer: Any) -> None:
        """Starts the checkpoint of `step`: `files` are JSON values by their path in it, run.json among them.

        On return the ranks have copied what they save and may train on. Raises what the checkpoint before it failed
        with.
        """
        self.finish()
        folder = self._unfinished(step)
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(os.path.join(folder, "state"))
        for name, value in files.items():
            _write(os.path.join(folder, name), json.dumps(value, indent=1) + "\n")
        self._on_all_ranks("save", folder, *tokenizer)
        self._written = step

    def settle(self) -> None:
        """Waits for the ranks to have written the checkpoint that was begun, if there is one, and seals it meanwhile:
        call it when they are idle."""
        if self._written is not None:
            step, self._written = self._written, None
            self._on_all_ranks("finish_saving")
            self._sealing = self._thread.submit(self._seal, step)

    def finish(self) -> None:
        """On return the checkpoint that was begun is on disk under its name. Raises OSError when it cannot be."""
        self.settle()
        if self._sealing is not None:
            sealing, self._sealing = self._sealing, None
            sealing.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Lets go of the thread when it has sealed what it has; what ranks were not waited for stays unfinished."""
        self._thread.shutdown(wait=True)

    def _unfinished(self, step: int) -> str:
        return os.path.join(self._run_dir, "checkpoints", f".step_{step}.unfinished")

    def _seal(self, step: int) -> None:
        unfinished = self._unfinished(step)
        place = os.path.join(self._run_dir, "checkpoints", f"step_{step}")
        replaced = os.path.join(self._run_dir, "checkpoints", f".step_{step}.replaced")
        names = sorted(
            os.path.relpath(os.path.join(folder, file), unfinished)
            for folder, _, files in os.walk(unfinished)
            for file in files
        )
        about = {}
        for name in names:
            path = os.path.join(unfinished, name)
            about[name] = {"bytes": os.path.getsize(path), "sha256": _sha256(path)}
            flush(path)
        _write(os.path.join(unfinished, MARKER), json.dumps({"format": FORMAT, "files": about}, indent=1) + "\n")
        for folder, _, _ in os.walk(unfinished):
            flush(folder)
        for name in FOLLOWS:
            if os.path.exists(path := os.path.join(self._run_dir, name)):
                flush(path)
        shutil.rmtree(replaced, ignore_errors=True)
        if os.path.exists(place):
            os.rename(place, replaced)
        os.rename(unfinished, place)
        flush(os.path.dirname(place))
        shutil.rmtree(replaced, ignore_errors=True)
        _link(self._run_dir, "hf", step)
        self._tidy()

    def _tidy(self) -> None:
        """Removes what `checkpoint.keep_*` does not keep, and what killed runs left unfinished."""
        whole = {step: folder for step, folder in sorted(_folders(self._run_dir)) if _is_sealed(folder)}
        kept = set(list(whole)[-self._keep.keep_last :])
        if self._keep.keep_best:
            scores = {step: _read_json(os.path.join(folder, RECORD))["score"] for step, folder in whole.items()}
            best = sorted(((score, step) for step, score in scores.items() if score is not None), reverse=True)
            kept |= {step for _, step in best[: self._keep.keep_best]}
            if best:
                _link(self._run_dir, "best", best[0][1])
        for step, folder in whole.items():
            if step not in kept:
                # Hidden first: a kill inside the removal must not leave a checkpoint that only looks like one.
                doomed = os.path.join(os.path.dirname(folder), f".step_{step}.replaced")
                shutil.rmtree(doomed, ignore_errors=True)
                os.rename(folder, doomed)
        parent = os.path.join(self._run_dir, "checkpoints")
        for name in os.listdir(parent):
            if re.fullmatch(r"\.step_\d+\.(unfinished|replaced)", name):
                shutil.rmtree(os.path.join(parent, name))


def _folders(run_dir: str) -> list[tuple[int, str]]:
    """(step, folder) of everything that bears a checkpoint's name."""
    parent = os.path.join(run_dir, "checkpoints")
    names = os.listdir(parent) if os.path.isdir(parent) else []
    return [(int(match[1]), os.path.join(parent, name)) for name in names if (match := _STEP.fullmatch(name))]


def _is_sealed(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, MARKER))


def _link(run_dir: str, name: str, step: int) -> None:
    """Points `run_dir`/name at the weights of a checkpoint, in one go."""
    fresh = os.path.join(run_dir, f".{name}.next")
    if os.path.lexists(fresh):
        os.unlink(fresh)
    os.symlink(os.path.join("checkpoints", f"step_{step}", "hf"), fresh)
    os.replace(fresh, os.path.join(run_dir, name))


def _write(path: str, text: str) -> None:
    """Replaces a file as a whole, on disk when this returns."""
    partial = f"{path}.partial"
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _read_json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
