"""Sampling on the CPU as one pass over the logits: a token for every row, and its log-probability.

What a chain of tensor operations takes six passes and as many large temporaries for. The plain way, which is what other
devices and truncated distributions take, is in `rollout.sampling`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opd.kernels.library import operators


def usable(*tensors: Tensor) -> bool:
    """Whether tensors like these can go through this file."""
    return all(tensor.is_cpu and tensor.dtype == torch.float32 for tensor in tensors) and operators() is not None


def draw(logits: Tensor, keys: Tensor, positions: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """float32 [N, V], int64 [N] each, above 0 -> tokens int32 [N], their log-probabilities float32 [N], nats.

    A token is the first at which softmax(logits / temperature), summed up in double precision, exceeds output
    `position` of the SplitMix64 generator that starts at the key; -1 for a row that holds something that is not finite.
    """
    ops: Any = operators()
    return _columns(ops.draw(logits.contiguous(), keys.contiguous(), positions.contiguous(), temperature))


def draw_next(
    hidden: Tensor, head: Tensor, keys: Tensor, positions: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The same of the logits hidden [N, D] times head [V, D], transposed, which need not all exist at once."""
    ops: Any = operators()
    return _columns(ops.draw_next(hidden.contiguous(), head, keys.contiguous(), positions.contiguous(), temperature))


def _columns(drawn: Tensor) -> tuple[Tensor, Tensor]:
    tokens, logprobs = drawn.unbind()
    return tokens, logprobs.view(torch.float32)
