"""Records that cross a process boundary, and the shape legend every numeric module uses.

Legend
    P  prompts in a step             G  trajectories per prompt (the group)
    T  tokens of a trajectory        S  sampled tokens of a trajectory (the last S of its T)
    B  rows of a micro-batch         N  loss tokens of a micro-batch, or any flat list of tokens
    D  student hidden size           U  teacher hidden size
    V  vocabulary                    E  routed experts, K  experts a token is sent to
    H  attention heads, C  width of one head

Alignment, stated once: index t speaks of token t. `sampler_logprobs[t]` is the log-probability of token t given tokens
before it; the hidden state that predicts token t is the one at t - 1. That shift lives in `opd.batching.collate` and
nowhere else. A signal that has one entry per sampled token (teacher hidden states) is already shifted: its entry s is
the state that predicts the s-th sampled token.

Signals are a closed union: a GRPO advantage, a teacher's hidden states and a demonstration are three types, and no
record has a field that is empty "for the other mode".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch

FinishReason = Literal["stop", "length"]


@dataclass(slots=True, kw_only=True, frozen=True)
class Prompt:
    """One question, rendered and encoded.

    Example: Prompt(id="chain_sum/train/17", domain="chain_sum", effort="none", token_ids=(0, 5, 90, 91, 6, 9),
                    reference={"question": "...", "answer": "12", "metadata": {...}})
    """

    id: str  # unique in a run: "<domain>/<split>/<index>"
    domain: str  # routes the prompt to its teacher and its verifier
    effort: str  # reasoning-effort mode the prompt was rendered in: "none", "high" or "max"
    token_ids: tuple[int, ...]  # the whole prompt, BOS and generation tag included
    reference: dict[str, Any]  # what the verifier needs: "question", "answer" (text) and source metadata


@dataclass(slots=True, kw_only=True, frozen=True)
class VersionSpan:
    """Tokens `start` and after (up to the next span) were sampled under `policy_version`."""

    start: int  # index into the trajectory's token_ids
    policy_version: int


@dataclass(slots=True, kw_only=True, frozen=True)
class Trajectory:
    """A prompt and what followed it.

    Example, two prompt tokens and three sampled ones, the last of them the stop token:
        token_ids        [  0,  41,   7,    8,    1]
        loss_mask        [  F,   F,   T,    T,    T]
        sampler_logprobs [0.0, 0.0, -.1, -.93, -.02]
        version_spans    (VersionSpan(start=2, policy_version=4),)     finish_reason "stop"
        routing          of one layer: [[0, 3]], [[3, 1]], [[2, 0]], [[2, 1]], [[-1, -1]]
    """

    id: str  # "<prompt id>#<index in group>@<step>": with the seed, it fixes the sampling noise
    prompt_id: str
    domain: str
    token_ids: np.ndarray  # int32 [T]
    loss_mask: np.ndarray  # bool [T]: True where the token was produced by the policy (or demonstrated) and counts
    sampler_logprobs: np.ndarray  # float32 [T], nats, of the distribution that was sampled; 0 where not sampled
    version_spans: tuple[VersionSpan, ...]
    finish_reason: FinishReason
    # int16 [T, L, K]: experts that the sampler sent each token to, in the L layers with learned routing; all -1 for a
    # token that it never read, such as the last one. L = 0 where nothing was recorded.
    routing: np.ndarray

    @property
    def num_loss_tokens(self) -> int:
        return int(self.loss_mask.sum())

    @property
    def untruncated_sampler_logprobs(self) -> np.ndarray:
        """`sampler_logprobs` as they were before ids were cut off, if any were: what a policy's are compared with."""
        return self.sampler_logprobs


def no_routing(num_tokens: int) -> np.ndarray:
    """`routing` of a trajectory of which nothing was recorded."""
    return np.empty((num_tokens, 0, 0), dtype=np.int16)


@dataclass(slots=True, kw_only=True, frozen=True)
class Group:
    """The G trajectories of one prompt."""

    prompt: Prompt
    trajectories: tuple[Trajectory, ...]


@dataclass(slots=True, kw_only=True, frozen=True)
class Advantage:
    """GRPO: one number for every sampled token of the trajectory."""

    value: float  # reward minus the group's mean reward


@dataclass(slots=True, kw_only=True, frozen=True)
class Demonstration:
    """SFT: the trajectory's own loss tokens are the target."""


@dataclass(slots=True, kw_only=True, frozen=True)
class TeacherHidden:
    """OPD: the teacher's input to its output head, at each position that predicts a loss token.

    `hidden` is a handle of the run's object store (`Store.get` turns it into bfloat16 or float32 [S, U], after the
    teacher's final norm). `probe_lse` is the log-sum-exp of the teacher's logits at up to three of those positions, by
    which a hidden state multiplied by another teacher's head, or taken before the norm, is found out.
    """

    teacher: str
    weight: float  # the teacher's w_i in the OPD objective
    hidden: Any
    head_hash: str
    probe_positions: tuple[int, ...]  # indices into S
    probe_lse: tuple[float, ...]


@dataclass(slots=True, kw_only=True, frozen=True)
class TeacherLogprobs:
    """OPD with a teacher behind an endpoint: its log-probabilities, in nats, of few tokens at each of S positions.

    Example, three loss tokens and the two most likely tokens at each; the first loss token is not among them:
        logprobs     [-6.2, -0.1, -0.7]
        top_ids      [[5, 9], [7, 3], [8, 1]]      top_logprobs [[-0.2, -2.1], [-0.1, -3.0], [-0.7, -0.8]]
    """

    teacher: str
    weight: float  # the teacher's w_i in the OPD objective
    logprobs: np.ndarray  # float32 [S], of the loss tokens
    top_ids: np.ndarray  # int32 [S, k], the most likely first; k is 0 where the loss tokens alone were asked for
    top_logprobs: np.ndarray  # float32 [S, k]

    @property
    def tail_logprobs(self) -> np.ndarray:
        """float32 [S]: log of the mass outside of the k tokens, whether the loss token is one of them or not.

        What rounding leaves of a tail that is next to nothing means nothing: it is at least 1e-7, FP32's resolution.
        """
        inside = np.exp(self.top_logprobs.astype(np.float64)).sum(-1)
        return np.log(np.maximum(1.0 - inside, 1e-7)).astype(np.float32)


Signal = Advantage | Demonstration | TeacherHidden | TeacherLogprobs


@dataclass(slots=True, kw_only=True, frozen=True)
class TeacherHead:
    """A teacher's output head as the learner receives it. `weight` is a store handle of a float tensor [V, U]."""

    teacher: str
    weight: Any
    content_hash: str  # sha256 of dtype, shape and bytes
    vocab_size: int


@dataclass(slots=True, kw_only=True, frozen=True)
class Fp4Tensor:
    """A weight held as MXFP4: E2M1 codes, one UE8M0 scale per 32 inputs.

    Example: a [2, 64] weight has codes uint8 [2, 32] (even input in the low nibble) and scales uint8 [2, 2], where
    scale byte b stands for 2 ** (b - 127).
    """

    codes: torch.Tensor  # uint8 [..., K / 2]
    scales: torch.Tensor  # uint8 [..., K / 32]
    shape: tuple[int, ...]  # of the weight; the last dimension K is a multiple of 32


@dataclass(slots=True, kw_only=True)
class WeightSnapshot:
    """One version of a model's weights: what is published to workers, saved, and loaded as a teacher."""

    policy_version: int
    tensors: dict[str, torch.Tensor | Fp4Tensor] = field(default_factory=dict)  # by transformers' parameter name


class Future(Protocol):
    """A result that may not be there yet."""

    def result(self, timeout_seconds: float | None = None) -> Any: ...


class Actor(Protocol):
    """An object that lives in this process or in another one; `submit` starts one of its methods."""

    name: str

    def submit(self, method: str, *args: Any, **kwargs: Any) -> Future: ...


class Store(Protocol):
    """Large immutable values, put once and read by whoever holds the handle."""

    def put(self, value: Any) -> Any: ...

    def get(self, handle: Any) -> Any: ...
