"""What teachers sent, fetched by the rank that learns from it and proven to fit together.

A hidden state is worth nothing under another head, and nothing in its shape tells: so every state names the head it
belongs to by hash, a head's bytes are hashed when they are first seen, and the log-sum-exp that the teacher computed at
a few positions must come out again (V4 report 5.2.2 stores states, not logits). Left out: the loss, and producing any
of it (`teachers`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from opd.batching import MicroBatch
from opd.distillation import DistillLogprobs
from opd.losses import logsumexp_at
from opd.types import Store, TeacherHead, TeacherHidden, TeacherLogprobs
from opd.weights import head_hash

PROBE_TOLERANCE = 1e-3  # nats: float32 sums in another order differ by less, another head or a missing norm by more


class Fetcher:
    """The teachers' side of a learner rank. Methods raise ValueError, naming the teacher and the trajectory."""

    def __init__(self, store: Store, device: str, *, vocab_size: int, tile_vocab: int) -> None:
        self._store, self._device = store, device
        self._vocab_size, self._tile_vocab = vocab_size, tile_vocab
        self._verified: set[tuple[str, str]] = set()  # (teacher, hash) whose bytes were hashed here

    def check(self, batches: Sequence[MicroBatch], heads: Mapping[str, TeacherHead]) -> None:
        """Before the first forward: every hidden state names the head that is at hand."""
        for item in (item for batch in batches for item in batch.items):
            if not isinstance(signal := item.signal, TeacherHidden):
                continue
            if signal.teacher not in heads:
                raise ValueError(
                    f"trajectory {item.trajectory.id} is scored by teacher {signal.teacher}, whose output head is not "
                    f"here; there are heads of: {', '.join(heads) or 'none'}"
                )
            if signal.head_hash != heads[signal.teacher].content_hash:
                raise ValueError(
                    f"teacher {signal.teacher}: hidden states of trajectory {item.trajectory.id} belong to the output "
                    f"head {signal.head_hash[:12]}, the head at hand is {heads[signal.teacher].content_hash[:12]}"
                )

    def head(self, head: TeacherHead) -> Tensor:
        """The teacher's head [V, U] on the device; its bytes are hashed the first time a hash is seen."""
        weight: Tensor = self._store.get(head.weight)
        if (head.teacher, head.content_hash) not in self._verified:
            if (actual := head_hash(weight)) != head.content_hash:
                raise ValueError(
                    f"the output head delivered for teacher {head.teacher} has hash {actual[:12]}, its record says "
                    f"{head.content_hash[:12]}"
                )
            if weight.shape[0] != self._vocab_size:
                raise ValueError(
                    f"teacher {head.teacher} has a vocabulary of {weight.shape[0]} entries, the student one of "
                    f"{self._vocab_size}"
                )
            self._verified.add((head.teacher, head.content_hash))
        return weight.to(self._device)

    def hidden(self, micro_batch: MicroBatch, head: Tensor) -> Tensor:
        """The teacher's states [N, U] of a micro-batch, proven to belong to `head`."""
        parts, probes, expected, owners = [], [], [], []
        for item in micro_batch.items:
            signal, trajectory = item.signal, item.trajectory
            assert isinstance(signal, TeacherHidden)
            hidden: Tensor = self._store.get(signal.hidden)
            if hidden.shape != (trajectory.num_loss_tokens, head.shape[1]):
                raise ValueError(
                    f"teacher {signal.teacher} delivered hidden states {list(hidden.shape)} for trajectory "
                    f"{trajectory.id}; {trajectory.num_loss_tokens} loss tokens and its head ask for "
                    f"{[trajectory.num_loss_tokens, head.shape[1]]}"
                )
            parts.append(hidden.to(self._device))
            probes.append(parts[-1][list(signal.probe_positions)])
            expected.extend(signal.probe_lse)
            owners.extend([item] * len(signal.probe_lse))
        actual = logsumexp_at(torch.cat(probes), head, tile_vocab=self._tile_vocab).tolist()
        for got, wanted, item in zip(actual, expected, owners, strict=True):
            if not abs(got - wanted) <= PROBE_TOLERANCE:  # also refuses NaN
                raise ValueError(
                    f"teacher {item.teacher}: hidden states of trajectory {item.trajectory.id} times its output head "
                    f"have a log-sum-exp of {got:.6f}, the teacher computed {wanted:.6f}; the head is another one, or "
                    "the states were taken before the final norm"
                )
        return torch.cat(parts)

    def logprobs(self, micro_batch: MicroBatch) -> DistillLogprobs:
        """What a teacher that sends no states said of a micro-batch's loss tokens."""
        signals: list[TeacherLogprobs] = []
        for item in micro_batch.items:
            signal, trajectory = item.signal, item.trajectory
            assert isinstance(signal, TeacherLogprobs)
            sizes = {len(signal.logprobs), len(signal.top_ids), len(signal.top_logprobs)}
            if sizes != {trajectory.num_loss_tokens}:
                raise ValueError(
                    f"teacher {signal.teacher} delivered log-probabilities of {len(signal.logprobs)} tokens for "
                    f"trajectory {trajectory.id}, which has {trajectory.num_loss_tokens} loss tokens"
                )
            signals.append(signal)
        width = min(signal.top_ids.shape[1] for signal in signals)
        ids = np.concatenate([signal.top_ids[:, :width] for signal in signals])
        if ids.size and not 0 <= ids.min() <= ids.max() < self._vocab_size:
            raise ValueError(
                f"teacher {micro_batch.teacher} speaks of token ids {ids.min()} to {ids.max()}; the student has ids 0 "
                f"to {self._vocab_size - 1}"
            )
        top = np.concatenate([signal.top_logprobs[:, :width] for signal in signals])
        return DistillLogprobs(
            logprobs=torch.as_tensor(np.concatenate([signal.logprobs for signal in signals])).to(self._device),
            top_ids=torch.as_tensor(ids.astype(np.int64)).to(self._device),
            top_logprobs=torch.as_tensor(top).to(self._device),
        )
