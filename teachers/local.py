"""Teachers whose weights are here: one host holds several, and turns trajectories into hidden states.

The one idea: what leaves a teacher is the input of its output head at the positions that predict a loss token, never
logits (DeepSeek-V4, section 5.2.2). The head itself is put in the store once. Head hash and probes are computed from
exactly what is stored, rounding included, so whoever multiplies the two can check that they belong together.

Left out: which teacher serves which trajectory (`teachers.pool`), and the divergence (`opd.losses`).
"""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Iterator

import torch

from opd.config import ModelConfig, TeacherConfig
from opd.losses import logsumexp_at
from opd.model import CausalLM, load_model
from opd.types import Store, TeacherHead, TeacherHidden, Trajectory
from opd.weights import head_hash

Checkpoint = tuple[str, str, str | None]


def checkpoint_of(teacher: TeacherConfig) -> Checkpoint:
    """What two teachers have in common if they are the same weights."""
    return teacher.family, teacher.path, teacher.revision


class TeacherHost:
    """Holds the weights of some teachers and scores trajectories with them, one teacher at a time.

    Consumes: trajectories, in calls that one caller makes in order. Produces: handles of hidden states in `store`.
    Waits for: nothing but its own disk and device. Teachers that share a checkpoint share its weights. Weights of
    residency "host" are loaded at first use and kept; of residency "disk" there is at most one set in memory, dropped
    when another is needed or at `release`.
    """

    def __init__(
        self,
        teachers: dict[str, TeacherConfig],
        store: Store,
        *,
        fp4: str,
        fp4_index: bool = False,
        threads: int,
        device: str,
        micro_batch_tokens: int,
        hidden_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """`fp4` and `fp4_index` are the student's `ModelConfig` choices, which hold for a `deepseek_v4` teacher too.
        `threads` of torch in this process; `device` auto, cpu or cuda; `micro_batch_tokens` bounds the padded tokens of
        one forward (a longer trajectory goes alone). Hidden states are stored as `hidden_dtype`."""
        if hidden_dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"hidden_dtype={hidden_dtype} is not allowed; choose torch.bfloat16 or torch.float32")
        torch.set_num_threads(threads)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._teachers = teachers
        self._store = store
        self._fp4, self._fp4_index = fp4, fp4_index
        self._device = torch.device(device)
        self._micro_batch_tokens = micro_batch_tokens
        self._hidden_dtype = hidden_dtype
        self._kept = {checkpoint_of(teacher) for teacher in teachers.values() if teacher.residency == "host"}
        self._models: dict[Checkpoint, CausalLM] = {}
        self._heads: dict[Checkpoint, TeacherHead] = {}
        self._metrics: dict[str, float] = defaultdict(float)

    def heads(self) -> dict[str, TeacherHead]:
        """Output head of every teacher of this host, float32 [V, U] in the store. Teachers that share a checkpoint
        share the stored head."""
        return {name: self._head(name) for name in self._teachers}

    @torch.no_grad()
    def score(self, teacher: str, trajectories: list[Trajectory], weight: float) -> list[TeacherHidden]:
        """One signal per trajectory, in the order given.

        Entry s of a stored hidden state [S, U] is the state, after the final norm, that predicts the s-th loss token:
        for a loss token at index t it is taken at t - 1. Raises ValueError for a hidden state that is not finite,
        naming teacher and trajectory, and for a loss token at index 0, which nothing predicts.
        """
        for trajectory in trajectories:
            if trajectory.num_loss_tokens and trajectory.loss_mask[0]:
                raise ValueError(f"trajectory {trajectory.id!r} has a loss token at index 0, which no token precedes")
        content_hash = self._head(teacher).content_hash
        model = self._model(teacher)
        started = time.perf_counter()
        signals: dict[int, TeacherHidden] = {}
        for indices in self._batches(trajectories):
            rows = self._hidden([trajectories[index] for index in indices], model)
            for index, hidden in zip(indices, rows, strict=True):
                if not torch.isfinite(hidden).all():
                    raise ValueError(
                        f"teacher {teacher!r} ({self._teachers[teacher].path}) gives hidden states that are not finite "
                        f"on trajectory {trajectories[index].id!r}"
                    )
                hidden = hidden.to(self._hidden_dtype)
                num = hidden.shape[0]
                probes = tuple(sorted({0, num // 2, num - 1})) if num else ()
                probe_lse = logsumexp_at(hidden[list(probes)], model.head)  # of the rounded state: what the reader has
                signals[index] = TeacherHidden(
                    teacher=teacher,
                    weight=weight,
                    hidden=self._store.put(hidden.cpu()),
                    head_hash=content_hash,
                    probe_positions=probes,
                    probe_lse=tuple(probe_lse.tolist()),
                )
        self._metrics[f"teacher/{teacher}/score_seconds"] += time.perf_counter() - started
        self._metrics[f"teacher/{teacher}/tokens"] += sum(trajectory.num_loss_tokens for trajectory in trajectories)
        return [signals[index] for index in range(len(trajectories))]

    def release(self) -> None:
        """Drops weights of residency "disk"; those of residency "host" stay."""
        self._models = {checkpoint: model for checkpoint, model in self._models.items() if checkpoint in self._kept}
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def take_metrics(self) -> dict[str, float]:
        """Sums since the last call: teacher/<name>/load_seconds, score_seconds and tokens (loss tokens scored)."""
        taken, self._metrics = dict(self._metrics), defaultdict(float)
        return taken

    def _config(self, teacher: str) -> TeacherConfig:
        if teacher not in self._teachers:
            raise ValueError(f"teacher {teacher!r} is not on this host; it holds {', '.join(self._teachers) or 'none'}")
        return self._teachers[teacher]

    def _model(self, teacher: str) -> CausalLM:
        config = self._config(teacher)
        checkpoint = checkpoint_of(config)
        if checkpoint not in self._models:
            if checkpoint not in self._kept:
                self.release()  # before loading: two sets of "disk" weights may not fit
            started = time.perf_counter()
            model = load_model(
                ModelConfig(
                    family=config.family,
                    path=config.path,
                    revision=config.revision,
                    fp4=self._fp4 if config.family == "deepseek_v4" else "none",
                    fp4_index=self._fp4_index and config.family == "deepseek_v4",
                )
            )
            self._models[checkpoint] = model.to(self._device).eval().requires_grad_(False)
            self._metrics[f"teacher/{teacher}/load_seconds"] += time.perf_counter() - started
        return self._models[checkpoint]

    def _head(self, teacher: str) -> TeacherHead:
        checkpoint = checkpoint_of(self._config(teacher))
        if checkpoint not in self._heads:
            weight = self._model(teacher).head.detach().float().cpu().contiguous()
            if not torch.isfinite(weight).all():
                raise ValueError(f"teacher {teacher!r} ({checkpoint[1]}) has an output head that is not finite")
            self._heads[checkpoint] = TeacherHead(
                teacher=teacher,
                weight=self._store.put(weight),
                content_hash=head_hash(weight),
                vocab_size=weight.shape[0],
            )
        return dataclasses.replace(self._heads[checkpoint], teacher=teacher)

    def _batches(self, trajectories: list[Trajectory]) -> Iterator[list[int]]:
        """Indices of trajectories of like length, so that padding is small."""
        batch: list[int] = []
        for index in sorted(range(len(trajectories)), key=lambda index: _num_inputs(trajectories[index])):
            longest = _num_inputs(trajectories[index])  # sorted: the newest is the longest
            if batch and longest * (len(batch) + 1) > self._micro_batch_tokens:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def _hidden(self, trajectories: list[Trajectory], model: CausalLM) -> list[torch.Tensor]:
        """Hidden states [S, U] of each trajectory, from one right-padded forward over the tokens that predict one."""
        lengths = [_num_inputs(trajectory) for trajectory in trajectories]
        token_ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
        for row, (trajectory, length) in enumerate(zip(trajectories, lengths, strict=True)):
            token_ids[row, :length] = torch.from_numpy(trajectory.token_ids[:length].astype("int64"))
        hidden = model(token_ids.to(self._device), torch.tensor(lengths, device=self._device)).hidden
        predicting = [torch.from_numpy(trajectory.loss_mask.nonzero()[0] - 1) for trajectory in trajectories]
        return [hidden[row, at.to(self._device)] for row, at in enumerate(predicting)]


def _num_inputs(trajectory: Trajectory) -> int:
    """Tokens a teacher must read: up to the one before the last loss token; at least 1: a batch has a column."""
    loss_tokens = trajectory.loss_mask.nonzero()[0]
    return max(1, int(loss_tokens[-1])) if len(loss_tokens) else 1
