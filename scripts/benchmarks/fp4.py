"""FP4 linear on the CPU against torch's BF16 linear, on matrices that come from memory: speed-ups and bandwidth.

Both multiply the same bfloat16 activations by 8192 x 4096 weights. What is timed is a pass over several weights, which
together exceed the last cache several times, so that none is still there when its turn comes again. Settings: threads
(all cores), repeats (15) and matrices (8).

The machine's streaming bandwidth is the best of three ways of reading a large buffer, taken in turn with the products
that it is compared with. The rate of torch's own large
BF16 product is printed because it is a limit: FP4 weights are multiplied exactly, so no batch that computing bounds can
be faster than that rate.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch
from torch.nn import functional

from opd.fp4 import Fp4Linear, quantize
from opd.kernels import cpu
from scripts.benchmarks import Figure, interleaved, report, split_arguments, whole_numbers

OUTPUTS, INPUTS = 8192, 4096
BARS = {1: 4.0, 8: 3.0, 64: 1.5}  # batch -> speed-up over BF16
BANDWIDTH_BAR, BYTES_BAR = 0.7, 3.7
BUFFER_BYTES = 128 << 20
SQUARE = 2048
DEFAULTS = {"threads": len(os.sched_getaffinity(0)), "repeats": 15, "matrices": 8}


def main(argv: list[str]) -> int:
    """The exit status of `report`. Raises ConfigError for settings that are refused."""
    as_json, overrides = split_arguments(argv)
    settings = whole_numbers(overrides, DEFAULTS)
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
    plain = [partial(functional.linear, weight=weight) for weight in weights]
    num_bytes = sum(buffer.nbytes for buffer in linears[0].buffers())
    ratio = weights[0].nbytes / num_bytes
    rate = bf16_rate()
    figures = [
        Figure(name="weight bytes ratio", value=ratio, unit="x", bar=f">= {BYTES_BAR}", ok=ratio >= BYTES_BAR),
        Figure(name="torch's largest bf16 rate", value=rate / 1e9, unit="GFLOP/s"),
    ]
    for batch, bar in BARS.items():
        x = torch.randn(batch, INPUTS, generator=generator).bfloat16()
        passes = {"fp4": over_all(linears, x), "bf16": over_all(plain, x)}
        seconds = interleaved(passes, max(5, repeats // (1 + batch // 16)))
        fp4, bf16 = (median(seconds[name]) / num_matrices for name in ("fp4", "bf16"))
        flops = 2 * batch * OUTPUTS * INPUTS
        figures += [
            Figure(name=f"batch {batch}: bf16", value=bf16 * 1e3, unit="ms"),
            Figure(name=f"batch {batch}: fp4", value=fp4 * 1e3, unit="ms"),
            Figure(name=f"batch {batch}: speed-up", value=bf16 / fp4, unit="x", bar=f">= {bar}", ok=bf16 / fp4 >= bar),
            Figure(name=f"batch {batch}: bf16's share of rate", value=flops / bf16 / rate, unit="share"),
            Figure(name=f"batch {batch}: fp4's share of rate", value=flops / fp4 / rate, unit="share"),
        ]
    alone = over_all(linears, torch.randn(1, INPUTS, generator=generator).bfloat16())
    seconds = interleaved({"fp4": alone, **streams()}, repeats)
    bandwidth = BUFFER_BYTES / min(median(times) for name, times in seconds.items() if name != "fp4")
    share = num_bytes * num_matrices / median(seconds["fp4"]) / bandwidth
    bar_text = f">= {BANDWIDTH_BAR}"
    figures += [
        Figure(name="streaming bandwidth", value=bandwidth / 1e9, unit="GB/s"),
        Figure(name="batch 1: share of it", value=share, unit="share", bar=bar_text, ok=share >= BANDWIDTH_BAR),
    ]
    return figures


def over_all(maps: Sequence[Callable[[torch.Tensor], torch.Tensor]], x: torch.Tensor) -> Callable[[], None]:
    """Each call multiplies x by every one of the maps."""

    def multiply() -> None:
        for apply in maps:
            apply(x)

    return multiply


def streams() -> dict[str, Callable[[], None]]:
    """Ways of reading a buffer of BUFFER_BYTES, which no cache holds."""
    buffer = torch.ones(BUFFER_BYTES // 4)
    half = len(buffer) // 2

    def total() -> None:
        buffer.sum()

    def product() -> None:
        torch.dot(buffer[:half], buffer[half:])

    def largest() -> None:
        buffer.view(torch.int64).max()

    return {"sum": total, "dot": product, "max": largest}


def bf16_rate() -> float:
    """Floating-point operations a second of torch's BF16 product of square matrices."""
    matrix = torch.randn(SQUARE, SQUARE).bfloat16()

    def square() -> None:
        torch.mm(matrix, matrix)

    return 2 * SQUARE**3 / median(interleaved({"square": square}, repeats=7)["square"])
