"""Continuous batching for the V4 student: requests join and leave a fixed set of slots between two decoding steps.

One prompt is read once: the samples of its group get a copy of its cache. The decoding path is tensors over the active
slots; Python touches a request when it is admitted and when it has ended, not for every token. Results do not depend
on the number of slots or on the order of requests, except for floating-point rounding in the logits.

Consumes requests, produces trajectories in the order of the requests, waits for nobody. Left out: preemption and the
write-ahead log; every slot has pages for a sequence of the longest kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from opd.config import SamplingConfig
from opd.model import DeepseekV4
from opd.types import FinishReason, Trajectory, VersionSpan
from rollout.sampling import sample, trajectory_key

PREFILL_TOKENS = 8192  # padded prompt tokens read in one call
REFILL_SHARE = 4  # requests join when one slot in so many is free: reading one prompt costs nearly a decoding step


@dataclass(slots=True, kw_only=True, frozen=True)
class Request:
    """One trajectory to produce. Neighbours with the same tokens share one reading of their prompt."""

    trajectory_id: str
    prompt_id: str
    domain: str
    token_ids: tuple[int, ...]


def check_prompts(requests: Sequence[Request], max_tokens: int) -> None:
    """Raises ValueError for an empty prompt and for one that leaves no room for a token."""
    for request in requests:
        if not 1 <= len(request.token_ids) < max_tokens:
            raise ValueError(
                f"prompt {request.prompt_id} has {len(request.token_ids)} tokens; the engine takes 1 to "
                f"{max_tokens - 1}"
            )


def finished(
    request: Request, sampled: np.ndarray, logprobs: np.ndarray, version: int, reason: FinishReason
) -> Trajectory:
    """The record of a completed request: `sampled` ids [S] and their `logprobs` [S]."""
    prompt = len(request.token_ids)
    return Trajectory(
        id=request.trajectory_id,
        prompt_id=request.prompt_id,
        domain=request.domain,
        token_ids=np.concatenate((request.token_ids, sampled)).astype(np.int32),
        loss_mask=np.arange(prompt + len(sampled)) >= prompt,
        sampler_logprobs=np.concatenate((np.zeros(prompt), logprobs)).astype(np.float32),
        version_spans=(VersionSpan(start=prompt, policy_version=version),),
        finish_reason=reason,
    )


class V4Engine:
    """Samples from a `DeepseekV4`, whose weights may be replaced between two calls of `generate`."""

    def __init__(
        self, model: DeepseekV4, *, num_slots: int, max_tokens: int, stop_ids: Sequence[int], seed: int
    ) -> None:
        """`max_tokens` of prompt and completion together; `stop_ids` end a completion and are part of it."""
        device, width = model.head.device, model.head.shape[1]
        self.model, self.num_slots, self.max_tokens, self.seed = model.eval(), num_slots, max_tokens, seed
        # The slot after the last belongs to no request: it keeps the prompt of a group that waits for more slots.
        self.shelf = num_slots
        self.cache = model.new_cache(num_slots + 1, max_tokens)
        self.prompt_hidden = torch.zeros(num_slots + 1, width, dtype=model.head.dtype, device=device)
        self.stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=device)
        self.lengths = torch.zeros(num_slots, dtype=torch.int64, device=device)  # tokens in the cache
        self.ends = np.zeros(num_slots, dtype=np.int64)  # the same, on the host
        self.limits = torch.zeros_like(self.lengths)  # tokens a finished trajectory may have at most
        self.keys = torch.zeros_like(self.lengths)  # noise stream of the slot's trajectory
        self.tokens = torch.zeros(num_slots, max_tokens, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(num_slots, max_tokens, dtype=torch.float32, device=device)
        self.prefilled_tokens = 0  # prompt tokens read by the last call, shared ones counted once

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], sampling: SamplingConfig, policy_version: int) -> list[Trajectory]:
        """One trajectory per request, in their order.

        Raises ValueError for a prompt that leaves no room for a token and for weights that give logits which are not
        finite.
        """
        check_prompts(requests, self.max_tokens)
        self.prefilled_tokens = 0
        results: dict[int, Trajectory] = {}
        occupants: dict[int, int] = {}  # slot -> index of its request
        free = list(range(self.num_slots))
        active = np.empty(0, dtype=np.int64)  # the occupied slots, on the host
        waiting = 0
        while len(results) < len(requests):
            left = len(requests) - waiting
            if left and (not occupants or len(free) >= min(left, max(1, self.num_slots // REFILL_SHARE))):
                slots, free = free[:left], free[left:]
                occupants.update(zip(slots, range(waiting, waiting + len(slots)), strict=True))
                admitted = self._admit(requests, waiting, slots, sampling)
                waiting += len(slots)
                going, ended = self._split(admitted)
                active = np.concatenate((active, going))
            else:
                self._decode(active, sampling)
                active, ended = self._split(active)
            self.cache.release([slot for slot, _ in ended])
            for slot, reason in ended:
                index = occupants.pop(slot)
                results[index] = self._collect(slot, requests[index], policy_version, reason)
                free.append(slot)
        return [results[index] for index in range(len(requests))]

    def _admit(self, requests: Sequence[Request], begin: int, slots: list[int], sampling: SamplingConfig) -> np.ndarray:
        """Seats requests[begin : begin + len(slots)] and draws their first tokens; returns the slots.

        A prompt is read by the first of the neighbours that share it, which the others copy. If the group goes on
        behind the last slot, its prompt stays on the shelf for the next call.
        """
        device, end = self.lengths.device, begin + len(slots)
        admitted = requests[begin:end]
        num_tokens = [len(request.token_ids) for request in admitted]
        prompts = np.zeros((len(slots), max(num_tokens)), dtype=np.int64)
        readers: list[int] = []
        sources: list[int] = []  # the slot that holds each one's prompt
        for row, request in enumerate(admitted):
            prompts[row, : num_tokens[row]] = request.token_ids
            if begin + row and request.token_ids == requests[begin + row - 1].token_ids:
                sources.append(sources[-1] if row else self.shelf)
            else:
                readers.append(row)
                sources.append(slots[row])
        at_slots, source, lengths, token_ids = (
            torch.as_tensor(values, device=device) for values in (slots, sources, num_tokens, prompts)
        )
        if readers:
            self._prefill(np.array(slots)[readers], prompts[readers], np.array(num_tokens)[readers])
            self.prefilled_tokens += sum(num_tokens[row] for row in readers)
        copied = [row for row in range(len(slots)) if sources[row] != slots[row]]
        self.cache.fork([sources[row] for row in copied], [slots[row] for row in copied])
        hidden = self.prompt_hidden[source]
        if end < len(requests) and sources[-1] != self.shelf and admitted[-1].token_ids == requests[end].token_ids:
            self.cache.fork(sources[-1:], [self.shelf])
            self.prompt_hidden[self.shelf] = hidden[-1]
        self.ends[slots] = num_tokens
        self.tokens[at_slots, : token_ids.shape[1]] = token_ids
        self.lengths[at_slots] = lengths
        self.limits[at_slots] = (lengths + sampling.max_new_tokens).clamp(max=self.max_tokens)
        self.keys[at_slots] = torch.tensor(
            [trajectory_key(request.trajectory_id, self.seed) for request in admitted], device=device
        )
        self._draw(at_slots, hidden, sampling)
        return np.array(slots)

    def _prefill(self, slots: np.ndarray, prompts: np.ndarray, lengths: np.ndarray) -> None:
        """Reads right-padded prompts [B, T] into their slots' caches and keeps their last hidden state."""
        rows_at_once = max(1, PREFILL_TOKENS // prompts.shape[1])
        for begin in range(0, len(slots), rows_at_once):
            part = slice(begin, begin + rows_at_once)
            at = self.cache.extension(slots[part], np.zeros_like(lengths[part]), lengths[part])
            token_ids = torch.as_tensor(prompts[part, : at.positions.shape[1]], device=at.slots.device)
            hidden = self.model.extend(token_ids, self.cache, at)
            self.prompt_hidden[at.slots] = hidden[torch.arange(len(at.slots), device=at.slots.device), at.lengths - 1]

    def _decode(self, slots: np.ndarray, sampling: SamplingConfig) -> None:
        """One more token for every slot: feed the last one drawn, draw the next."""
        at = self.cache.extension(slots, self.ends[slots], np.ones_like(slots))
        hidden = self.model.extend(self.tokens[at.slots, at.starts][:, None], self.cache, at)
        self.ends[slots] += 1
        self.lengths[at.slots] = at.starts + 1
        self._draw(at.slots, hidden[:, 0], sampling)

    def _draw(self, slots: torch.Tensor, hidden: torch.Tensor, sampling: SamplingConfig) -> None:
        """Draws the token that follows the cached ones, at index `lengths`; it is not in the cache yet."""
        logits = torch.nn.functional.linear(hidden.float(), self.model.head.float())
        positions = self.lengths[slots]
        tokens, logprobs = sample(logits, self.keys[slots], positions, sampling)
        self.tokens[slots, positions] = tokens
        self.logprobs[slots, positions] = logprobs

    def _split(self, slots: np.ndarray) -> tuple[np.ndarray, list[tuple[int, FinishReason]]]:
        """The slots that go on, and those whose last token is a stop token or the last one allowed, with the reason."""
        at = torch.as_tensor(slots, device=self.lengths.device)
        positions = self.lengths[at]
        stopped = torch.isin(self.tokens[at, positions], self.stop_ids)
        # One trip to the host for both answers.
        over, stop = torch.stack((stopped | (positions + 1 >= self.limits[at]), stopped)).cpu().numpy()
        return slots[~over], [
            (int(slot), "stop" if by_token else "length")
            for slot, by_token in zip(slots[over], stop[over], strict=True)
        ]

    def _collect(self, slot: int, request: Request, version: int, reason: FinishReason) -> Trajectory:
        sampled = slice(len(request.token_ids), int(self.lengths[slot]) + 1)
        return finished(
            request,
            self.tokens[slot, sampled].cpu().numpy(),
            self.logprobs[slot, sampled].cpu().numpy(),
            version,
            reason,
        )
