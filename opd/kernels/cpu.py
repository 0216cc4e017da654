"""The CPU's products with packed FP4 weights: the bytes they read, and the library that does them.

The one idea: `fp4_linear.cpp` is compiled once for a version of torch and of itself and kept in the user's cache; at
run time it picks the best instructions that the processor has. Where it cannot be compiled, one warning says why,
`paths` is empty, and `opd.fp4` multiplies in plain torch.

Left out: what an FP4 tensor is (`opd.fp4`), and the products themselves (`fp4_linear.cpp`, whose head states the
layout and the order of additions).
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

TILE = 16  # output features that lie side by side
GROUP = 8  # inputs whose codes fill the 32 bits of a lane

SOURCE = Path(__file__).with_name("fp4_linear.cpp")
FLAGS = ("-O3", "-std=c++20", "-fopenmp")
NEUTRAL_SCALE = 1  # of the features that fill up the last tile: finite in both formats

log = logging.getLogger(__name__)
# The one call into the library; a name of its own because torch makes its operators up at run time.
_operators: Any = torch.ops


def tiled(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Published bytes, codes uint8 [E, N, K / 2] and scales uint8 [E, N, K / B], as the library reads them.

    -> codes uint8 [E, tiles, K / 8, 16, 4], scales uint8 [E, tiles, K / B, 16], with N filled up to whole tiles.
    """
    experts, features, half_inputs = codes.shape
    groups = half_inputs * 2 // GROUP
    padding = -features % TILE
    # Published byte i of a group holds inputs 2 i and 2 i + 1. Byte j now holds even ones (j < 2), then odd ones.
    nibbles = torch.stack((codes & 15, codes >> 4), -2).view(experts, features, 2, groups, 2, 2)
    lanes = (nibbles[..., 0] | nibbles[..., 1] << 4).movedim(2, 3).reshape(experts, features, groups, 4)
    lanes = functional.pad(lanes, (0, 0, 0, 0, 0, padding))
    scales = functional.pad(scales, (0, 0, 0, padding), value=NEUTRAL_SCALE)
    return (
        lanes.view(experts, -1, TILE, groups, 4).transpose(2, 3).contiguous(),
        scales.view(experts, -1, TILE, scales.shape[-1]).transpose(2, 3).contiguous(),
    )


def untiled(codes: Tensor, scales: Tensor, num_features: int) -> tuple[Tensor, Tensor]:
    """The inverse of `tiled`, N being `num_features`."""
    experts, tiles, groups = codes.shape[:3]
    features = tiles * TILE
    lanes = codes.transpose(2, 3).reshape(experts, features, groups, 2, 2)
    nibbles = torch.stack((lanes & 15, lanes >> 4), -1).movedim(3, -1).reshape(experts, features, groups * 4, 2)
    published = nibbles[..., 0] | nibbles[..., 1] << 4
    scales = scales.transpose(2, 3).reshape(experts, features, -1)
    return published[:, :num_features].contiguous(), scales[:, :num_features].contiguous()


def linear(
    x: Tensor, codes: Tensor, scales: Tensor, sizes: Sequence[int], num_features: int, path: str | None = None
) -> Tensor:
    """x [R, K], rows sorted by expert, times each one's weight, transposed: [R, num_features] of x's dtype.

    `codes` and `scales` as `tiled` gives them, `sizes` the rows of each of the E experts, `path` one of `paths()`, by
    default the first. x is float32 or bfloat16 and sums are float32. A row's result does not depend, in any bit, on the
    other rows, on `sizes`, or on the number of threads. Raises ValueError for shapes that do not fit each other, and
    RuntimeError where there is no library.
    """
    available = paths()
    if not available:
        raise RuntimeError("there is no compiled library on this machine; opd.fp4 multiplies without it")
    return _operators.opd.fp4_linear(x.contiguous(), codes, scales, list(sizes), num_features, path or available[0])


@functools.cache
def paths() -> tuple[str, ...]:
    """Ways of computing that this processor has, best first; empty where the library can be neither found nor built.

    The first call of a process loads the library and logs which way was taken, and why if it is plain torch's.
    """
    try:
        library = _library()
        if not hasattr(_operators.opd, "fp4_linear"):  # whoever built it has it loaded; twice would end the process
            _operators.load_library(str(library))
        found = tuple(_operators.opd.fp4_paths())
    except (OSError, RuntimeError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        log.warning("FP4 weights are multiplied in plain torch, slowly: no compiled library (%s)", reason)
        return ()
    log.info("FP4 weights are multiplied by %s, path %s of %s", library, found[0], ", ".join(found))
    return found


def _library() -> Path:
    """The compiled library in the cache. Of several processes that find none there, one compiles and the others wait.

    A library appears under its name when it is complete, and the lock dies with its holder, so a process that is killed
    leaves nothing that could be taken for a library or wait for ever.
    """
    described = "\n".join((torch.__version__, platform.machine(), *FLAGS))
    key = hashlib.sha256(described.encode() + SOURCE.read_bytes()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opd" / "kernels"
    library = folder / f"fp4_linear_{key}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.exists():
            return library
        for leftover in folder.glob("unfinished_*"):
            shutil.rmtree(leftover, ignore_errors=True)
        log.info("compiling %s, once, into %s; it takes half a minute", SOURCE.name, folder)
        with tempfile.TemporaryDirectory(prefix="unfinished_", dir=folder) as build, _ninja_on_path():
            os.replace(_compile(build), library)
    return library


def _compile(folder: str) -> Path:
    """Builds in `folder` and leaves the library loaded. Raises RuntimeError with the compiler's own first complaint."""
    from torch.utils import cpp_extension  # takes a while, and is for building only

    try:
        cpp_extension.load(
            "opd_fp4_linear",
            [str(SOURCE)],
            extra_cflags=list(FLAGS),
            build_directory=folder,
            with_cuda=False,
            is_python_module=False,
        )
    except Exception as error:  # a missing compiler, a failing one and a missing ninja raise three different things
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        complaint = next((line for line in lines if "error:" in line or "not found" in line), lines[0] if lines else "")
        raise RuntimeError(f"compiling {SOURCE.name} failed: {complaint or type(error).__name__}") from error
    return next(Path(folder).glob("*.so"))


@contextlib.contextmanager
def _ninja_on_path() -> Iterator[None]:
    """ninja is a dependency, installed beside this Python, whose folder need not be on PATH."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), before))
    try:
        yield
    finally:
        os.environ["PATH"] = before
