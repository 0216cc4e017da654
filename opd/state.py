"""A learner's state on disk: what exact resume needs beyond the weights, in a form that names no rank.

The idea: optimizer state is stored as fragments, each with its parameter's name and its place in it. A reader asks for
any stretch of any parameter and gets it put together from whichever files have it, so a checkpoint of four ranks and
ZeRO stage 2 is read by two of stage 3, and on the same layout every number comes back as it was.

    state/learner.json                 what the learner says of itself, and how many rank files there are
    state/rank_<r>.safetensors         "optimizer/<parameter>/<key>/<start>" float32 [numel], and that rank's RNG

Writing happens in a thread, from copies in host memory. Left out: the weights (`opd.weights.save_checkpoint`), and
whether a folder is complete (`Learner.finish_saving` says when it is).
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from opd.config import ConfigError
from opd.engine import Fragment

FORMAT = 2
DESCRIPTION = "learner.json"
OPTIMIZER = "optimizer/"


class HeldWeights(nn.Module):
    """Weights in the place of their model, for those who read a model's weights and config: whole where the model's
    own are divided, or still the same when the model has trained on."""

    def __init__(self, weights: dict[str, Tensor], model: nn.Module, *, copy: bool = False) -> None:
        super().__init__()
        self.config: Any = model.config
        self.generation_config: Any = getattr(model, "generation_config", None)
        self._weights = {name: value.to("cpu", copy=True) for name, value in weights.items()} if copy else weights

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return self._weights


class Writer:
    """One write at a time, in the background. What goes wrong in it is raised by the next `start` or `finish`."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start(self, write: Callable[[], None]) -> None:
        self.finish()

        def run() -> None:
            try:
                write()
            except Exception as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="checkpoint writer")
        self._thread.start()

    def finish(self) -> None:
        """Waits until the last write is wholly on disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error


def write_rank(folder: Path, rank: int, fragments: Iterable[Fragment], rng: dict[str, Tensor]) -> None:
    """Writes one rank's file and flushes it to disk."""
    tensors = {f"{OPTIMIZER}{f.name}/{f.key}/{f.start}": f.value.contiguous() for f in fragments}
    path = folder / f"rank_{rank}.safetensors"
    save_file(tensors | {f"rng/{name}": state for name, state in rng.items()}, path)
    _flush(path)


def write_description(folder: Path, described: dict[str, Any], num_files: int) -> None:
    path = folder / DESCRIPTION
    path.write_text(json.dumps({"format": FORMAT, "num_files": num_files, **described}, indent=2), encoding="ascii")
    _flush(path)


class SavedState:
    """A state folder, opened. Tensors are memory-mapped; nothing is read before it is asked for.

    Raises ConfigError, naming file and what was expected, for a folder that is missing, torn, or of another format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / DESCRIPTION
        if not path.is_file():
            raise ConfigError(f"{path} does not exist; expected the state folder of a checkpoint")
        try:
            self.described: dict[str, Any] = json.loads(path.read_text(encoding="ascii"))
        except ValueError as error:
            raise ConfigError(f"{path} is not readable as JSON: {error}") from None
        if self.described.get("format") != FORMAT:
            raise ConfigError(
                f"{path} has format {self.described.get('format')}; this version reads and writes format {FORMAT}"
            )
        self._files: list[Any] = []
        self._places: dict[tuple[str, str], list[tuple[int, int, int]]] = {}  # (start, end, file) by (name, key)
        for rank in range(self.described["num_files"]):
            self._open(rank)

    def _open(self, rank: int) -> None:
        path = self.folder / f"rank_{rank}.safetensors"
        if not path.is_file():
            raise ConfigError(f"{path} does not exist; the checkpoint is not complete")
        try:
            file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ConfigError(f"{path} is not a complete safetensors file: {error}") from None
        self._files.append(file)
        for entry in file.keys():  # noqa: SIM118 (not a dict)
            if entry.startswith(OPTIMIZER):
                name, key, start = entry.removeprefix(OPTIMIZER).rsplit("/", 2)
                (numel,) = file.get_slice(entry).get_shape()
                self._places.setdefault((name, key), []).append((int(start), int(start) + numel, rank))

    def read(self, name: str, key: str, start: int, end: int) -> Tensor:
        """Numbers start to end of a parameter's state, float32 [end - start]. Raises ConfigError if some are saved
        nowhere."""
        result = torch.empty(end - start)
        missing = end - start
        for begin, stop, rank in self._places.get((name, key), ()):
            low, high = max(start, begin), min(end, stop)
            if low < high:
                stored = self._files[rank].get_slice(f"{OPTIMIZER}{name}/{key}/{begin}")
                result[low - start : high - start] = stored[low - begin : high - begin]
                missing -= high - low
        if missing:
            raise ConfigError(f"{self.folder} lacks {missing} numbers of the optimizer's {key} of {name}")
        return result

    def rng(self, rank: int) -> dict[str, Tensor]:
        """That rank's random states by device; empty for a rank that was not there."""
        if rank >= len(self._files):
            return {}
        file = self._files[rank]
        names = [entry for entry in file.keys() if entry.startswith("rng/")]  # noqa: SIM118 (not a dict)
        return {entry.removeprefix("rng/"): file.get_tensor(entry) for entry in names}


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
