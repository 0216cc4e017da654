"""The compiled CPU kernels as one library of torch operators, built once and kept in the user's cache.

The one idea: all sources of this folder are compiled together, once for a version of torch and of themselves; which of
a processor's instructions they use is decided in them at run time, so a cache that machines share serves all of them.
Where nothing can be compiled one warning says why, and everything is done in plain torch.

Left out: the operators' meaning (`cpu` for products with FP4 weights, `fused` for what lies between products).
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent
SOURCES = tuple(sorted(FOLDER.glob("*.cpp")))
FLAGS = ("-O3", "-std=c++20", "-fopenmp", "-Wno-psabi")

log = logging.getLogger(__name__)


@functools.cache
def operators() -> Any | None:
    """`torch.ops.opd` with the kernels in it; None where the library can be neither found nor built.

    The first call of a process loads the library and logs which, or warns why there is none.
    """
    # A name of its own because torch makes its operators up at run time.
    ops: Any = torch.ops
    try:
        library = _library()
        if not hasattr(ops.opd, "fp4_linear"):  # whoever built it has it loaded; twice would end the process
            ops.load_library(str(library))
    except (OSError, RuntimeError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        log.warning(
            "no compiled library (%s): FP4 products and the model's small steps run in plain torch, slowly", reason
        )
        return None
    log.info("compiled kernels: %s", library)
    return ops.opd


def _library() -> Path:
    """The compiled library in the cache. Of several processes that find none there, one compiles and the others wait.

    A library appears under its name when it is complete, and the lock dies with its holder, so a process that is killed
    leaves nothing that could be taken for a library or wait for ever.
    """
    key = hashlib.sha256("\n".join((torch.__version__, platform.machine(), *FLAGS)).encode())
    for source in sorted((*SOURCES, *FOLDER.glob("*.h"))):
        key.update(source.read_bytes())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opd" / "kernels"
    library = folder / f"kernels_{key.hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.exists():
            return library
        for leftover in folder.glob("unfinished_*"):
            shutil.rmtree(leftover, ignore_errors=True)
        log.info("compiling %s, once, into %s; it takes a minute", ", ".join(s.name for s in SOURCES), folder)
        with tempfile.TemporaryDirectory(prefix="unfinished_", dir=folder) as build, _ninja_on_path():
            os.replace(_compile(build), library)
    return library


def _compile(folder: str) -> Path:
    """Builds in `folder` and leaves the library loaded. Raises RuntimeError with the compiler's own first complaint."""
    from torch.utils import cpp_extension  # takes a while, and is for building only

    try:
        cpp_extension.load(
            "opd_kernels",
            [str(source) for source in SOURCES],
            extra_cflags=list(FLAGS),
            build_directory=folder,
            with_cuda=False,
            is_python_module=False,
        )
    except Exception as error:  # a missing compiler, a failing one and a missing ninja raise three different things
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        complaint = next((line for line in lines if "error:" in line or "not found" in line), lines[0] if lines else "")
        raise RuntimeError(f"compiling the CPU kernels failed: {complaint or type(error).__name__}") from error
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
