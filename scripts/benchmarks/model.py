"""The V4 student beside transformers' class, and over the context: training step, memory, decoding, cache, recall.

Both models hold the same weights and do the same step in float32: hidden states, logits and next-token cross-entropy of
random tokens, then the backward, no gradient checkpointing. The student also rounds experts and index keys to MXFP4, as
its config says. transformers' class has one attention (eager); of its implementations of the experts the fastest on the
machine counts. The student is that of the quickstart; `key=value` overrides are those of `opd`.

Memory is how far the resident set of a fresh process rises in one step, at its highest, after the model and the tokens
exist and a step at a short length has loaded the libraries: so parameters are left out, and gradients are in. What
transformers' class would need at a length that it cannot run is a T^2 + b T, fitted to the lengths that it can.

Decoding is a rollout worker's, with weights held as MXFP4 bytes. It starts from a cache whose entries are random
numbers, written without running the model, and goes greedily through the last `DECODED` tokens of the context. Weights
are fresh ones throughout: time and memory hardly depend on what a model has learnt.

What the compressed entries and the indexer are good for is the `needle` benchmark's, whose figures come last here.
Freed memory stays with this process, as with a learner; where memory is measured it does not.
"""

from __future__ import annotations

import copy
import ctypes
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV4ForCausalLM

from opd.__main__ import compose
from opd.config import ConfigError, ModelConfig
from opd.cost import cache_bytes
from opd.fp4 import pack_weights
from opd.losses import token_logprobs
from opd.memory import keep_freed_memory
from opd.model import DeepseekV4, new_v4
from opd.model.cache import Cache, Layout
from opd.model.step import stepper
from opd.model.transformer import CSA, HCA, num_parameters
from scripts.benchmarks import Figure, interleaved, needle, peak_memory, report, split_arguments

OPD = "opd"
# transformers' implementations of the experts that need no further package. Its batched_mm, made for a few tokens, is
# not among them: it copies an expert's matrices for every token.
EXPERTS = ("eager", "grouped_mm")
STEP = (64, 128)  # rows, tokens of a row
WARM_UP_TOKENS = 256
RUNNABLE = (1024, 2048, 4096)  # lengths at which transformers' class fits 8 GB
LONG = 16384
GROWTH = (4096, 32768)
DECODED = 32  # with them one block of every layer closes
CONTEXTS = (4096, 131072)
DECODED_ROWS = 4
LONGEST = 1 << 20
REPEATS = 5
LONG_REPEATS = 3  # of what takes long, and so varies less
SEED = 0
M_MMAP_THRESHOLD = -3  # of malloc.h


def main(argv: list[str]) -> int:
    """The exit status of `report`, or 2 for overrides that are refused."""
    as_json, overrides = split_arguments(argv)
    try:
        config = compose("quickstart", overrides)[0]
        if config.model.family != "deepseek_v4" or config.model.path is not None:
            raise ConfigError("model.family must be deepseek_v4 and model.path null: the student is built here")
        model, vocab_size = config.model, config.tokenizer.vocab_size
        student = new_v4(model, vocab_size, SEED)
        policy = new_v4(_with_room(model, LONGEST, production_ratios=True), vocab_size, SEED)
    except ConfigError as error:
        print(f"model: {error}", file=sys.stderr)
        return 2
    keep_freed_memory()
    figures = [
        Figure(name="cores", value=len(os.sched_getaffinity(0)), unit="count"),
        Figure(name="threads", value=torch.get_num_threads(), unit="count"),
        Figure(name="parameters", value=num_parameters(student), unit="count"),
        *training_figures(model, vocab_size, "cpu", least=4),
    ]
    if torch.cuda.is_available():
        figures += training_figures(model, vocab_size, "cuda", least=3)
    figures += memory_figures(model, vocab_size)
    figures += growth_figures(model, vocab_size)
    pack_weights(policy, model.fp4)
    figures += decoding_figures(policy)
    figures += [replace(figure, name=f"needle: {figure.name}") for figure in needle.figures(**needle.SETTINGS)]
    title = f"the student: a step of {STEP[0]} x {STEP[1]} tokens, long sequences, decoding; beside transformers' class"
    return report(title, figures, as_json)


# ---- training --------------------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Trial:
    """One network (OPD or one of EXPERTS) and the random tokens of its step.

    `prepare` builds both and takes a short step, `step` is what is measured. Two methods that are sent to another
    process in one message share the object there.
    """

    model: ModelConfig
    vocab_size: int
    name: str
    rows: int
    length: int
    device: str = "cpu"
    network: nn.Module | None = field(init=False, default=None)
    tokens: Tensor = field(init=False, default_factory=lambda: torch.zeros(0, 0))

    def prepare(self) -> None:
        student = new_v4(_with_room(self.model, self.length), self.vocab_size, SEED)
        network = student if self.name == OPD else twin(student, self.name)
        generator = torch.Generator().manual_seed(SEED)
        tokens = torch.randint(self.vocab_size, (self.rows, self.length), generator=generator)
        self.network, self.tokens = network.to(self.device).train(), tokens.to(self.device)
        train_step(self.network, self.tokens[:, :WARM_UP_TOKENS])

    def prepare_to_be_weighed(self) -> None:
        """`prepare`, with freed tensors given back to the system at once: glibc would keep those of the short step for
        the measured one, where nobody would see them."""
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
        self.prepare()

    def step(self) -> None:
        assert self.network is not None
        train_step(self.network, self.tokens)
        if self.device == "cuda":
            torch.cuda.synchronize()


def twin(student: DeepseekV4, experts: str) -> nn.Module:
    """transformers' class with the student's weights."""
    config = copy.deepcopy(student.config)
    theirs = DeepseekV4ForCausalLM._from_config(config, attn_implementation="eager", experts_implementation=experts)
    theirs.load_state_dict(student.state_dict())
    return theirs


def train_step(network: nn.Module, tokens: Tensor) -> None:
    """Forward and backward of the next-token loss of int64 [B, T], each network with the loss that it is trained with:
    the learner's, from hidden states, or cross-entropy of logits. Gradients are dropped at the end."""
    targets = tokens[:, 1:].flatten()
    match network:
        case DeepseekV4():
            lengths = torch.full((len(tokens),), tokens.shape[1], device=tokens.device)
            hidden = network(tokens, lengths).hidden[:, :-1].flatten(0, 1)
            loss = -token_logprobs(hidden, network.head, targets)[0].mean()
        case _:
            logits = cast(Any, network)(input_ids=tokens, use_cache=False).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), targets)
    loss.backward()
    network.zero_grad()


def training_figures(model: ModelConfig, vocab_size: int, device: str, least: int) -> list[Figure]:
    """A step of both, in turn, and how many times the student is as fast as the fastest setting of transformers' class;
    `least` is the bar."""
    steps: dict[str, Callable[[], None]] = {}
    for name in (OPD, *EXPERTS):
        trial = Trial(model=model, vocab_size=vocab_size, name=name, rows=STEP[0], length=STEP[1], device=device)
        try:
            trial.prepare()
        except RuntimeError as error:  # the device has no kernel for this implementation in float32
            if name == OPD:
                raise
            print(f"model: {name} experts do not run on {device}: {error}", file=sys.stderr)
            continue
        steps[name] = trial.step
    seconds = interleaved(steps, REPEATS)
    figures = [Figure(name=f"{device} step, opd", value=median(seconds[OPD]), unit="s")]
    theirs = {name: median(values) for name, values in seconds.items() if name != OPD}
    figures += [
        Figure(name=f"{device} step, transformers {name}", value=value, unit="s") for name, value in theirs.items()
    ]
    tokens = STEP[0] * STEP[1]
    figures.append(Figure(name=f"{device} rate, opd", value=tokens / median(seconds[OPD]), unit="tokens/s"))
    fastest = min(theirs, key=lambda name: theirs[name])
    speed_up = _ratio(seconds[fastest], seconds[OPD])
    figures.append(
        Figure(name=f"{device} step speed-up", value=speed_up, unit="x", bar=f">= {least}", ok=speed_up >= least)
    )
    return figures


# ---- long sequences --------------------------------------------------------------------------------------------------


def memory_figures(model: ModelConfig, vocab_size: int) -> list[Figure]:
    """Peak memory of a step over one sequence: transformers' class where it runs, the student there and at LONG."""

    def peak(name: str, length: int) -> int:
        trial = Trial(model=model, vocab_size=vocab_size, name=name, rows=1, length=length)
        return peak_memory(trial.step, trial.prepare_to_be_weighed)

    theirs = {length: peak("eager", length) for length in RUNNABLE}
    ours = {length: peak(OPD, length) for length in (RUNNABLE[-1], LONG)}
    figures = [
        Figure(name=f"memory at {length}, transformers", value=size / 2**20, unit="MiB")
        for length, size in theirs.items()
    ]
    figures += [
        Figure(name=f"memory at {length}, opd", value=size / 2**20, unit="MiB") for length, size in ours.items()
    ]
    square, linear = growth_law(theirs)
    scaled = square * LONG**2 + linear * LONG
    misfit = max(abs(square * length**2 + linear * length - size) / size for length, size in theirs.items())
    share, same_length = ours[LONG] / scaled, ours[RUNNABLE[-1]] / theirs[RUNNABLE[-1]]
    return [
        *figures,
        Figure(name=f"memory at {LONG}, transformers, scaled", value=scaled / 2**20, unit="MiB"),
        Figure(name="misfit of the law", value=misfit, unit="share"),
        Figure(name=f"memory share at {RUNNABLE[-1]}", value=same_length, unit="share"),
        Figure(name=f"memory share at {LONG}", value=share, unit="share", bar="<= 0.125", ok=share <= 0.125),
    ]


def growth_law(sizes: dict[int, int]) -> tuple[float, float]:
    """(a, b) of a T^2 + b T, nearest to the sizes by length in relative error."""
    lengths, values = (np.array(list(part), dtype=np.float64) for part in (sizes, sizes.values()))
    columns = np.stack((lengths**2, lengths), 1) / values[:, None]
    square, linear = np.linalg.lstsq(columns, np.ones(len(lengths)), rcond=None)[0]
    return float(square), float(linear)


def growth_figures(model: ModelConfig, vocab_size: int) -> list[Figure]:
    """Time per token of the student's step over one sequence, short and long."""
    trials = [Trial(model=model, vocab_size=vocab_size, name=OPD, rows=1, length=length) for length in GROWTH]
    for trial in trials:
        trial.prepare()
    seconds = interleaved({str(trial.length): trial.step for trial in trials}, LONG_REPEATS)
    short, long = ([value / length for value in seconds[str(length)]] for length in GROWTH)
    growth = _ratio(long, short)
    return [
        Figure(name=f"training at {GROWTH[0]}", value=median(short) * 1e6, unit="us/token"),
        Figure(name=f"training at {GROWTH[1]}", value=median(long) * 1e6, unit="us/token"),
        Figure(name=f"training growth to {GROWTH[1]}", value=growth, unit="x", bar="< 1.6", ok=growth < 1.6),
    ]


# ---- decoding --------------------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Decoder:
    """Greedy decoding of the last DECODED tokens before `context`, in `rows` rows at once; it can be run again."""

    student: DeepseekV4
    rows: int
    context: int
    layout: Layout
    cache: Cache = field(init=False)

    def __post_init__(self) -> None:
        self.cache = filled_cache(self.student, self.rows, self.context, self.layout)

    @torch.inference_mode()
    def run(self) -> None:
        extend = stepper(self.student, self.cache)
        slots, ones = range(self.rows), [1] * self.rows
        token_ids = torch.zeros(self.rows, 1, dtype=torch.int64)
        for position in range(self.context - DECODED, self.context):
            at = self.cache.extension(slots, [position] * self.rows, ones)
            logits = F.linear(extend([(token_ids, at)]), self.student.head)
            token_ids = logits.argmax(-1, keepdim=True)
            if not logits.isfinite().all():
                raise ArithmeticError(f"logits at position {position} are not finite")


@torch.inference_mode()
def filled_cache(student: DeepseekV4, rows: int, context: int, layout: Layout) -> Cache:
    """A cache of exactly `context` tokens a row, pages taken and every entry a random number in its stored format."""
    cache = student.new_cache(rows, context, layout=layout)
    cache.extension(range(rows), [0] * rows, [context] * rows)
    generator = torch.Generator().manual_seed(SEED)
    for layer in cache.layers:
        stored = [(layer.window, layer.format), *((state.entries, state.format) for state in layer.states())]
        for rows_of, row_format in stored:
            values = torch.randn(*rows_of.shape[:2], row_format.width, generator=generator)
            rows_of.copy_(row_format.encode(values))
        for state in layer.states():
            state.kv.normal_(generator=generator)
            state.gate.normal_(generator=generator)
    return cache


def decoding_figures(student: DeepseekV4) -> list[Figure]:
    """Time of a decoding step at the two contexts, in turn; that at the longest, and the bytes of its cache."""
    decoders = [Decoder(student=student, rows=DECODED_ROWS, context=context, layout="plain") for context in CONTEXTS]
    seconds = interleaved({str(decoder.context): decoder.run for decoder in decoders}, REPEATS)
    short, long = ([value / DECODED for value in seconds[str(context)]] for context in CONTEXTS)
    longest = Decoder(student=student, rows=1, context=LONGEST, layout="packed")
    (longest_seconds,) = interleaved({"longest": longest.run}, LONG_REPEATS).values()
    measured = longest.cache.num_bytes()
    formula = cache_bytes(student.config, LONGEST, "packed", allocated=True).total
    growth, gap = _ratio(long, short), measured - formula
    return [
        Figure(name=f"decoding at {CONTEXTS[0]} x {DECODED_ROWS}", value=median(short) * 1e3, unit="ms"),
        Figure(name=f"decoding at {CONTEXTS[1]} x {DECODED_ROWS}", value=median(long) * 1e3, unit="ms"),
        Figure(name=f"decoding growth to {CONTEXTS[1]}", value=growth, unit="x", bar="<= 2", ok=growth <= 2),
        Figure(name=f"decoding at {LONGEST} x 1", value=median(longest_seconds) / DECODED * 1e3, unit="ms"),
        Figure(name=f"cache at {LONGEST}", value=measured, unit="bytes"),
        Figure(name=f"cache at {LONGEST}, by formula", value=formula, unit="bytes"),
        Figure(name="cache over formula", value=gap, unit="bytes", bar="0", ok=gap == 0),
    ]


def _with_room(model: ModelConfig, tokens: int, production_ratios: bool = False) -> ModelConfig:
    """The same model with room for `tokens`; with V4's own ratios and window if asked."""
    fields = dict(model.config)
    fields["max_position_embeddings"] = max(tokens, fields.get("max_position_embeddings", 0))
    if production_ratios:
        fields |= {"compress_rates": {CSA: 4, HCA: 128}, "sliding_window": 128}
    return replace(model, config=fields, max_tokens=max(tokens, model.max_tokens))


def _ratio(dividends: list[float], divisors: list[float]) -> float:
    """The median ratio of what was measured in pairs."""
    return median(dividend / divisor for dividend, divisor in zip(dividends, divisors, strict=True))
