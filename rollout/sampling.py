"""From logits to a token, by noise that is a function of (seed, trajectory, position) and of nothing else.

One uniform number per token, inverted through the cumulative distribution: a resumed, re-batched or re-routed request
draws what it would have drawn anyway. Nothing here depends on a generator's state.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from opd.config import SamplingConfig
from opd.kernels import draw as compiled
from opd.kernels.products import linear
from rollout.request import NO_SAMPLES, Samples

GOLDEN_GAMMA = -7046029254386353131  # SplitMix64's increment 0x9E3779B97F4A7C15 and multipliers, as signed numbers
MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def trajectory_key(trajectory_id: str, seed: int) -> int:
    """A signed 64-bit number that stands for the trajectory's noise stream."""
    digest = hashlib.blake2b(f"{seed}/{trajectory_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def uniform(keys: Tensor, positions: Tensor) -> Tensor:
    """Numbers in (0, 1), ends excluded, float64 [N], from int64 keys [N] and token positions [N].

    Output `position` of the SplitMix64 generator that starts at the key; products wrap on purpose.
    """
    state = keys + (positions + 1) * GOLDEN_GAMMA
    state = (state ^ _shift(state, 30)) * MIX_1
    state = (state ^ _shift(state, 27)) * MIX_2
    state = state ^ _shift(state, 31)
    # 52 bits and a half: of 53 the largest would round to 1.
    return (_shift(state, 12).to(torch.float64) + 0.5) * 2.0**-52


def _shift(state: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64, whose own shift keeps the sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


class Draws(NamedTuple):
    """One token per row, on the device it was drawn on."""

    tokens: Tensor  # integers [N]
    logprobs: Tensor  # float32 [N], of the distribution they were drawn from
    untruncated_logprobs: Tensor  # float32 [N], before truncation; without it the same tensor
    kept: Tensor | None  # bool [N, V], the ids that truncation kept; None without it

    def samples(self) -> Samples:
        """The same on the host: one trip there, and two more for what truncation kept."""
        columns = [self.tokens.to(torch.int32), self.logprobs.view(torch.int32)]
        if self.kept is None:
            # On a CPU they are there.
            here = columns if self.tokens.is_cpu else torch.stack(columns).cpu()
            tokens, logprobs = (column.numpy() for column in here)
            return Samples(
                token_ids=tokens,
                logprobs=logprobs.view(np.float32),
                untruncated_logprobs=logprobs.view(np.float32),
                kept_counts=np.zeros(len(tokens), np.int32),
                kept_ids=NO_SAMPLES.kept_ids,
            )
        columns += [self.untruncated_logprobs.view(torch.int32), self.kept.sum(-1, dtype=torch.int32)]
        tokens, logprobs, untruncated, counts = torch.stack(columns).cpu().numpy()
        return Samples(
            token_ids=tokens,
            logprobs=logprobs.view(np.float32),
            untruncated_logprobs=untruncated.view(np.float32),
            kept_counts=counts,
            kept_ids=self.kept.nonzero()[:, 1].to(torch.int32).cpu().numpy(),
        )


def sample(logits_NV: Tensor, keys_N: Tensor, positions_N: Tensor, sampling: SamplingConfig) -> Draws:
    """One token per row, with its log-probability under the distribution it was drawn from and before truncation.

    Order: temperature, top-k, top-p, min-p, draw; of equal logits the lower id comes first. At temperature 0 the token
    is the arg max and its log-probability is the one at temperature 1, since a point mass has nothing to compare with.
    Logits are taken to float32, the cumulative sum to float64. Raises ValueError for logits that are not finite.
    """
    logits = logits_NV.float()
    if _is_plain(sampling) and compiled.usable(logits):
        tokens, logprobs = compiled.draw(logits, keys_N, positions_N, sampling.temperature)
        if len(tokens) and int(tokens.min()) < 0:
            _refuse(logits)
        return Draws(tokens, logprobs, logprobs, None)
    # One pass for the usual case: the extremes of a tensor that holds a NaN or an infinity are not finite.
    if not torch.isfinite(torch.stack(logits.aminmax())).all():
        _refuse(logits)
    if sampling.temperature == 0.0:
        tokens = logits.argmax(-1)
        logprobs = torch.log_softmax(logits, -1).gather(1, tokens[:, None])[:, 0]
        return Draws(tokens, logprobs, logprobs, None)
    if sampling.temperature != 1.0:
        logits = logits / sampling.temperature
    if not truncates(sampling):
        p = logits.softmax(-1)
        tokens = _draw(p, keys_N, positions_N)
        logprobs = p.gather(1, tokens)[:, 0].log()
        return Draws(tokens[:, 0], logprobs, logprobs, None)
    untruncated = logits.log_softmax(-1)
    kept = _kept(untruncated, sampling)
    log_p = untruncated.masked_fill(~kept, -torch.inf).log_softmax(-1)
    tokens = _draw(log_p.exp(), keys_N, positions_N)
    logprobs, before = (values.gather(1, tokens)[:, 0] for values in (log_p, untruncated))
    return Draws(tokens[:, 0], logprobs, before, kept)


def sample_next(
    hidden_ND: Tensor, head_VD: Tensor, keys_N: Tensor, positions_N: Tensor, sampling: SamplingConfig
) -> Draws:
    """As `sample`, from what the output head is multiplied by."""
    if _is_plain(sampling) and compiled.usable(hidden_ND, head_VD):
        tokens, logprobs = compiled.draw_next(hidden_ND, head_VD, keys_N, positions_N, sampling.temperature)
        if not len(tokens) or int(tokens.min()) >= 0:
            return Draws(tokens, logprobs, logprobs, None)
    return sample(linear(hidden_ND.float(), head_VD.float()), keys_N, positions_N, sampling)


def _is_plain(sampling: SamplingConfig) -> bool:
    return sampling.temperature > 0.0 and not truncates(sampling)


def _refuse(logits: Tensor) -> NoReturn:
    row = int((~torch.isfinite(logits)).any(-1).nonzero()[0])
    raise ValueError(f"the policy's logits are not finite (row {row}); the published weights are damaged")


def _draw(p_NV: Tensor, keys_N: Tensor, positions_N: Tensor) -> Tensor:
    """The first token of each row, int64 [N, 1], at which the cumulative distribution exceeds the noise."""
    cumulative = p_NV.cumsum(-1, dtype=torch.float64)
    # The last entry is the total, 1 but for rounding. The largest noise is 1 - 2^-53, whose product with it rounds to
    # less: the draw ends at an entry that adds something to the sum, so never at one that was cut off.
    threshold = uniform(keys_N, positions_N)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)


def truncates(sampling: SamplingConfig) -> bool:
    """Whether some ids may be cut off. Greedy decoding has nothing to cut."""
    return sampling.temperature > 0.0 and bool(sampling.top_k or sampling.top_p < 1.0 or sampling.min_p > 0.0)


def _kept(log_p: Tensor, sampling: SamplingConfig) -> Tensor:
    """The k likeliest, of these the shortest prefix with mass top_p, of these the ones not below min_p times the
    likeliest."""
    kept = torch.ones_like(log_p, dtype=torch.bool)
    if sampling.top_k or sampling.top_p < 1.0:
        ordered, ids = log_p.sort(dim=-1, descending=True, stable=True)
        drop = torch.zeros_like(kept)
        if sampling.top_k:
            drop[:, sampling.top_k :] = True
        if sampling.top_p < 1.0:
            mass = ordered.masked_fill(drop, -torch.inf).softmax(-1).cumsum(-1, dtype=torch.float64)
            drop[:, 1:] |= mass[:, :-1] >= sampling.top_p
        kept = kept.scatter(-1, ids, ~drop)
    if sampling.min_p > 0.0:
        kept &= log_p >= log_p.amax(-1, keepdim=True) + math.log(sampling.min_p)
    return kept
