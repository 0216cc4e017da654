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
from opd.types import FinishReason, Trajectory, no_routing
from rollout.request import Request, by_owner, check_requests, concatenate, end_of, finished
from rollout.sampling import sample, trajectory_key
from rollout.wal import Log, log_complete


class HubEngine:
    """Samples from a `HubModel`, whose weights may be replaced between two calls of `generate`."""

    def __init__(self, model: HubModel, *, num_slots: int, max_tokens: int, stop_ids: Sequence[int], seed: int) -> None:
        """`max_tokens` of prompt and completion together; `stop_ids` end a completion and are part of it."""
        self.model, self.num_slots, self.max_tokens, self.seed = model.eval(), num_slots, max_tokens, seed
        self.stop_ids = np.array(sorted(stop_ids), dtype=np.int64)

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[Request], sampling: SamplingConfig, policy_version: int, log: Log | None = None
    ) -> list[Trajectory]:
        """One trajectory per request, in their order; tokens go to `log` as they are drawn.

        Raises ValueError for a prompt that leaves no room for a token and for weights that give logits which are not
        finite, and what the log raises.
        """
        check_requests(requests, self.max_tokens)
        limits = [request.limit(sampling.max_new_tokens, self.max_tokens) for request in requests]
        reasons: dict[int, FinishReason] = {
            index: reason
            for index, request in enumerate(requests)
            if (reason := end_of(request, limits[index], self.stop_ids)) is not None
        }
        log_complete(log, reasons)
        owners = [np.repeat(np.arange(len(requests)), [len(request.sampled) for request in requests])]
        steps = [request.sampled for request in requests]
        prefixes = {index: request.prefix() for index, request in enumerate(requests) if index not in reasons}
        # Rows of one batch should be alike in length, or the short ones pay for the long ones' padding.
        order = sorted(prefixes, key=lambda index: len(prefixes[index]))
        for begin in range(0, len(order), self.num_slots):
            rows = np.array(order[begin : begin + self.num_slots])  # the request of each row of the cache
            ends = np.array([len(prefixes[index]) for index in rows])
            keys = torch.tensor(
                [trajectory_key(requests[index].trajectory_id, self.seed) for index in rows],
                device=self.model.head.device,
            )
            last = np.array([limits[index] for index in rows])
            hidden, mask, cache = self._read([tuple(prefixes[index].tolist()) for index in rows])
            while True:
                logits = torch.nn.functional.linear(hidden.float(), self.model.head.float())
                positions = torch.as_tensor(ends, device=logits.device)
                samples = sample(logits, keys, positions, sampling).samples()
                stopped = np.isin(samples.token_ids, self.stop_ids)
                over = stopped | (ends + 1 >= last)
                if log is not None:
                    log.append(rows, samples, rows[over], stopped[over])
                owners.append(rows)
                steps.append(samples)
                reasons |= {
                    int(index): "stop" if by_token else "length"
                    for index, by_token in zip(rows[over], stopped[over], strict=True)
                }
                on = np.flatnonzero(~over)
                if len(on) == 0:
                    break
                if len(on) < len(rows):
                    rows, ends, last = rows[on], ends[on], last[on]
                    kept = torch.as_tensor(on, device=logits.device)
                    mask, keys = mask[kept], keys[kept]
                    cache.reorder_cache(kept)  # type: ignore[arg-type]  # any number of rows; every kind of layer has it
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                drawn, positions = (
                    torch.as_tensor(values.astype(np.int64), device=logits.device)[:, None]
                    for values in (samples.token_ids[on], ends)
                )
                hidden = self.model.extend(drawn, mask, positions, cache)[:, -1]
                ends = ends + 1
        drawn_by = by_owner(np.concatenate(owners), concatenate(steps), len(requests))
        return [
            finished(request, drawn_by[index], policy_version, reasons[index], no_routing(0))
            for index, request in enumerate(requests)
        ]

    def _read(self, prefixes: list[tuple[int, ...]]) -> tuple[torch.Tensor, torch.Tensor, DynamicCache]:
        """Last hidden state [B, D] of every row, mask [B, T] of the real tokens, and the cache; equal rows are read
        once."""
        device = self.model.head.device
        distinct = list(dict.fromkeys(prefixes))
        width = max(map(len, distinct))
        token_ids = np.zeros((len(distinct), width), dtype=np.int64)
        real = np.zeros_like(token_ids)
        for row, prefix in enumerate(distinct):
            token_ids[row, width - len(prefix) :] = prefix
            real[row, width - len(prefix) :] = 1
        mask = torch.as_tensor(real, device=device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.model.config)
        hidden = self.model.extend(torch.as_tensor(token_ids, device=device), mask, positions, cache)[:, -1]
        row_of = {prefix: row for row, prefix in enumerate(distinct)}
        owners = torch.tensor([row_of[prefix] for prefix in prefixes], device=device)
        if len(distinct) < len(prefixes):
            cache.reorder_cache(owners)  # type: ignore[arg-type]
        return hidden[owners], mask[owners], cache
