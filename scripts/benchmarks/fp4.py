"""FP4 linear on the CPU against torch's BF16 linear, on matrices that come from memory: speed-ups and bandwidth.

Both multiply the same bfloat16 activations by 8192 x 4096 weights. Several weights are used in turn, so that none is
still in a cache when its turn comes again. Settings: threads (all cores), repeats (41), and `matrices`, whose weights
together should exceed the last cache several times.

The machine's streaming bandwidth is the best of three ways of reading a large buffer. The rate of torch's own large
BF16 product is printed because it is a limit: FP4 weights are multiplied exactly, so no batch that computing bounds can
be faster than that rate.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from statistics import median

import torch

from opd.fp4 import Fp4Linear, quantize
from opd.kernels import cpu
from scripts.benchmarks import Figure, interleaved, report, split_arguments

OUTPUTS, INPUTS = 8192, 4096
BARS = {1: 4.0, 8: 3.0, 64: 1.5}  # batch -> speed-up over BF16
BANDWIDTH_BAR, BYTES_BAR = 0.7, 3.7
BUFFER_BYTES = 256 << 20
DEFAULTS = {"threads": len(os.sched_getaffinity(0)), "repeats": 41, "matrices": 6}


def main(argv: list[str]) -> int:
    """The exit status of `report`, or 2 for settings that are refused."""
    as_json, overrides = split_arguments(argv)
    settings = dict(DEFAULTS)
    for override in overrides:
        key, _, value = override.partition("=")
        if key not in settings or not value.isdecimal() or int(value) < 1:
            print(f"fp4: {override!r} is not one of {', '.join(settings)} and a whole number above 0", file=sys.stderr)
            return 2
        settings[key] = int(value)
    torch.set_num_threads(settings["threads"])
    with torch.inference_mode():
        figures = measure(settings["repeats"], settings["matrices"])
    path = (cpu.paths() or ("plain torch",))[0]
    title = f"FP4 linear {OUTPUTS} x {INPUTS}, path {path}, {settings['threads']} thread(s), bfloat16 activations"
    return report(title, figures, as_json)


def measure(repeats: int, num_matrices: int) -> list[Figure]:
    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.randn(OUTPUTS, INPUTS, generator=generator).mul_(INPUTS**-0.5).bfloat16() for _ in range(num_matrices)
    ]
    linears = [Fp4Linear(quantize(weight)) for weight in weights]
    num_bytes = sum(buffer.nbytes for buffer in linears[0].buffers())
    ratio = weights[0].nbytes / num_bytes
    bandwidth = streaming_bandwidth()
    rate = bf16_rate()
    figures = [
        Figure(name="weight bytes ratio", value=ratio, unit="x", bar=f">= {BYTES_BAR}", ok=ratio >= BYTES_BAR),
        Figure(name="streaming bandwidth", value=bandwidth / 1e9, unit="GB/s"),
        Figure(name="torch's largest bf16 rate", value=rate / 1e9, unit="GFLOP/s"),
    ]
    for batch, bar in BARS.items():
        x = torch.randn(batch, INPUTS, generator=generator).bfloat16()
        fp4, bf16 = [median(times) for times in timed(x, linears, weights, max(5, repeats // (1 + batch // 16)))]
        figures += [
            Figure(name=f"batch {batch}: bf16", value=bf16 * 1e3, unit="ms"),
            Figure(name=f"batch {batch}: fp4", value=fp4 * 1e3, unit="ms"),
            Figure(name=f"batch {batch}: speed-up", value=bf16 / fp4, unit="x", bar=f">= {bar}", ok=bf16 / fp4 >= bar),
        ]
        if batch == 1:
            share = num_bytes / fp4 / bandwidth
            bar_text = f">= {BANDWIDTH_BAR}"
            figures.append(
                Figure(
                    name="batch 1: share of bandwidth",
                    value=share,
                    unit="share",
                    bar=bar_text,
                    ok=share >= BANDWIDTH_BAR,
                )
            )
        else:
            flops = 2 * batch * OUTPUTS * INPUTS
            figures.append(Figure(name=f"batch {batch}: share of rate", value=flops / fp4 / rate, unit="share"))
            figures.append(Figure(name=f"batch {batch}: bf16's share of rate", value=flops / bf16 / rate, unit="share"))
    return figures


def timed(
    x: torch.Tensor, linears: list[Fp4Linear], weights: list[torch.Tensor], repeats: int
) -> tuple[list[float], list[float]]:
    """Seconds of FP4's and of BF16's products, taken in turn, each with the next of its matrices."""
    turns = [0, 0]

    def fp4() -> None:
        turns[0] += 1
        linears[turns[0] % len(linears)](x)

    def bf16() -> None:
        turns[1] += 1
        torch.nn.functional.linear(x, weights[turns[1] % len(weights)])

    seconds = interleaved({"fp4": fp4, "bf16": bf16}, repeats, warmup=3)
    return seconds["fp4"], seconds["bf16"]


def streaming_bandwidth() -> float:
    """Bytes a second of reading a buffer that no cache holds: the best median of three ways of doing it."""
    buffer = torch.ones(BUFFER_BYTES // 4)
    half = len(buffer) // 2
    ways: dict[str, Callable[[], object]] = {
        "sum": buffer.sum,
        "dot": lambda: torch.dot(buffer[:half], buffer[half:]),
        "max": buffer.view(torch.int64).max,
    }
    seconds = interleaved({name: _discard(way) for name, way in ways.items()}, repeats=9)
    return BUFFER_BYTES / min(median(times) for times in seconds.values())


def bf16_rate() -> float:
    """Floating-point operations a second of torch's BF16 product of square matrices."""
    size = 2048
    matrix = torch.randn(size, size).bfloat16()
    seconds = interleaved({"square": _discard(lambda: matrix @ matrix)}, repeats=5)
    return 2 * size**3 / median(seconds["square"])


def _discard(call: Callable[[], object]) -> Callable[[], None]:
    def discarding() -> None:
        call()

    return discarding
