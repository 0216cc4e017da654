"""Continuous batching for the V4 student: requests join and leave a fixed set of slots at every decoding step.

One prompt is read once: the samples of its group get a copy of its cache. The decoding path is tensors over the active
slots; Python touches a request when it is admitted and when it is finished, not for every token. Results do not
depend on the number of slots or on the order of requests, except for floating-point rounding in the logits.

Consumes requests, produces trajectories in the order of the requests, waits for nobody. Left out: preemption and the
write-ahead log; the cache is a contiguous block per slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from opd.config import SamplingConfig
from opd.model import DeepseekV4
from opd.model.cache import Extension
from opd.types import FinishReason, Trajectory, VersionSpan
from rollout.sampling import sample, trajectory_key

PREFILL_TOKENS = 8192  # padded prompt tokens read in one call


@dataclass(slots=True, kw_only=True, frozen=True)
class Request:
    """One trajectory to produce. Requests with the same `prompt_id` must have the same tokens and be neighbours."""

    trajectory_id: str
    prompt_id: str
    domain: str
    token_ids: tuple[int, ...]


def finished(
    request: Request, token_ids: np.ndarray, logprobs: np.ndarray, version: int, reason: FinishReason
) -> Trajectory:
    """The record of a completed request: `token_ids` [T] whole, `logprobs` [S] of the sampled tail."""
    start = len(request.token_ids)
    mask = np.zeros(len(token_ids), dtype=bool)
    mask[start:] = True
    all_logprobs = np.zeros(len(token_ids), dtype=np.float32)
    all_logprobs[start:] = logprobs
    return Trajectory(
        id=request.trajectory_id,
        prompt_id=request.prompt_id,
        domain=request.domain,
        token_ids=token_ids.astype(np.int32),
        loss_mask=mask,
        sampler_logprobs=all_logprobs,
        version_spans=(VersionSpan(start=start, policy_version=version),),
        finish_reason=reason,
    )


class V4Engine:
    """Samples from a `DeepseekV4`, whose weights may be replaced between two calls of `generate`."""

    def __init__(self, model: DeepseekV4, *, num_slots: int, max_tokens: int, stop_ids: Sequence[int], seed: int):
        device = model.head.device
        self.model, self.num_slots, self.max_tokens, self.seed = model.eval(), num_slots, max_tokens, seed
        self.cache = model.new_cache(num_slots, max_tokens)
        self.stop_ids = torch.tensor(sorted(stop_ids), device=device)
        self.lengths = torch.zeros(num_slots, dtype=torch.int64, device=device)  # tokens in the cache
        self.limits = torch.zeros_like(self.lengths)  # tokens a finished trajectory may have at most
        self.keys = torch.zeros_like(self.lengths)  # noise stream of the slot's trajectory
        self.tokens = torch.zeros(num_slots, max_tokens, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(num_slots, max_tokens, dtype=torch.float32, device=device)
        self.prefilled_tokens = 0  # prompt tokens read by the last call, repeats not counted

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], sampling: SamplingConfig, policy_version: int) -> list[Trajectory]:
        """One trajectory per request, in their order.

        Raises ValueError for a prompt that leaves no room for a token.
        """
        for request in requests:
            if not 1 <= len(request.token_ids) < self.max_tokens:
                raise ValueError(
                    f"prompt {request.prompt_id} has {len(request.token_ids)} tokens; the engine takes 1 to "
                    f"{self.max_tokens - 1}"
                )
        self.prefilled_tokens = 0
        results: list[Trajectory | None] = [None] * len(requests)
        occupant = [-1] * self.num_slots  # slot -> index of its request
        free = list(range(self.num_slots - 1, -1, -1))
        waiting = 0
        active = self.lengths.new_empty(0)
        while waiting < len(requests) or len(free) < self.num_slots:
            if free and waiting < len(requests):
                count = min(len(free), len(requests) - waiting)
                slots = [free.pop() for _ in range(count)]
                admitted = range(waiting, waiting + count)
                for slot, index in zip(slots, admitted, strict=True):
                    occupant[slot] = index
                waiting += count
                self._admit(slots, [requests[index] for index in admitted], sampling)
                stepped = torch.tensor(slots, device=self.lengths.device)
                active = torch.cat((active, stepped))
            else:
                stepped = active
                self._decode(stepped, sampling)
            ended = self._ended(stepped)
            for slot, reason in ended:
                results[occupant[slot]] = self._collect(slot, requests[occupant[slot]], policy_version, reason)
                occupant[slot] = -1
                free.append(slot)
            if ended:
                active = active[~torch.isin(active, active.new_tensor([slot for slot, _ in ended]))]
        return [result for result in results if result is not None]

    def _admit(self, slots: list[int], requests: list[Request], sampling: SamplingConfig) -> None:
        """Reads each distinct prompt once, hands its cache to the samples that share it, draws their first tokens."""
        device = self.lengths.device
        firsts: list[int] = []  # index of each distinct prompt's first request
        owner: list[int] = []  # request -> index into firsts
        for i, request in enumerate(requests):
            if i == 0 or request.prompt_id != requests[i - 1].prompt_id:
                firsts.append(i)
            owner.append(len(firsts) - 1)
        last_hidden = []
        longest = max(len(request.token_ids) for request in requests)
        rows = max(1, PREFILL_TOKENS // longest)
        for begin in range(0, len(firsts), rows):
            chunk = firsts[begin : begin + rows]
            lengths = torch.tensor([len(requests[i].token_ids) for i in chunk], device=device)
            width = int(lengths.max())
            token_ids = torch.zeros(len(chunk), width, dtype=torch.int64, device=device)
            for row, i in enumerate(chunk):
                token_ids[row, : lengths[row]] = torch.tensor(requests[i].token_ids, device=device)
            at = Extension(
                torch.tensor([slots[i] for i in chunk], device=device),
                torch.zeros_like(lengths),
                lengths,
                torch.arange(width, device=device).expand(len(chunk), -1),
                width,
            )
            hidden = self.model.extend(token_ids, self.cache, at)
            last_hidden.append(hidden[torch.arange(len(chunk), device=device), lengths - 1])
            self.tokens[at.slots, :width] = token_ids
            self.prefilled_tokens += int(lengths.sum())
        copies = [(slots[firsts[owner[i]]], slots[i]) for i in range(len(requests)) if firsts[owner[i]] != i]
        if copies:
            source, destination = torch.tensor(copies, device=device).T
            self.cache.copy(source, destination)
            self.tokens[destination] = self.tokens[source]
        at_slots = torch.tensor(slots, device=device)
        prompt_tokens = torch.tensor([len(request.token_ids) for request in requests], device=device)
        self.lengths[at_slots] = prompt_tokens
        self.limits[at_slots] = (prompt_tokens + sampling.max_new_tokens).clamp(max=self.max_tokens)
        self.keys[at_slots] = torch.tensor([trajectory_key(r.trajectory_id, self.seed) for r in requests], device=device)
        self._draw(at_slots, torch.cat(last_hidden)[torch.tensor(owner, device=device)], sampling)

    def _decode(self, slots: torch.Tensor, sampling: SamplingConfig) -> None:
        """One more token for every slot: feed the last one drawn, draw the next."""
        starts = self.lengths[slots]
        at = Extension(slots, starts, torch.ones_like(starts), starts[:, None], int(starts.max()) + 1)
        hidden = self.model.extend(self.tokens[slots, starts][:, None], self.cache, at)
        self.lengths[slots] += 1
        self._draw(slots, hidden[:, 0], sampling)

    def _draw(self, slots: torch.Tensor, hidden: torch.Tensor, sampling: SamplingConfig) -> None:
        """Draws the token that follows the cached ones, at index `lengths`; it is not in the cache yet."""
        logits = torch.nn.functional.linear(hidden.float(), self.model.head.float())
        positions = self.lengths[slots]
        tokens, logprobs = sample(logits, self.keys[slots], positions, sampling)
        self.tokens[slots, positions] = tokens
        self.logprobs[slots, positions] = logprobs

    def _ended(self, slots: torch.Tensor) -> list[tuple[int, FinishReason]]:
        """The slots whose last token is a stop token or their last allowed one."""
        positions = self.lengths[slots]
        stopped = torch.isin(self.tokens[slots, positions], self.stop_ids)
        full = positions + 1 >= self.limits[slots]
        if not bool((stopped | full).any()):
            return []
        return [
            (slot, "stop" if stop else "length")
            for slot, stop, out in zip(slots.tolist(), stopped.tolist(), full.tolist(), strict=True)
            if stop or out
        ]

    def _collect(self, slot: int, request: Request, version: int, reason: FinishReason) -> Trajectory:
        end = int(self.lengths[slot]) + 1
        token_ids = self.tokens[slot, :end].cpu().numpy()
        logprobs = self.logprobs[slot, len(request.token_ids) : end].cpu().numpy()
        return finished(request, token_ids, logprobs, version, reason)
