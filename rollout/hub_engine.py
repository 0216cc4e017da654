"""Batched sampling from any Hugging Face causal LM, behind the V4 engine's interface.

Prompts are left-padded into batches of `num_slots`, read once, and decoded with transformers' own cache until the last
row of the batch has ended. The draw, the noise and the record are the V4 engine's. Left out: joining a running batch
(transformers' cache has one length for all rows).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache

from opd.config import SamplingConfig
from opd.model import HubModel
from opd.types import Trajectory
from rollout.engine import Request, finished
from rollout.sampling import sample, trajectory_key


class HubEngine:
    """Samples from a `HubModel`, whose weights may be replaced between two calls of `generate`."""

    def __init__(self, model: HubModel, *, num_slots: int, max_tokens: int, stop_ids: Sequence[int], seed: int):
        self.model, self.num_slots, self.max_tokens, self.seed = model.eval(), num_slots, max_tokens, seed
        self.stop_ids = torch.tensor(sorted(stop_ids), device=model.head.device)

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], sampling: SamplingConfig, policy_version: int) -> list[Trajectory]:
        """One trajectory per request, in their order. Raises ValueError for a prompt that leaves no room for a token."""
        for request in requests:
            if not 1 <= len(request.token_ids) < self.max_tokens:
                raise ValueError(
                    f"prompt {request.prompt_id} has {len(request.token_ids)} tokens; the engine takes 1 to "
                    f"{self.max_tokens - 1}"
                )
        # Rows of one batch should be alike in length, or the short ones pay for the long ones' padding.
        order = sorted(range(len(requests)), key=lambda index: len(requests[index].token_ids))
        results: dict[int, Trajectory] = {}
        for begin in range(0, len(order), self.num_slots):
            indices = order[begin : begin + self.num_slots]
            batch = self._batch([requests[index] for index in indices], sampling, policy_version)
            results.update(zip(indices, batch, strict=True))
        return [results[index] for index in range(len(requests))]

    def _batch(self, requests: list[Request], sampling: SamplingConfig, policy_version: int) -> list[Trajectory]:
        device = self.model.head.device
        prompt_tokens = torch.tensor([len(request.token_ids) for request in requests], device=device)
        width = int(prompt_tokens.max())
        token_ids = torch.zeros(len(requests), width, dtype=torch.int64, device=device)
        mask = torch.zeros_like(token_ids)
        for row, request in enumerate(requests):
            token_ids[row, width - len(request.token_ids) :] = torch.tensor(request.token_ids, device=device)
            mask[row, width - len(request.token_ids) :] = 1
        keys = torch.tensor([trajectory_key(r.trajectory_id, self.seed) for r in requests], device=device)
        limits = (prompt_tokens + sampling.max_new_tokens).clamp(max=self.max_tokens)
        cache = DynamicCache(config=self.model.config)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        tokens: list[torch.Tensor] = []
        logprobs: list[torch.Tensor] = []
        ended = torch.zeros(len(requests), dtype=torch.bool, device=device)
        step_ids = token_ids
        while not bool(ended.all()):
            hidden = self.model.extend(step_ids, mask, positions, cache)
            logits = torch.nn.functional.linear(hidden[:, -1].float(), self.model.head.float())
            place = prompt_tokens + len(tokens)
            drawn, drawn_logprobs = sample(logits, keys, place, sampling)
            tokens.append(drawn)
            logprobs.append(drawn_logprobs)
            ended = ended | torch.isin(drawn, self.stop_ids) | (place + 1 >= limits)
            step_ids, positions = drawn[:, None], place[:, None]
            mask = torch.cat((mask, torch.ones_like(drawn)[:, None]), dim=1)
        drawn_all, logprobs_all = torch.stack(tokens, 1), torch.stack(logprobs, 1)
        stops = torch.isin(drawn_all, self.stop_ids)
        results = []
        for row, request in enumerate(requests):
            allowed = int(limits[row]) - len(request.token_ids)
            stop = stops[row, :allowed].nonzero()
            count = int(stop[0]) + 1 if len(stop) else allowed
            sampled = drawn_all[row, :count].cpu()
            whole = torch.cat((torch.tensor(request.token_ids), sampled)).numpy()
            reason = "stop" if len(stop) else "length"
            results.append(finished(request, whole, logprobs_all[row, :count].cpu().numpy(), policy_version, reason))
        return results
