"""Where teachers' hidden states and heads lie between scoring and training: in the run's object store, or on disk.

The one idea: a step has a budget of memory for what its teachers produce; what goes beyond it is written to a file of
its own in a folder of the run and read back when its micro-batch comes. Whoever reads a handle does not see which it
was, and no bit depends on it. A file carries the key it was put under, so that no other one can stand in for it.

The writing side counts the budget, and `start_over` opens it again for the next step; `free` deletes what has been
used. Any process that sees the folder can read and free. Left out: who may read what, and Ray (`opd.actors`).
"""

from __future__ import annotations

import contextlib
import os
import uuid
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from opd.types import Store

SUFFIX = ".safetensors"


@dataclass(slots=True, kw_only=True, frozen=True)
class Spilled:
    """Handle of a tensor in a file."""

    path: str  # absolute
    key: str


class HiddenStore:
    """The run's `Store`, with a bound on the memory that tensors put here may take.

    Values that are no tensors, and handles that are no files, are the inner store's business.
    """

    def __init__(self, inner: Store, folder: str | None = None, memory_bytes: int | None = None) -> None:
        """`memory_bytes` of tensors stay in the inner store between two `start_over`, further ones go to `folder`; null
        is no bound. Raises ValueError for a bound without a folder."""
        if memory_bytes is not None and folder is None:
            raise ValueError(f"memory_bytes={memory_bytes} needs a folder for what does not fit")
        self._inner = inner
        self._folder = None if folder is None else os.path.abspath(folder)
        self._memory_bytes = memory_bytes
        self._used = 0

    def put(self, value: Any, key: str = "", *, on_disk: bool = False) -> Any:
        """The handle of a value. `on_disk` sends a tensor there whatever the budget, if there is a folder. Raises
        RuntimeError, naming the key, when it cannot be written."""
        if not isinstance(value, Tensor):
            return self._inner.put(value)
        size = value.numel() * value.element_size()
        fits = self._memory_bytes is None or self._used + size <= self._memory_bytes
        if self._folder is None or (fits and not on_disk):
            self._used += size
            return self._inner.put(value)
        path = os.path.join(self._folder, uuid.uuid4().hex + SUFFIX)
        try:
            os.makedirs(self._folder, exist_ok=True)
            # Not flushed to disk: a machine that goes down takes the step with it, and the step is done again.
            save_file({"value": value.detach().contiguous()}, path, metadata={"key": key})
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                os.unlink(path)
            raise RuntimeError(f"{key or 'a tensor'} of {size} bytes cannot be written to {path}: {error}") from error
        return Spilled(path=path, key=key)

    def get(self, handle: Any) -> Any:
        """The value. Raises ValueError, naming the key, for a file that is gone, torn, or was put under another key."""
        if not isinstance(handle, Spilled):
            return self._inner.get(handle)
        try:
            with safe_open(handle.path, framework="pt") as file:
                key = (file.metadata() or {}).get("key")
                value = file.get_tensor("value").clone()  # aligned, and there when the file is not
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{handle.key or 'a tensor'} is not to be read from {handle.path}: {error}") from error
        if key != handle.key:
            raise ValueError(f"{handle.path} holds {key!r}, it was written for {handle.key!r}")
        return value

    def free(self, handle: Any) -> None:
        """Deletes the file of a handle; a second call does nothing. What lies in memory goes with its last handle."""
        if isinstance(handle, Spilled):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(handle.path)

    def start_over(self) -> None:
        """The whole budget is free again: what was put so far has been used, or belongs to the step before."""
        self._used = 0

    def clear(self) -> None:
        """Deletes every file of the folder, also those of an earlier process."""
        if self._folder is not None and os.path.isdir(self._folder):
            for name in os.listdir(self._folder):
                if name.endswith(SUFFIX):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(os.path.join(self._folder, name))
