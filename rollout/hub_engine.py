"""Batched sampling from any Hugging Face causal LM, behind the V4 engine's interface.

Prompts are left-padded into batches of `num_slots` rows, each distinct one read once, and decoded with transformers'
own cache; rows leave the cache as they end. The draw, the noise and the record are the V4 engine's. Left out: joining a
running batch (transformers' cache has one length for all rows).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import DynamicCache

from opd.config import SamplingConfig
from opd.model import HubModel
from opd.types import Trajectory
from rollout.engine import Request, check_prompts, finished
from rollout.sampling import sample, trajectory_key


class HubEngine:
    """Samples from a `HubModel`, whose weights may be replaced between two calls of `generate`."""

    def __init__(self, model: HubModel, *, num_slots: int, max_tokens: int, stop_ids: Sequence[int], seed: int) -> None:
        """`max_tokens` of prompt and completion together; `stop_ids` end a completion and are part of it."""
        self.model, self.num_slots, self.max_tokens, self.seed = model.eval(), num_slots, max_tokens, seed
        self.stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=model.head.device)

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], sampling: SamplingConfig, policy_version: int) -> list[Trajectory]:
        """One trajectory per request, in their order.

        Raises ValueError for a prompt that leaves no room for a token and for weights that give logits which are not
        finite.
        """
        check_prompts(requests, self.max_tokens)
        # Rows of one batch should be alike in length, or the short ones pay for the long ones' padding.
        order = sorted(range(len(requests)), key=lambda index: len(requests[index].token_ids))
        results: dict[int, Trajectory] = {}
        for begin in range(0, len(order), self.num_slots):
            indices = order[begin : begin + self.num_slots]
            batch = self._batch([requests[index] for index in indices], sampling, policy_version)
            results.update(zip(indices, batch, strict=True))
        return [results[index] for index in range(len(requests))]

    def _batch(self, requests: list[Request], sampling: SamplingConfig, policy_version: int) -> list[Trajectory]:
        device, count = self.model.head.device, len(requests)
        prompt_tokens = torch.tensor([len(request.token_ids) for request in requests], device=device)
        limits = (prompt_tokens + sampling.max_new_tokens).clamp(max=self.max_tokens)
        keys = torch.tensor([trajectory_key(r.trajectory_id, self.seed) for r in requests], device=device)
        tokens = torch.zeros(count, int((limits - prompt_tokens).max()), dtype=torch.int64, device=device)
        logprobs = torch.zeros(tokens.shape, dtype=torch.float32, device=device)
        num_sampled = torch.zeros_like(prompt_tokens)
        stopped = torch.zeros(count, dtype=torch.bool, device=device)
        hidden, mask, cache = self._read_prompts(requests)
        rows = torch.arange(count, device=device)  # the request of each row that is still in the cache
        for step in range(tokens.shape[1]):
            logits = torch.nn.functional.linear(hidden.float(), self.model.head.float())
            positions = prompt_tokens[rows] + step
            drawn, drawn_logprobs = sample(logits, keys[rows], positions, sampling)
            tokens[rows, step], logprobs[rows, step] = drawn, drawn_logprobs
            num_sampled[rows] += 1
            stopped[rows] = torch.isin(drawn, self.stop_ids)
            on = (~stopped[rows] & (positions + 1 < limits[rows])).nonzero()[:, 0]
            if len(on) == 0:
                break
            if len(on) < len(rows):
                rows, mask, drawn, positions = rows[on], mask[on], drawn[on], positions[on]
                cache.reorder_cache(on)  # type: ignore[arg-type]  # any number of rows; every kind of layer has it
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            hidden = self.model.extend(drawn[:, None], mask, positions[:, None], cache)[:, -1]
        ends, reasons = num_sampled.tolist(), stopped.tolist()
        sampled_ids, sampled_logprobs = tokens.cpu().numpy(), logprobs.cpu().numpy()
        return [
            finished(
                request,
                sampled_ids[row, : ends[row]],
                sampled_logprobs[row, : ends[row]],
                policy_version,
                "stop" if reasons[row] else "length",
            )
            for row, request in enumerate(requests)
        ]

    def _read_prompts(self, requests: list[Request]) -> tuple[torch.Tensor, torch.Tensor, DynamicCache]:
        """Last hidden state [B, D] of every request's prompt, mask [B, T] of the real tokens, and the cache."""
        device = self.model.head.device
        distinct = list(dict.fromkeys(request.token_ids for request in requests))
        width = max(map(len, distinct))
        token_ids = np.zeros((len(distinct), width), dtype=np.int64)
        real = np.zeros_like(token_ids)
        for row, prompt in enumerate(distinct):
            token_ids[row, width - len(prompt) :] = prompt
            real[row, width - len(prompt) :] = 1
        mask = torch.as_tensor(real, device=device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.model.config)
        hidden = self.model.extend(torch.as_tensor(token_ids, device=device), mask, positions, cache)[:, -1]
        row_of = {prompt: row for row, prompt in enumerate(distinct)}
        owners = torch.tensor([row_of[request.token_ids] for request in requests], device=device)
        if len(distinct) < len(requests):
            cache.reorder_cache(owners)  # type: ignore[arg-type]
        return hidden[owners], mask[owners], cache
