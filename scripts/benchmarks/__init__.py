"""The frame that every benchmark of this folder runs in: one command line, one table, one JSON line, bars that fail.

A benchmark is a module `<name>.py` here with a docstring, whose first line the listing shows, and a function
`main(argv: list[str]) -> int` that ends with `return report(...)` and may raise ConfigError. What is measured is the
benchmark's own business; this file only knows how to time, weigh and print.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import psutil

from opd.config import ConfigError

T = TypeVar("T")

FOLDER = Path(__file__).parent


@dataclass(slots=True, kw_only=True, frozen=True)
class Figure:
    """One measured number.

    Example: Figure(name="speed-up", value=3.1, unit="x", bar=">= 3.0", ok=True)
    """

    name: str
    value: float
    unit: str
    bar: str | None = None  # what is asked of the value, in words; None: it is only reported
    ok: bool | None = None  # whether the bar is met; None where there is no bar


def main(argv: list[str], folder: Path = FOLDER) -> int:
    """Runs the benchmark that `argv` names in `folder`: NAME [--json] [key=value ...]. Returns the exit status.

    0: every bar was met; 1: one was missed; 2: the command line was wrong, and standard error says how.
    """
    available = {path.stem: path for path in sorted(folder.glob("*.py")) if not path.stem.startswith("_")}
    name = argv[0] if argv else None
    if name not in available:
        print(f"no benchmark is named {name!r}" if name else "which benchmark?", file=sys.stderr)
        print("usage: scripts/bench NAME [--json] [key=value ...]", file=sys.stderr)
        for stem, path in available.items():
            summary = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
            print(f"  {stem:<16}{summary}", file=sys.stderr)
        return 2
    for argument in argv[1:]:
        if argument != "--json" and (argument.startswith("-") or "=" not in argument):
            print(f"{argument!r} is neither --json nor key=value", file=sys.stderr)
            return 2
    module_name = f"{__name__}.{name}"
    spec = importlib.util.spec_from_file_location(module_name, available[name])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    try:
        return module.main(argv[1:])
    except ConfigError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2


def split_arguments(argv: list[str]) -> tuple[bool, list[str]]:
    """(whether --json was given, the key=value overrides in order)."""
    return "--json" in argv, [argument for argument in argv if argument != "--json"]


def whole_numbers(overrides: list[str], defaults: dict[str, int], least: int = 1) -> dict[str, int]:
    """The defaults with key=value overrides. Raises ConfigError for another key, and for a value that is no whole
    number of at least `least`."""
    settings = dict(defaults)
    for override in overrides:
        key, _, value = override.partition("=")
        if key not in settings or not value.isdecimal() or int(value) < least:
            raise ConfigError(
                f"{override!r} is not one of {', '.join(settings)} and a whole number of at least {least}"
            )
        settings[key] = int(value)
    return settings


def report(title: str, figures: list[Figure], as_json: bool) -> int:
    """Prints the figures as a table and, if asked, as one JSON object on the last line: {name: {value, unit, bar, ok}}.

    Returns the exit status: 1 if a bar was missed, else 0. Raises ValueError for two figures of one name, and for a
    value that JSON cannot hold (after the table, so that a long run is not lost).
    """
    names = [figure.name for figure in figures]
    if len(set(names)) < len(names):
        raise ValueError(f"figures share a name: {', '.join(names)}")
    verdicts = {True: "ok", False: "MISSED", None: ""}
    rows = [("figure", "value", "unit", "bar", "")]
    rows += [
        (figure.name, _readable(figure.value), figure.unit, figure.bar or "-", verdicts[figure.ok])
        for figure in figures
    ]
    name_width, value_width, unit_width, bar_width = (max(len(row[column]) for row in rows) for column in range(4))
    print(title)
    for name, value, unit, bar, verdict in rows:
        line = f"  {name:<{name_width}}  {value:>{value_width}}  {unit:<{unit_width}}  {bar:<{bar_width}}  {verdict}"
        print(line.rstrip())
    if as_json:
        fields = {
            figure.name: {"value": figure.value, "unit": figure.unit, "bar": figure.bar, "ok": figure.ok}
            for figure in figures
        }
        print(json.dumps(fields, allow_nan=False), flush=True)
    return int(any(figure.ok is False for figure in figures))


def interleaved(pairs: dict[str, Callable[[], None]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of every repeat of every callable, run in turn (A B A B ...), so that a drifting machine wrongs nobody.

    `warmup` rounds go first and are not counted. A callable returns when its work is done: one that uses a GPU
    synchronises itself. Compare medians: the mean belongs to whatever else the machine did.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats} is too small; it must be at least 1")
    seconds: dict[str, list[float]] = {name: [] for name in pairs}
    for turn in range(warmup + repeats):
        for name, call in pairs.items():
            start = time.perf_counter()
            call()
            elapsed = time.perf_counter() - start
            if turn >= warmup:
                seconds[name].append(elapsed)
    return seconds


def peak_memory(call: Callable[[], object], prepare: Callable[[], object] | None = None) -> int:
    """Bytes by which the resident memory of a fresh process grew at its highest while it ran `call`. Linux only.

    The process is spawned, not forked: freed memory of this one, which `call` could take up again unseen, is not in it.
    So both callables must be importable: functions of a module, or functools.partial of them. `prepare` runs there
    first, uncounted, and its result is kept alive: inputs, or a tiny call that loads the libraries. Device memory is
    not seen. Raises RuntimeError if the process ended without an answer; its own traceback is on standard error.
    """
    return in_process(_growth, call, prepare)


def _growth(call: Callable[[], object], prepare: Callable[[], object] | None) -> int:
    kept = prepare() if prepare is not None else None
    reset_high_water_mark()
    before = psutil.Process().memory_info().rss
    call()
    growth = max(0, high_water_mark() - before)
    del kept
    return growth


def in_process(function: Callable[..., T], *args: Any) -> T:
    """What `function(*args)` returns in a fresh process. All of it must be importable. Raises RuntimeError if the
    process ended without an answer; its own traceback is on standard error."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(function, args, sender))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        child.join()
        raise RuntimeError(f"the measured process ended with exit code {child.exitcode} and no answer") from None
    finally:
        child.join()


def _answer(function: Callable[..., Any], args: tuple[Any, ...], sender: Connection) -> None:
    sender.send(function(*args))


def high_water_mark() -> int:
    """Highest resident size of this process since the last reset, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def reset_high_water_mark() -> None:
    """Starts VmHWM again at the present size. Where the kernel forbids it, growth includes what start-up peaked at."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _readable(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
