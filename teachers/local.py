"""One host of teachers: turns trajectories into signals, one teacher at a time.

The one idea: what leaves a teacher whose weights are here is the input of its output head at the positions that predict
a loss token, never logits (DeepSeek-V4, section 5.2.2). The head itself is put in the store once. Head hash and probes
are computed from exactly what is stored, rounding included, so whoever multiplies the two can check that they belong
together. A teacher behind an endpoint gives log-probabilities instead.

Left out: which teacher serves which trajectory (`teachers.pool`), when weights are in memory (`teachers.shelf`),
talking to endpoints (`teachers.remote`), and the divergence (`opd.losses`).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from opd.config import TeacherConfig
from opd.divergence import compare
from opd.losses import logsumexp_at, token_logprobs
from opd.model import CausalLM
from opd.types import Store, TeacherHead, TeacherHidden, TeacherLogprobs, Trajectory
from opd.weights import head_hash
from teachers.remote import RemoteTeacher
from teachers.shelf import Checkpoint, Shelf, checkpoint_of
from teachers.store import HiddenStore

REPEAT_EVERY = 20  # scorings of a teacher, of which one is repeated in part, to see whether it says the same again

UNIFORM_NATS = 0.05  # by which no log-probability of a remote teacher differs from the uniform one, if it is uniform


class TeacherHost:
    """Holds some teachers and scores trajectories with them, one teacher at a time.

    Consumes: trajectories, in calls that one caller makes in order. Produces: handles of hidden states in `store`, or
    log-probabilities. Waits for: its own disk, device and endpoints. Teachers that share a checkpoint share its
    weights.
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
        vocab_size: int | None = None,
        weight_bytes: int | None = None,
        prefetch: bool = True,
    ) -> None:
        """`fp4` and `fp4_index` are the student's `ModelConfig` choices, which hold for a `deepseek_v4` teacher too.
        `threads` of torch in this process; `device` auto, cpu or cuda; `micro_batch_tokens` bounds the padded tokens of
        one forward (a longer trajectory goes alone). Hidden states are stored as `hidden_dtype`. Heads are cut to
        `vocab_size` rows, the entries of the tokenizer; null leaves them as they are. `weight_bytes` and `prefetch` as
        in `PoolConfig`. Raises ConfigError as `Shelf` and `RemoteTeacher` do."""
        if hidden_dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"hidden_dtype={hidden_dtype} is not allowed; choose torch.bfloat16 or torch.float32")
        torch.set_num_threads(threads)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._teachers = teachers
        self._store = store if isinstance(store, HiddenStore) else HiddenStore(store)
        self._device = torch.device(device)
        self._micro_batch_tokens = micro_batch_tokens
        self._hidden_dtype = hidden_dtype
        self._vocab_size = vocab_size
        self._remotes = {
            name: RemoteTeacher(name, teacher, vocab_size)
            for name, teacher in teachers.items()
            if teacher.family == "remote"
        }
        self._shelf = Shelf(
            {name: teacher for name, teacher in teachers.items() if name not in self._remotes},
            fp4=fp4,
            fp4_index=fp4_index,
            device=self._device,
            weight_bytes=weight_bytes,
            prefetch=prefetch,
        )
        self._heads: dict[Checkpoint, TeacherHead] = {}
        self._metrics: dict[str, float] = defaultdict(float)
        self._entropy: dict[str, tuple[float, int]] = {}  # sum over probes, as a share of the largest, and their number
        self._num_scorings: dict[str, int] = defaultdict(int)

    def heads(self) -> dict[str, TeacherHead]:
        """Output head of every teacher of this host that has one, float32 [V, U] in the store, on disk where the
        teacher's weights are. Teachers that share a checkpoint share the stored head."""
        return {name: self._head(name) for name in self._teachers if name not in self._remotes}

    @torch.no_grad()
    def score(
        self, teacher: str, trajectories: list[Trajectory], weight: float, then: str | None = None
    ) -> list[TeacherHidden] | list[TeacherLogprobs]:
        """One signal per trajectory, in the order given. `then` is the teacher that will be asked next.

        Entry s of a stored hidden state [S, U] is the state, after the final norm, that predicts the s-th loss token:
        for a loss token at index t it is taken at t - 1. Raises ValueError for a hidden state that is not finite,
        naming teacher and trajectory, for a loss token at index 0, which nothing predicts, and as `Shelf.turn` does;
        TeacherError as `RemoteTeacher.score` does.
        """
        config = self._config(teacher)
        for trajectory in trajectories:
            if trajectory.num_loss_tokens and trajectory.loss_mask[0]:
                raise ValueError(f"trajectory {trajectory.id!r} has a loss token at index 0, which no token precedes")
        self._metrics[f"teacher/{teacher}/tokens"] += sum(trajectory.num_loss_tokens for trajectory in trajectories)
        if teacher in self._remotes:
            started = time.perf_counter()
            logprobs = self._remotes[teacher].score(trajectories, weight)
            self._metrics[f"teacher/{teacher}/score_seconds"] += time.perf_counter() - started
            return logprobs
        head = self._head(teacher)
        model = self._turn(teacher, then)
        started = time.perf_counter()
        self._num_scorings[teacher] += 1
        signals: dict[int, TeacherHidden] = {}
        for indices in self._batches(trajectories):
            rows = self._hidden([trajectories[index] for index in indices], model)
            for index, hidden in zip(indices, rows, strict=True):
                if not torch.isfinite(hidden).all():
                    raise ValueError(
                        f"teacher {teacher!r} ({config.path}) gives hidden states that are not finite on trajectory "
                        f"{trajectories[index].id!r}"
                    )
            rows = [hidden.to(self._hidden_dtype) for hidden in rows]
            if self._num_scorings[teacher] % REPEAT_EVERY == 1 and len(rows[0]):
                again = self._hidden([trajectories[indices[0]]], model)[0].to(self._hidden_dtype)
                lse = [logsumexp_at(states[-1:], self._cut(model.head)) for states in (rows[0], again)]
                key = f"teacher/{teacher}/repeat_error"
                self._metrics[key] = max(self._metrics[key], (lse[0] - lse[1]).abs().item())
            for index, hidden, probes, probe_lse in zip(indices, rows, *self._probe(teacher, rows, model), strict=True):
                signals[index] = TeacherHidden(
                    teacher=teacher,
                    weight=weight,
                    hidden=self._store.put(hidden.cpu(), f"{teacher} on {trajectories[index].id}"),
                    head_hash=head.content_hash,
                    probe_positions=probes,
                    probe_lse=probe_lse,
                )
        self._metrics[f"teacher/{teacher}/score_seconds"] += time.perf_counter() - started
        return [signals[index] for index in range(len(trajectories))]

    def release(self) -> None:
        """The step's scoring is over: drops weights of residency "disk"; those of the others stay."""
        self._shelf.release()
        self._store.start_over()

    def take_metrics(self) -> dict[str, float]:
        """Since the last call, by the names of `opd.metrics.CATALOGUE`: teacher/<name>/load_seconds, wait_seconds,
        score_seconds and tokens (loss tokens scored) as sums, entropy_share as a mean, repeat_error as the largest."""
        taken, self._metrics = dict(self._metrics), defaultdict(float)
        for name, (total, count) in self._entropy.items():
            taken[f"teacher/{name}/entropy_share"] = total / count
        self._entropy.clear()
        return taken

    @torch.no_grad()
    def examine(
        self, questions: Mapping[str, list[Trajectory]], student: TeacherConfig | None = None
    ) -> dict[str, dict[str, float]]:
        """Numbers of each teacher on the trajectories it is asked about, as `opd.health.check_teacher` reads them.

        finite: 1 or 0, and if 0 there is nothing else. repeat_error: difference between two times the same question, as
        a share of the largest number, for remote teachers in nats. entropy: mean over loss tokens, in nats, and
        entropy_share: of the largest there can be. kl: mean KL(student || teacher), and distance: the largest of one
        token; for remote teachers distance is that of the loss tokens' log-probabilities, and there is neither kl nor
        entropy. precision_kl: mean KL(teacher in BF16 || teacher as it is held) of teachers in fp8 and fp4. `student`
        is a checkpoint described as a teacher; without it what compares is left out.
        """
        asked = {trajectory.id: trajectory for trajectories in questions.values() for trajectory in trajectories}
        own: dict[str, Tensor] = {}
        own_head = torch.empty(0)
        if student is not None:
            model = self._shelf.turn(checkpoint_of(student))
            own = dict(zip(asked, self._states(list(asked.values()), model), strict=True))
            own_head = self._cut(model.head).float().clone()
        report: dict[str, dict[str, float]] = {}
        for name, trajectories in questions.items():
            states = torch.cat([own[trajectory.id] for trajectory in trajectories]) if own else None
            examined = self._examine_remote if name in self._remotes else self._examine
            report[name] = examined(name, trajectories, states, own_head)
        self._shelf.release()
        return report

    def _examine(
        self, teacher: str, trajectories: list[Trajectory], own: Tensor | None, own_head: Tensor
    ) -> dict[str, float]:
        model = self._turn(teacher)
        states, again = (torch.cat(self._states(trajectories, model)) for _ in range(2))
        if not (states.isfinite().all() and again.isfinite().all()):
            return {"finite": 0.0}
        head, targets = self._cut(model.head).float(), _targets(trajectories).to(states.device)
        entropy = token_logprobs(states, head, targets)[1].mean().item()
        numbers = {
            "finite": 1.0,
            "repeat_error": ((states - again).abs().max() / states.abs().max().clamp_min(1e-30)).item(),
            "entropy": entropy,
            "entropy_share": entropy / math.log(len(head)),
        }
        if own is not None:
            kl = compare(own, own_head, states, head, targets).reverse_kl
            numbers |= {"kl": kl.mean().item(), "distance": kl.max().item()}
        checkpoint = checkpoint_of(self._config(teacher))
        if checkpoint.precision in ("fp8", "fp4"):
            head = head.clone()  # its shell gets other weights
            model = self._shelf.turn(checkpoint._replace(precision="bf16"))
            plain = torch.cat(self._states(trajectories, model))
            kl = compare(plain, self._cut(model.head).float(), states, head, targets).reverse_kl
            numbers["precision_kl"] = kl.mean().item()
        return numbers

    def _examine_remote(
        self, teacher: str, trajectories: list[Trajectory], own: Tensor | None, own_head: Tensor
    ) -> dict[str, float]:
        remote = self._remotes[teacher]
        first, again = (
            torch.cat([torch.from_numpy(signal.logprobs) for signal in remote.score(trajectories, 1.0)])
            for _ in range(2)
        )
        numbers = {"finite": 1.0, "repeat_error": (first - again).abs().max().item()}
        if self._vocab_size is not None and (first + math.log(self._vocab_size)).abs().max() < UNIFORM_NATS:
            numbers["entropy_share"] = 1.0
        if own is not None:
            targets = _targets(trajectories).to(own.device)
            numbers["distance"] = (token_logprobs(own, own_head, targets)[0].cpu() - first).abs().max().item()
        return numbers

    def close(self) -> None:
        self._shelf.close()
        for remote in self._remotes.values():
            remote.close()

    # --- one teacher --------------------------------------------------------------------------------------------------

    def _config(self, teacher: str) -> TeacherConfig:
        if teacher not in self._teachers:
            raise ValueError(f"teacher {teacher!r} is not on this host; it holds {', '.join(self._teachers) or 'none'}")
        return self._teachers[teacher]

    def _turn(self, teacher: str, then: str | None = None) -> CausalLM:
        checkpoint = checkpoint_of(self._config(teacher))
        following = None
        if then is not None and then not in self._remotes:
            following = checkpoint_of(self._config(then))
        model = self._shelf.turn(checkpoint, following)
        for kind, seconds in (("load", self._shelf.load_seconds), ("wait", self._shelf.wait_seconds)):
            if spent := seconds.pop(checkpoint, 0.0):
                self._metrics[f"teacher/{teacher}/{kind}_seconds"] += spent
        return model

    def _head(self, teacher: str) -> TeacherHead:
        config = self._config(teacher)
        checkpoint = checkpoint_of(config)
        if checkpoint not in self._heads:
            weight = self._cut(self._turn(teacher).head).detach().float().cpu()
            if weight.untyped_storage().nbytes() > weight.nbytes:  # what was cut off would travel with it
                weight = weight.clone()
            if not torch.isfinite(torch.stack(weight.aminmax())).all():  # in one pass, without copies
                raise ValueError(f"teacher {teacher!r} ({config.path}) has an output head that is not finite")
            if self._vocab_size is not None and len(weight) < self._vocab_size:
                raise ValueError(
                    f"teacher {teacher!r} ({config.path}) has an output head of {len(weight)} rows; the tokenizer has "
                    f"{self._vocab_size} entries"
                )
            self._heads[checkpoint] = TeacherHead(
                teacher=teacher,
                weight=self._store.put(weight, f"head of {teacher}", on_disk=config.residency == "disk"),
                content_hash=head_hash(weight),
                vocab_size=weight.shape[0],
            )
        return dataclasses.replace(self._heads[checkpoint], teacher=teacher)

    def _cut(self, head: Tensor) -> Tensor:
        """Without the rows that pad a vocabulary: they stand for no token."""
        return head if self._vocab_size is None else head[: self._vocab_size]

    def _probe(
        self, teacher: str, rows: list[Tensor], model: CausalLM
    ) -> tuple[list[tuple[int, ...]], list[tuple[float, ...]]]:
        """Of each [S, U]: up to three positions and the log-sum-exp there, of the rounded states: what the reader has.
        Notes their entropy."""
        positions = [tuple(sorted({0, len(hidden) // 2, len(hidden) - 1})) if len(hidden) else () for hidden in rows]
        states = torch.cat([hidden[list(at)] for hidden, at in zip(rows, positions, strict=True)])
        head = self._cut(model.head)
        lse = iter(logsumexp_at(states, head).tolist())
        if len(states):
            _, entropy = token_logprobs(states, head, torch.zeros(len(states), dtype=torch.int64, device=states.device))
            share = entropy / torch.log(torch.tensor(float(len(head))))
            total, count = self._entropy.get(teacher, (0.0, 0))
            self._entropy[teacher] = (total + share.sum().item(), count + len(states))
        return positions, [tuple(next(lse) for _ in at) for at in positions]

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

    def _states(self, trajectories: list[Trajectory], model: CausalLM) -> list[Tensor]:
        """Float32 hidden states [S, U] of each, in the order given."""
        states: dict[int, Tensor] = {}
        for indices in self._batches(trajectories):
            rows = self._hidden([trajectories[index] for index in indices], model)
            states |= zip(indices, (row.float() for row in rows), strict=True)
        return [states[index] for index in range(len(trajectories))]

    def _hidden(self, trajectories: list[Trajectory], model: CausalLM) -> list[Tensor]:
        """Hidden states [S, U] of each trajectory, from one right-padded forward over the tokens that predict one."""
        lengths = [_num_inputs(trajectory) for trajectory in trajectories]
        token_ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
        for row, (trajectory, length) in enumerate(zip(trajectories, lengths, strict=True)):
            token_ids[row, :length] = torch.from_numpy(trajectory.token_ids[:length].astype("int64"))
        hidden = model(token_ids.to(self._device), torch.tensor(lengths, device=self._device)).hidden
        predicting = [torch.from_numpy(trajectory.loss_mask.nonzero()[0] - 1) for trajectory in trajectories]
        return [hidden[row, at.to(self._device)] for row, at in enumerate(predicting)]


def _targets(trajectories: list[Trajectory]) -> Tensor:
    """Loss tokens, int64 [N], of all trajectories one after another."""
    return torch.cat([torch.from_numpy(t.token_ids[t.loss_mask].astype("int64")) for t in trajectories])


def _num_inputs(trajectory: Trajectory) -> int:
    """Tokens a teacher must read: up to the one before the last loss token; at least 1: a batch has a column."""
    loss_tokens = trajectory.loss_mask.nonzero()[0]
    return max(1, int(loss_tokens[-1])) if len(loss_tokens) else 1
