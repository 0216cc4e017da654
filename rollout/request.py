"""What goes into an engine and what comes out: a request, the tokens drawn for it, the trajectory they make.

The one idea: drawn tokens are columns, never objects. One `Samples` holds a decoding step of all active requests or
everything one request has drawn; the engine appends it, the write-ahead log stores its bytes, and `by_owner` turns the
first kind into the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np

from opd.types import FinishReason, Trajectory, VersionSpan


@dataclass(slots=True, kw_only=True, frozen=True, eq=False)
class Samples:
    """Drawn tokens, one entry of each column per token.

    Example, two tokens, the first drawn among three ids that truncation kept, the second among all:
        token_ids [7, 8]   logprobs [-.1, -.93]   untruncated_logprobs [-.31, -.93]   kept_counts [3, 0]
        kept_ids  [5, 7, 12]
    """

    token_ids: np.ndarray  # int32 [S]
    logprobs: np.ndarray  # float32 [S], nats, of the distribution that was sampled
    untruncated_logprobs: np.ndarray  # float32 [S], the same before truncation; equal to `logprobs` without it
    kept_counts: np.ndarray  # int32 [S], ids that truncation kept; 0: all of the vocabulary
    kept_ids: np.ndarray  # int32 [sum of kept_counts], each token's in ascending order

    def __len__(self) -> int:
        return len(self.token_ids)


NO_SAMPLES = Samples(
    token_ids=np.empty(0, np.int32),
    logprobs=np.empty(0, np.float32),
    untruncated_logprobs=np.empty(0, np.float32),
    kept_counts=np.empty(0, np.int32),
    kept_ids=np.empty(0, np.int32),
)


@dataclass(slots=True, kw_only=True, frozen=True)
class Request:
    """One trajectory to produce. Requests with the same prompt share one reading of it.

    A request that was broken off comes with what it has drawn; it goes on where it stood, and only reading is repeated.
    """

    trajectory_id: str
    prompt_id: str
    domain: str
    token_ids: tuple[int, ...]  # the prompt
    max_new_tokens: int | None = None  # a limit of its own below the sampling's; None: the sampling's
    sampled: Samples = field(default=NO_SAMPLES, compare=False)
    version_spans: tuple[VersionSpan, ...] = ()  # of `sampled`

    def limit(self, max_new_tokens: int, max_tokens: int) -> int:
        """Tokens of prompt and completion at which the trajectory ends at the latest."""
        own = max_new_tokens if self.max_new_tokens is None else min(max_new_tokens, self.max_new_tokens)
        return min(len(self.token_ids) + own, max_tokens)

    def prefix(self) -> np.ndarray:
        """Prompt and drawn tokens, int32 [T]: what the next token follows."""
        return np.concatenate((np.asarray(self.token_ids, dtype=np.int32), self.sampled.token_ids))


@dataclass(slots=True, kw_only=True, frozen=True)
class TruncatedTrajectory(Trajectory):
    """A trajectory whose sampling was truncated (top-k, top-p, min-p): what replaying the truncation needs."""

    untruncated_logprobs: np.ndarray  # float32 [T], nats, before truncation, same temperature; 0 where not sampled
    kept_counts: np.ndarray  # int32 [T], ids kept at each sampled token; 0 where not sampled
    kept_ids: np.ndarray  # int32 [sum of kept_counts]

    @property
    def untruncated_sampler_logprobs(self) -> np.ndarray:
        return self.untruncated_logprobs


def check_requests(requests: Sequence[Request], max_tokens: int) -> None:
    """Raises ValueError for an empty prompt, one that leaves no room for a token, and a limit below one token."""
    for request in requests:
        if not 1 <= len(request.token_ids) < max_tokens:
            raise ValueError(
                f"prompt {request.prompt_id} has {len(request.token_ids)} tokens; the engine takes 1 to "
                f"{max_tokens - 1}"
            )
        if request.max_new_tokens is not None and request.max_new_tokens < 1:
            raise ValueError(f"request {request.trajectory_id} asks for {request.max_new_tokens} tokens; it must be 1")


def end_of(request: Request, limit: int, stop_ids: np.ndarray) -> FinishReason | None:
    """Why a request that comes with drawn tokens is complete already; None if it goes on."""
    drawn = request.sampled.token_ids
    if len(drawn) and drawn[-1] in stop_ids:
        return "stop"
    return "length" if len(drawn) and len(request.token_ids) + len(drawn) >= limit else None


def concatenate(parts: Sequence[Samples]) -> Samples:
    """The columns of `parts`, one after another."""
    if not parts:
        return NO_SAMPLES
    return Samples(
        token_ids=np.concatenate([part.token_ids for part in parts]),
        logprobs=np.concatenate([part.logprobs for part in parts]),
        untruncated_logprobs=np.concatenate([part.untruncated_logprobs for part in parts]),
        kept_counts=np.concatenate([part.kept_counts for part in parts]),
        kept_ids=np.concatenate([part.kept_ids for part in parts]),
    )


def by_owner(owners: np.ndarray, samples: Samples, num_owners: int) -> list[Samples]:
    """What each of the owners 0 .. num_owners - 1 drew, in the order in which it was drawn; owners: integers [S]."""
    order = np.argsort(owners, kind="stable")
    counts = samples.kept_counts[order].astype(np.int64)
    kept_ends = counts.cumsum()
    # Entry j of a token's kept ids moves from its old place, first[token] + j, to the token's new one.
    first = (samples.kept_counts.cumsum() - samples.kept_counts)[order]
    places = np.repeat(first - (kept_ends - counts), counts) + np.arange(counts.sum())
    columns = (samples.token_ids[order], samples.logprobs[order], samples.untruncated_logprobs[order])
    kept_ids = samples.kept_ids[places]
    bounds = np.searchsorted(owners[order], np.arange(num_owners + 1))
    kept_bounds = np.concatenate(([0], kept_ends))[bounds]
    kept_counts = samples.kept_counts[order]
    return [
        Samples(
            token_ids=columns[0][begin:end],
            logprobs=columns[1][begin:end],
            untruncated_logprobs=columns[2][begin:end],
            kept_counts=kept_counts[begin:end],
            kept_ids=kept_ids[kept_begin:kept_end],
        )
        for begin, end, kept_begin, kept_end in zip(
            bounds[:-1], bounds[1:], kept_bounds[:-1], kept_bounds[1:], strict=True
        )
    ]


def finished(request: Request, samples: Samples, version: int, reason: FinishReason, routing: np.ndarray) -> Trajectory:
    """The record of a completed request. `samples` are all of its tokens, those it came with first; the others were
    drawn under policy `version`. `routing`, int16 [.., L, K], is that of the tokens that were read, if it is known."""
    prompt, resumed = len(request.token_ids), len(request.sampled)
    spans = request.version_spans
    if len(samples) > resumed and not (spans and spans[-1].policy_version == version):
        spans = (*spans, VersionSpan(start=prompt + resumed, policy_version=version))
    before = np.zeros(prompt, dtype=np.float32)
    token_ids = np.concatenate((request.token_ids, samples.token_ids)).astype(np.int32)
    trajectory = Trajectory(
        id=request.trajectory_id,
        prompt_id=request.prompt_id,
        domain=request.domain,
        token_ids=token_ids,
        loss_mask=np.arange(len(token_ids)) >= prompt,
        sampler_logprobs=np.concatenate((before, samples.logprobs)),
        version_spans=spans,
        finish_reason=reason,
        routing=np.concatenate((routing, np.full((len(token_ids) - len(routing), *routing.shape[1:]), -1, np.int16))),
    )
    if not samples.kept_counts.any():
        return trajectory
    return TruncatedTrajectory(
        **{field.name: getattr(trajectory, field.name) for field in fields(Trajectory)},
        untruncated_logprobs=np.concatenate((before, samples.untruncated_logprobs)),
        kept_counts=np.concatenate((before.astype(np.int32), samples.kept_counts)),
        kept_ids=samples.kept_ids,
    )
