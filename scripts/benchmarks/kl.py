"""The exact KL from hidden states against the matrix products it cannot avoid: extra memory, and time over theirs.

One forward and backward of the reverse KL of 4096 tokens over a vocabulary of 129,280, student and teacher 1024 wide,
in float32. Its products are six: both logits, both again in the backward (nobody holds them), and the two gradients.
They are timed alone, in turn with the loss, with the loss's own tiles and with the fastest of several shapes of tiles;
the faster of the two is what the loss is measured by. On a machine that does other work besides, the same ratio in
processor time is steadier, so it is printed too. Memory is the growth of a fresh process beyond inputs and gradients.

Settings: threads (all cores), repeats (2), tokens, vocab, width, tile_tokens and tile_vocab (those of the learner).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor

from opd.config import LearnerConfig
from opd.divergence import compare
from opd.kernels.products import matmul
from scripts.benchmarks import Figure, interleaved, peak_memory, report, split_arguments, whole_numbers

TIME_BAR, MEMORY_BAR = 1.25, 200e6
SHAPES = ((256, 1024), (512, 4096), (1024, 2048), (1024, 8192), (4096, 2048))  # tiles tried for the products alone
DEFAULTS = {
    "threads": len(os.sched_getaffinity(0)),
    "repeats": 2,
    "tokens": 4096,
    "vocab": 129_280,
    "width": 1024,
    "tile_tokens": LearnerConfig().kl_tile_tokens,
    "tile_vocab": LearnerConfig().kl_tile_vocab,
}
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
_held: list[Inputs] = []  # the inputs of a process that is weighed


def main(argv: list[str]) -> int:
    """The exit status of `report`. Raises ConfigError for settings that are refused."""
    as_json, overrides = split_arguments(argv)
    settings = whole_numbers(overrides, DEFAULTS)
    torch.set_num_threads(settings["threads"])
    title = (
        f"reverse KL of {settings['tokens']} tokens over {settings['vocab']} entries, width {settings['width']}, tiles "
        f"of {settings['tile_tokens']} x {settings['tile_vocab']}, {settings['threads']} thread(s), float32"
    )
    return report(title, [*memory_figures(settings), *time_figures(settings)], as_json)


def make_inputs(settings: dict[str, int]) -> Inputs:
    """student hidden and head (with gradients), teacher hidden and head, targets."""
    generator = torch.Generator().manual_seed(0)
    tokens, vocab, width = settings["tokens"], settings["vocab"], settings["width"]

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, width, generator=generator)

    def head() -> Tensor:
        return normal(vocab).mul_(2 * width**-0.5)

    targets = torch.randint(vocab, (tokens,), generator=generator)
    return normal(tokens).requires_grad_(), head().requires_grad_(), normal(tokens), head(), targets


def loss_and_gradients(inputs: Inputs, settings: dict[str, int]) -> None:
    tiles = settings["tile_tokens"], settings["tile_vocab"]
    result = compare(*inputs, tile_tokens=tiles[0], tile_vocab=tiles[1])
    torch.autograd.grad(result.reverse_kl.mean(), inputs[:2])


def products(inputs: Inputs, tile_tokens: int, tile_vocab: int) -> None:
    """The six products of tiles alone, of whatever numbers, by the fastest products there are."""
    hidden, head, teacher_hidden, teacher_head = (tensor.detach() for tensor in inputs[:4])
    hidden_grad, head_grad = torch.zeros_like(hidden), torch.zeros_like(head)
    memory = torch.empty(2, min(tile_tokens, len(hidden)) * min(tile_vocab, len(head)))
    for backward in (False, True):
        sides = (head.split(tile_vocab), teacher_head.split(tile_vocab), head_grad.split(tile_vocab))
        for rows, teacher_rows, rows_grad in zip(*sides, strict=True):
            groups = (hidden.split(tile_tokens), teacher_hidden.split(tile_tokens), hidden_grad.split(tile_tokens))
            for states, teacher_states, states_grad in zip(*groups, strict=True):
                shape = (len(states), len(rows))
                z, u = (part[: shape[0] * shape[1]].view(shape) for part in memory)
                matmul(states, rows.T, z)
                matmul(teacher_states, teacher_rows.T, u)
                if backward:
                    matmul(z, rows, states_grad, add=True)
                    matmul(z.T, states, rows_grad, add=True)


def time_figures(settings: dict[str, int]) -> list[Figure]:
    inputs = make_inputs(settings)
    # The shapes are compared on a part of the vocabulary, which is enough to tell them apart.
    part = (inputs[0], inputs[1].detach()[:8192], inputs[2], inputs[3][:8192], inputs[4])
    own = settings["tile_tokens"], settings["tile_vocab"]
    trials = interleaved({f"{t} x {v}": partial(products, part, t, v) for t, v in SHAPES}, 2)
    best = min(trials, key=lambda name: min(trials[name]))
    shape = next(shape for shape in SHAPES if f"{shape[0]} x {shape[1]}" == best)
    processor: dict[str, list[float]] = {"loss": [], "own": [], "best": []}

    def clocked(name: str, call: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            started = time.process_time()
            call()
            processor[name].append(time.process_time() - started)

        return run

    calls: dict[str, Callable[[], None]] = {
        "loss": clocked("loss", partial(loss_and_gradients, inputs, settings)),
        "own": clocked("own", partial(products, inputs, *own)),
        "best": clocked("best", partial(products, inputs, *shape)),
    }
    seconds = interleaved(calls, settings["repeats"], warmup=0)
    flops = 2 * 6 * settings["tokens"] * settings["vocab"] * settings["width"]
    fastest = [min(pair) for pair in zip(seconds["own"], seconds["best"], strict=True)]
    ratio = over_products(seconds)
    return [
        Figure(name="loss and gradients", value=median(seconds["loss"]), unit="s"),
        Figure(name="products alone, own tiles", value=median(seconds["own"]), unit="s"),
        Figure(name=f"products alone, tiles of {best}", value=median(seconds["best"]), unit="s"),
        Figure(name="rate of the products", value=flops / median(fastest) / 1e9, unit="GFLOP/s"),
        Figure(name="time over the products'", value=ratio, unit="x", bar=f"<= {TIME_BAR}", ok=ratio <= TIME_BAR),
        Figure(name="processor time over theirs", value=over_products(processor), unit="x"),
    ]


def over_products(seconds: dict[str, list[float]]) -> float:
    """The median, over repeats, of the loss's time over that of the faster products of the same turn."""
    turns = zip(seconds["loss"], seconds["own"], seconds["best"], strict=True)
    return median(loss / min(own, best) for loss, own, best in turns)


def memory_figures(settings: dict[str, int]) -> list[Figure]:
    growth = peak_memory(partial(weighed, settings), partial(prepare, settings))
    gradients = 4 * settings["width"] * (settings["tokens"] + settings["vocab"])
    extra = growth - gradients
    dense = 2 * 4 * settings["tokens"] * settings["vocab"]
    bar = f"< {MEMORY_BAR / 1e6:.0f}"
    return [
        Figure(name="gradients", value=gradients / 1e6, unit="MB"),
        Figure(name="memory beyond them", value=extra / 1e6, unit="MB", bar=bar, ok=extra < MEMORY_BAR),
        Figure(name="both logits in float32", value=dense / 1e6, unit="MB"),
    ]


def prepare(settings: dict[str, int]) -> None:
    """Inputs into `_held`, and one small call that loads what the libraries load."""
    torch.set_num_threads(settings["threads"])
    _held.append(make_inputs(settings))
    small = settings | {"tokens": 8, "vocab": 64, "width": 16}
    loss_and_gradients(make_inputs(small), small)


def weighed(settings: dict[str, int]) -> None:
    loss_and_gradients(_held[0], settings)
