"""A checkpoint's weight files, for whoever reads them again and again: what is in them, and whether they are the same.

The one idea: what a full loading has checked once need not be checked again as long as nobody touched the files, so
later readings are plain: one pass over each file, tensors by their stored names. Left out: names in a model, the
released layout, quantised weights (`opd.weights`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path

import torch

from opd.config import ConfigError
from opd.weights import opened_tensors, resolve_checkpoint, weight_files

STORED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}
ALIGNMENT = 64  # bytes, of torch's own memory on the CPU

FileMarks = tuple[tuple[str, int, int, int, int], ...]


def file_marks(folder: str | Path) -> FileMarks:
    """By which a checkpoint's weight files are known again without being read: path, size, inode and times of each.

    Raises as `resolve_checkpoint` does.
    """
    return tuple(_mark(str(path)) for path in sorted(weight_files(resolve_checkpoint(folder))))


def same_files(marks: FileMarks) -> bool:
    """Whether nobody wrote to the files of these marks, or removed them, or put others in their place."""
    try:
        return all(_mark(mark[0]) == mark for mark in marks)
    except OSError:
        return False


def _mark(path: str) -> tuple[str, int, int, int, int]:
    seen = os.stat(path)  # of what a link points at
    return path, seen.st_size, seen.st_ino, seen.st_mtime_ns, seen.st_ctime_ns


def stored_shapes(folder: str | Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype, by safetensors' name for it such as "F32", and shape of every tensor in a checkpoint's files by its name
    there. Reads their headers, no weights."""
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, file in opened_tensors(weight_files(resolve_checkpoint(folder))):
        part = file.get_slice(name)
        shapes[name] = part.get_dtype(), tuple(part.get_shape())
    return shapes


def stored_tensors(folder: str | Path, names: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and memory-mapped tensor, as stored, of those `names` that a checkpoint's files hold (None: of all).

    Whatever is kept must be copied: a file that is cut short while it is mapped ends the process that reads from it.
    Raises ConfigError as `resolve_checkpoint` does, and for files that are torn.
    """
    for name, file in opened_tensors(weight_files(resolve_checkpoint(folder))):
        if names is None or name in names:
            yield name, file.get_tensor(name)


def read_whole(folder: str | Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint's files by its name there, as stored, in one buffer per file that nobody else has.

    For a checkpoint that is read again and again: one pass over each file, and few calls. Tensors are aligned as torch
    aligns its own, because products of others may be rounded otherwise. Raises ConfigError as `resolve_checkpoint`
    does, and for files that are torn.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in weight_files(resolve_checkpoint(folder)):
        with open(path, "rb") as file:
            try:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            except ValueError as error:
                raise ConfigError(f"{path} is not a complete safetensors file: {error}") from None
            header.pop("__metadata__", None)
            entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
            sizes = [last - first for first, last in (entry["data_offsets"] for _, entry in entries)]
            buffer = torch.empty(sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), dtype=torch.uint8)
            start = 0
            for (name, entry), size in zip(entries, sizes, strict=True):  # the format leaves no gaps between tensors
                part = buffer[start : start + size]
                if file.readinto(part.numpy().data) != size:
                    raise ConfigError(f"{path} is not a complete safetensors file: it ends inside {name!r}")
                tensors[name] = part.view(STORED_DTYPES[entry["dtype"]]).view(entry["shape"])
                start += -(-size // ALIGNMENT) * ALIGNMENT
    return tensors
