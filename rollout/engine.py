"""Continuous batching for the V4 student: requests join and leave a fixed set of slots between two decoding steps.

One prompt is read once: the samples of its group go on from copies of its cache, which share its pages. Prompts are
read in chunks along with decoding, in the same call of the model, so that nobody waits for a long one. A request is
seated when the cache has pages for it; when pages run out all the same, the youngest request gives up its slot, keeps
its tokens, and is read again when there is room. The decoding path is arrays over the active slots: Python touches a
request when it is seated and when it has ended, not for every token. Results do not depend on slots, pages, chunks or
the order of requests: with compiled kernels on a CPU, for a model of four streams in float32, in no bit, elsewhere but
for floating-point rounding in the logits.

Consumes requests, produces trajectories in the order of the requests, waits for nobody but the log: a token is in it
before the next one is computed.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from opd.config import ConfigError, SamplingConfig
from opd.model import DeepseekV4
from opd.model.cache import OutOfPages
from opd.model.step import Extend, Part, stepper
from opd.types import FinishReason, Trajectory, no_routing
from rollout.request import Request, Samples, by_owner, check_requests, concatenate, end_of, finished
from rollout.sampling import sample_next, trajectory_key
from rollout.wal import Log, log_complete

PREFILL_TOKENS = 8192  # padded prompt tokens read along with one decoding step
REFILL_SHARE = 8  # requests whose prompt is to be read join when one slot in so many is free: together they cost less
SPARE_SHARE = 8  # pages kept free for decoding when a request is seated: one for so many active slots
NOBODY = -1
NO_SLOTS = np.empty(0, dtype=np.int64)


@dataclass(slots=True, kw_only=True)
class _Run:
    """One call of `generate`. A request is known by its place among the requests, a prompt by its number.

    `order` fixes who is young: requests of one prompt are neighbours in it, prompts come in the order they are first
    asked for. Every seated request is before every waiting one.
    """

    requests: Sequence[Request]
    sampling: SamplingConfig
    log: Log | None
    extend: Extend  # the model under its present weights, with the engine's cache
    prompts: list[int]  # prompt of each request
    rank: np.ndarray  # int64 [requests], place in the order
    waiting: deque[int]
    unread: Counter[int]  # prompt -> its waiting requests
    prefixes: dict[int, np.ndarray]  # of waiting requests: all tokens so far, int32
    reading: list[int] = field(default_factory=list)  # slots whose prefix is not in the cache yet
    active: np.ndarray = field(default_factory=lambda: NO_SLOTS)  # slots that decode
    shelf_prompt: int = NOBODY
    owners: list[np.ndarray] = field(default_factory=list)  # per step: the request of each sample
    steps: list[Samples] = field(default_factory=list)
    reasons: dict[int, FinishReason] = field(default_factory=dict)
    routing: dict[int, np.ndarray] = field(default_factory=dict)  # of requests that have ended, if it is recorded


class V4Engine:
    """Samples from a `DeepseekV4`, whose weights may be replaced between two calls of `generate`."""

    def __init__(
        self,
        model: DeepseekV4,
        *,
        num_slots: int,
        max_tokens: int,
        stop_ids: Sequence[int],
        seed: int,
        prefill_tokens: int = PREFILL_TOKENS,
        num_pages: int | None = None,
        record_routing: bool = False,
    ) -> None:
        """`max_tokens` of prompt and completion together; `stop_ids` end a completion and are part of it.

        `num_pages` of the cache, at least as many as one sequence of `max_tokens` needs; None: enough for all slots.
        `record_routing` keeps the experts of every token that is read, as `Trajectory.routing`. What is read again,
        after a preemption or from a log, is recorded again, the same where results are, and logs need not hold it.
        """
        device, (vocab_size, width) = model.head.device, model.head.shape
        self.model, self.num_slots, self.max_tokens, self.seed = model.eval(), num_slots, max_tokens, seed
        self.prefill_tokens = prefill_tokens
        # The slot after the last belongs to no request: it keeps the prompt of a group that waits for more slots.
        self.shelf = num_slots
        self.cache = model.new_cache(num_slots + 1, max_tokens, num_pages)
        if self.cache.num_pages < self._pages(max_tokens):
            least = self._pages(max_tokens)
            raise ValueError(f"num_pages={num_pages} is too small: a sequence of {max_tokens} tokens needs {least}")
        self.hidden = torch.zeros(num_slots + 1, width, dtype=model.head.dtype, device=device)  # of the last token read
        self.record_routing = record_routing
        self.routing = model.new_routing(num_slots + 1 if record_routing else 0, max_tokens)  # by slot and position
        self.stop_ids = np.array(sorted(stop_ids), dtype=np.int64)
        self.stops = np.isin(np.arange(vocab_size), self.stop_ids)
        # On the host, per slot. A slot decodes when all of its tokens but the last one are in the cache.
        self.occupants = np.zeros(num_slots, dtype=np.int64)  # request
        self.keys = np.zeros(num_slots, dtype=np.int64)  # noise stream of its trajectory
        self.tokens = np.zeros((num_slots, max_tokens), dtype=np.int32)  # prompt and what followed
        self.lengths = np.zeros(num_slots, dtype=np.int64)  # how many these are
        self.ends = np.zeros(num_slots, dtype=np.int64)  # how many are in the cache
        self.prompt_ends = np.zeros(num_slots, dtype=np.int64)  # tokens of the prompt
        self.limits = np.zeros(num_slots, dtype=np.int64)  # tokens a finished trajectory may have at most
        self.free: list[int] = []
        self.prefilled_tokens = 0  # read by the last call, shared ones counted once
        self.decoding_steps = 0  # of the last call
        self.preemptions = 0  # of the last call

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[Request], sampling: SamplingConfig, policy_version: int, log: Log | None = None
    ) -> list[Trajectory]:
        """One trajectory per request, in their order; tokens go to `log` as they are drawn.

        Raises ValueError for a prompt that leaves no room for a token and for weights that give logits which are not
        finite, and what the log raises.
        """
        check_requests(requests, self.max_tokens)
        self.prefilled_tokens = self.decoding_steps = self.preemptions = 0
        self.free = list(range(self.num_slots))
        self.cache.release(range(self.num_slots + 1))  # what a call that failed left behind
        run = self._begin(requests, sampling, log)
        while run.waiting or run.reading or len(run.active):
            self._admit(run)
            self._step(run)
        drawn = by_owner(np.concatenate([NO_SLOTS, *run.owners]), concatenate(run.steps), len(requests))
        routing = [run.routing.get(index, no_routing(0)) for index in range(len(requests))]
        return [
            finished(request, drawn[index], policy_version, run.reasons[index], routing[index])
            for index, request in enumerate(requests)
        ]

    def _begin(self, requests: Sequence[Request], sampling: SamplingConfig, log: Log | None) -> _Run:
        numbers: dict[tuple[int, ...], int] = {}
        prompts = [numbers.setdefault(request.token_ids, len(numbers)) for request in requests]
        order = sorted(range(len(requests)), key=lambda index: prompts[index])
        rank = np.empty(len(requests), dtype=np.int64)
        rank[order] = np.arange(len(requests))
        run = _Run(
            requests=requests,
            sampling=sampling,
            log=log,
            extend=stepper(self.model, self.cache),
            prompts=prompts,
            rank=rank,
            waiting=deque(),
            unread=Counter(),
            prefixes={},
        )
        for index in order:
            request = requests[index]
            if len(request.sampled):
                run.owners.append(np.full(len(request.sampled), index))
                run.steps.append(request.sampled)
            reason = end_of(request, request.limit(sampling.max_new_tokens, self.max_tokens), self.stop_ids)
            if reason is not None:
                run.reasons[index] = reason
                if not self.record_routing:
                    continue
            run.waiting.append(index)
            run.unread[prompts[index]] += 1
            # Of one that is complete nothing is drawn: what its tokens but the last are sent to is all that is missing.
            run.prefixes[index] = request.prefix() if reason is None else request.prefix()[:-1]
        log_complete(log, run.reasons)
        return run

    # ---- seats -------------------------------------------------------------------------------------------------------

    def _pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.cache.page_tokens)

    def _admit(self, run: _Run) -> None:
        """Seats the requests that have waited longest, as many as there are slots and pages for."""
        if not run.waiting or not self.free:
            return
        num_seated = self.num_slots - len(self.free)
        enough = min(len(run.waiting), max(1, self.num_slots // REFILL_SHARE))
        is_read = run.prompts[run.waiting[0]] == run.shelf_prompt
        if num_seated and len(self.free) < enough and not is_read:
            return
        promised = sum(self._pages(self.lengths[s] + 1) - self._pages(self.ends[s]) for s in run.reading)
        room = self.cache.free_pages - promised - -(-len(run.active) // SPARE_SHARE)
        seated, from_shelf = [], []
        read = {run.prompts[self.occupants[slot]] for slot in run.reading} | {run.shelf_prompt}
        while run.waiting and self.free:
            index = run.waiting[0]
            prompt, request, prefix = run.prompts[index], run.requests[index], run.prefixes[index]
            shared = len(request.token_ids) // self.cache.page_tokens if prompt in read else 0
            pages = self._pages(len(prefix) + 1) - shared
            if pages > room and num_seated:  # the first one always gets its seat: alone it has pages enough
                break
            run.waiting.popleft()
            run.unread[prompt] -= 1
            del run.prefixes[index]
            slot = self.free.pop()
            self.occupants[slot], self.ends[slot] = index, 0
            self.keys[slot] = trajectory_key(request.trajectory_id, self.seed)
            self.tokens[slot, : len(prefix)] = prefix
            self.lengths[slot], self.prompt_ends[slot] = len(prefix), len(request.token_ids)
            self.limits[slot] = request.limit(run.sampling.max_new_tokens, self.max_tokens)
            seated.append(slot)
            if prompt == run.shelf_prompt:
                from_shelf.append(slot)
            read.add(prompt)
            room, num_seated = room - pages, num_seated + 1
        if not seated:
            return
        run.reading += seated
        self._copy(self.shelf, from_shelf)
        if run.shelf_prompt != NOBODY and not run.unread[run.shelf_prompt]:
            self._clear_shelf(run)

    def _copy(self, source: int, slots: list[int]) -> None:
        """Puts the prompt that `source` has just read into other slots."""
        if not slots:
            return
        self.cache.fork([source] * len(slots), slots, [self.hidden])
        seats = [slot for slot in slots if slot != self.shelf]
        self.ends[seats] = self.prompt_ends[seats]
        if self.record_routing:
            end = self.prompt_ends[slots[0] if source == self.shelf else source]
            self.routing[slots, :end] = self.routing[source, :end]

    def _clear_shelf(self, run: _Run) -> None:
        self.cache.release([self.shelf])
        run.shelf_prompt = NOBODY

    def _give_way(self, run: _Run) -> None:
        """Frees pages: those of the shelf, or else those of the youngest seated request, which waits again."""
        if run.shelf_prompt != NOBODY:
            self._clear_shelf(run)
            return
        seated = np.concatenate((np.array(run.reading, dtype=np.int64), run.active))
        assert len(seated) > 1, "one sequence alone has pages enough"
        slot = int(seated[run.rank[self.occupants[seated]].argmax()])
        index = int(self.occupants[slot])
        run.prefixes[index] = self.tokens[slot, : self.lengths[slot]].copy()
        run.waiting.appendleft(index)
        run.unread[run.prompts[index]] += 1
        if slot in run.reading:
            run.reading.remove(slot)
        run.active = run.active[run.active != slot]
        self.cache.release([slot])
        self.free.append(slot)
        self.preemptions += 1

    # ---- steps -------------------------------------------------------------------------------------------------------

    def _step(self, run: _Run) -> None:
        """One call of the model: the last token of every active slot, and chunks of prefixes that are being read. Then
        the next token of every slot whose prefix is in the cache."""
        ready, reading, sizes, parts = self._parts(run)
        records = [self.model.new_routing(*token_ids.shape) for token_ids, _ in parts if self.record_routing]
        hidden = run.extend(parts, records) if parts else self.hidden[:0]
        if records:
            self._keep(parts, records)
        self.ends[ready] += 1
        self.decoding_steps += bool(len(ready))
        if run.reading:
            if len(reading):
                self.hidden[torch.as_tensor(reading, device=hidden.device)] = hidden[len(ready) :]
                self._share_prompts(run, reading, sizes)
            complete = [slot for slot in run.reading if self.ends[slot] == self.lengths[slot]]
            run.reading = [slot for slot in run.reading if self.ends[slot] < self.lengths[slot]]
            if self.record_routing:
                self._leave(run, [slot for slot in complete if self.occupants[slot] in run.reasons])
                complete = [slot for slot in complete if self.occupants[slot] not in run.reasons]
            if complete:
                seats = np.array(complete, dtype=np.int64)
                others = self.hidden.index_select(0, torch.as_tensor(seats, device=hidden.device))
                hidden, ready = torch.cat((hidden[: len(ready)], others)), np.concatenate((ready, seats))
            else:
                hidden = hidden[: len(ready)]
        if len(ready):
            run.active = self._draw(run, ready, hidden)

    def _keep(self, parts: list[Part], records: list[torch.Tensor]) -> None:
        """The experts of new tokens go where their slots have them."""
        for (_, at), record in zip(parts, records, strict=True):
            rows, columns = (at.positions < (at.starts + at.lengths)[:, None]).nonzero(as_tuple=True)
            self.routing[at.slots[rows], at.positions[rows, columns]] = record[rows, columns]

    def _parts(self, run: _Run) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[Part]]:
        """What the next call feeds, with pages for it: active slots by one token, readers by their chunks. Where pages
        run out, somebody gives way."""
        while True:
            reading, sizes = self._chunks(run)
            try:
                # Who decodes goes on; who reads shares its pages with others when it is at the prompt's end.
                fed = [(run.active, np.ones_like(run.active), self.cache.page_tokens), (reading, sizes, 0)]
                parts = [self._part(slots, counts, ahead) for slots, counts, ahead in fed if len(slots)]
            except OutOfPages:
                self._give_way(run)
                continue
            self.prefilled_tokens += int(sizes.sum())
            return run.active, reading, sizes, parts

    def _part(self, slots: np.ndarray, sizes: np.ndarray, ahead: int) -> Part:
        """The next `sizes` tokens of each slot, and where they go; pages are taken `ahead`. Raises OutOfPages."""
        starts = self.ends[slots]
        at = self.cache.extension(slots, starts, sizes, ahead=ahead)
        columns = starts[:, None]
        if at.positions.shape[1] > 1:
            columns = np.minimum(columns + np.arange(at.positions.shape[1]), self.max_tokens - 1)
        token_ids = self.tokens[slots[:, None], columns].astype(np.int64)
        return torch.as_tensor(token_ids, device=at.slots.device), at

    def _share_prompts(self, run: _Run, readers: np.ndarray, sizes: np.ndarray) -> None:
        """Moves readers on by what they have read. A prompt is read by one of the seated requests that share it; the
        others, and the shelf if more of them wait, copy what it has when it stands at the prompt's end."""
        self.ends[readers] += sizes
        for slot in readers[self.ends[readers] == self.prompt_ends[readers]].tolist():
            prompt = run.prompts[self.occupants[slot]]
            mates = [
                other for other in run.reading if self.ends[other] == 0 and run.prompts[self.occupants[other]] == prompt
            ]
            if run.unread[prompt] and run.shelf_prompt != prompt:
                mates.append(self.shelf)
                run.shelf_prompt = prompt
            self._copy(slot, mates)

    def _chunks(self, run: _Run) -> tuple[np.ndarray, np.ndarray]:
        """Who reads how many tokens now: the oldest first, up to the budget of padded tokens, and never across the end
        of a prompt, where others may copy it."""
        if not run.reading:
            return NO_SLOTS, NO_SLOTS
        budget = self.prefill_tokens
        slots: list[int] = []
        sizes: list[int] = []
        reads: set[int] = set()  # prompts that somebody reads
        at_work = sorted(run.reading, key=lambda slot: (self.ends[slot] == 0, run.rank[self.occupants[slot]]))
        for slot in at_work:
            end, prompt = self.ends[slot], run.prompts[self.occupants[slot]]
            if end == self.lengths[slot]:
                continue
            if end < self.prompt_ends[slot]:
                if prompt in reads:
                    continue
                reads.add(prompt)
            goal = self.prompt_ends[slot] if end < self.prompt_ends[slot] else self.lengths[slot]
            size = min(int(goal - end), budget)
            if slots and (len(slots) + 1) * max(*sizes, size) > budget:
                break
            slots.append(slot)
            sizes.append(size)
        return np.array(slots, dtype=np.int64), np.array(sizes, dtype=np.int64)

    def _draw(self, run: _Run, slots: np.ndarray, hidden: torch.Tensor) -> np.ndarray:
        """Draws the token that follows the cached ones and logs it; returns the slots that go on, and frees the others.

        The token is not in the cache yet.
        """
        lengths = self.lengths[slots]
        keys, positions = (torch.as_tensor(column, device=hidden.device) for column in (self.keys[slots], lengths))
        samples = sample_next(hidden, self.model.head, keys, positions, run.sampling).samples()
        self.tokens[slots, lengths] = samples.token_ids
        self.lengths[slots] = lengths + 1
        stopped = self.stops[samples.token_ids]
        over = stopped | (lengths + 1 >= self.limits[slots])
        owners = self.occupants[slots]
        if run.log is not None:
            run.log.append(owners, samples, owners[over], stopped[over])
        run.owners.append(owners)
        run.steps.append(samples)
        if not over.any():
            return slots
        for slot, by_token in zip(slots[over].tolist(), stopped[over], strict=True):
            run.reasons[int(self.occupants[slot])] = "stop" if by_token else "length"
        self._leave(run, slots[over].tolist())
        return slots[~over]

    def _leave(self, run: _Run, slots: list[int]) -> None:
        """Frees the slots of requests that have ended."""
        for slot in slots if self.record_routing else ():
            run.routing[int(self.occupants[slot])] = self.routing[slot, : self.ends[slot]].numpy(force=True).copy()
        self.free += slots
        self.cache.release(slots)


def pages_of(model: DeepseekV4, num_slots: int, max_tokens: int, cache_bytes: int | None) -> int | None:
    """The pages that an engine's cache of `cache_bytes` has; None where that is enough for all slots.

    Raises ConfigError, with the least that works, for a cache that cannot hold one sequence of `max_tokens`.
    """
    if cache_bytes is None:
        return None
    one, two = (model.new_cache(1, max_tokens, count) for count in (1, 2))
    page_bytes = two.num_bytes() - one.num_bytes()
    slot_bytes = model.new_cache(2, max_tokens, 1).num_bytes() - one.num_bytes()
    fixed, pages_each = (num_slots + 1) * slot_bytes, -(-max_tokens // one.page_tokens)
    if cache_bytes < fixed + pages_each * page_bytes:
        raise ConfigError(
            f"rollout.cache_bytes={cache_bytes} is too small: num_slots={num_slots} need {fixed} bytes, and one "
            f"sequence of max_tokens={max_tokens} needs {pages_each * page_bytes} more"
        )
    most = (num_slots + 1) * pages_each
    return most if not page_bytes else min(most, (cache_bytes - fixed) // page_bytes)
