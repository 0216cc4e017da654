"""What a DeepSeek-V4 costs to serve: parameters, KV-cache bytes by context length, FLOPs of one decoded token.

All of it is arithmetic on the published config's fields; nothing is built. The one idea: count the way the published
ratios to DeepSeek-V3.2 were counted (cache: what grows with the context; FLOPs: in units of FP8 ones), and keep apart
what those counts leave out (window and tails). The tests hold the formulas to the models and caches of `opd.model`.

The file is long because it holds the shapes of two architectures, two tables and a page. Left out: multi-token
prediction, activations, the operations of norms and softmax (well below a per cent), and anything about time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import matplotlib
import yaml
from jinja2 import Environment
from markupsafe import Markup
from matplotlib.ticker import FuncFormatter
from transformers import DeepseekV4Config

import conf
from opd.config import Config, ConfigError, at_least
from opd.model.transformer import CSA, HCA, v4_config
from opd.report import FIGURE_STYLE, ink, new_axes, page_style, to_svg
from opd.weights import load_model_config

Layout = Literal["packed", "bf16"]

PUBLISHED = {"V4-Flash": "v4_flash", "V4-Pro": "v4_pro"}  # name -> file of conf/model
BASELINE = "V3.2"
LONGEST = 1 << 20  # the published context, and the right end of the figures


@dataclass(slots=True, kw_only=True, frozen=True)
class Weights:
    """Parameters by what a decoded token does with them."""

    fp8: int  # in matrices every token is multiplied by, in the FP8 or FP4 of the released weights
    bf16: int  # the same, in BF16 or wider: head, grouped output, compressors, routers, hyper-connections
    idle: int  # in routed experts a token is not sent to
    embedding: int  # looked up
    vectors: int  # norms, biases, sinks, position biases

    @property
    def total(self) -> int:
        return self.fp8 + self.bf16 + self.idle + self.embedding + self.vectors

    @property
    def activated(self) -> int:
        """What a token uses, the head included and the embedding not."""
        return self.fp8 + self.bf16 + self.vectors


@dataclass(slots=True, kw_only=True, frozen=True)
class CacheBytes:
    """One sequence's cache in bytes, by part."""

    csa_entries: int = 0
    index_keys: int = 0
    hca_entries: int = 0
    window: int = 0
    tails: int = 0  # kv and gate of tokens whose block is open, or whose carry the next block needs

    @property
    def compressed(self) -> int:
        """The part that grows with the context, which is what the published ratios compare."""
        return self.csa_entries + self.index_keys + self.hca_entries

    @property
    def state(self) -> int:
        """The part that stays the same once a sequence fills the window."""
        return self.window + self.tails

    @property
    def total(self) -> int:
        return self.compressed + self.state


@dataclass(slots=True, kw_only=True, frozen=True)
class Flops:
    """One decoded token's floating-point operations (a multiply-add is two)."""

    linear: int
    linear_bf16: int  # the part of `linear` whose weights are not FP8 or FP4
    attention: int  # scores and values of the attended entries
    indexer: int  # index scores of all blocks or tokens
    index_cost: float  # of one indexer operation, in FP8 ones: FP4 0.5, FP8 1

    @property
    def raw(self) -> int:
        return self.linear + self.attention + self.indexer

    def fp8_bracket(self) -> tuple[float, float]:
        """In FP8 operations, a BF16 one counting twice: (all linears FP8, `linear_bf16` of them BF16).

        The report does not say which linears its figures count as BF16; they lie between the two.
        """
        least = self.linear + 2 * self.attention + self.index_cost * self.indexer
        return least, least + self.linear_bf16


@dataclass(slots=True, kw_only=True, frozen=True)
class DeepseekV32:
    """The baseline of the published ratios, by the names of its config.json: absorbed MLA, an indexer over tokens."""

    vocab_size: int = 129280
    hidden_size: int = 7168
    num_hidden_layers: int = 61
    first_k_dense_replace: int = 3
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    n_routed_experts: int = 256
    num_experts_per_tok: int = 8
    num_attention_heads: int = 128
    q_lora_rank: int = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 2048

    def weights(self) -> Weights:
        d, heads, layers = self.hidden_size, self.num_attention_heads, self.num_hidden_layers
        dense = self.first_k_dense_replace
        latents = self.q_lora_rank + self.kv_lora_rank + self.qk_rope_head_dim
        queries = self.q_lora_rank * heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)
        absorbed = self.kv_lora_rank * heads * (self.qk_nope_head_dim + self.v_head_dim)
        indexer = self.q_lora_rank * self.index_n_heads * self.index_head_dim + d * self.index_head_dim
        expert = 3 * d * self.moe_intermediate_size
        active, idle = 1 + self.num_experts_per_tok, self.n_routed_experts - self.num_experts_per_tok
        fp8 = layers * (d * latents + queries + heads * self.v_head_dim * d + indexer)
        fp8 += dense * 3 * d * self.intermediate_size + (layers - dense) * active * expert
        bf16 = layers * (absorbed + d * self.index_n_heads) + (layers - dense) * self.n_routed_experts * d
        norms = 2 * d + self.q_lora_rank + self.kv_lora_rank + 2 * self.index_head_dim
        return Weights(
            fp8=fp8,
            bf16=bf16 + self.vocab_size * d,
            idle=(layers - dense) * idle * expert,
            embedding=self.vocab_size * d,
            vectors=layers * norms + d,
        )

    def cache_bytes(self, tokens: int, layout: Layout) -> int:
        """Packed: 512 FP8 channels with four FP32 scales and the RoPE ones in BF16, then an FP8 index key with one
        scale; 656 + 132 bytes a token and layer."""
        match layout:
            case "packed":
                entry = self.kv_lora_rank + 4 * (self.kv_lora_rank // 128) + 2 * self.qk_rope_head_dim
                key = self.index_head_dim + 4
            case "bf16":
                entry, key = 2 * (self.kv_lora_rank + self.qk_rope_head_dim), 2 * self.index_head_dim
        return tokens * self.num_hidden_layers * (entry + key)

    def flops(self, tokens: int) -> Flops:
        weights, layers = self.weights(), self.num_hidden_layers
        width = 2 * self.kv_lora_rank + self.qk_rope_head_dim  # of a key and its value
        return Flops(
            linear=2 * (weights.fp8 + weights.bf16),
            linear_bf16=2 * weights.bf16,
            attention=layers * 2 * self.num_attention_heads * width * min(self.index_topk, tokens),
            indexer=layers * 2 * self.index_n_heads * self.index_head_dim * tokens,
            index_cost=1.0,
        )


@dataclass(slots=True, kw_only=True, frozen=True)
class Cost:
    """A model's line of the tables, at one context length."""

    name: str
    tokens: int
    weights: Weights
    packed: int  # bytes that grow with the context, in the deployed layout
    bf16: int  # the same in BF16
    state: int  # bytes of window and tails beside them, deployed layout
    flops: Flops


# ---- formulas ------------------------------------------------------------------------------------------------------


def count_weights(published: DeepseekV4Config) -> Weights:
    """The parameters of the model without its multi-token-prediction block (as the published 284B counts them)."""
    config = cast(Any, published)
    d, c, heads, latent = config.hidden_size, config.head_dim, config.num_attention_heads, config.q_lora_rank
    n, experts, layers = config.hc_mult, config.n_routed_experts, config.num_hidden_layers
    mixes = 2 * n + n * n
    expert = 3 * d * config.moe_intermediate_size
    fp8 = d * latent + latent * heads * c + d * c + config.o_groups * config.o_lora_rank * d
    fp8 += expert * (1 + config.num_experts_per_tok)
    bf16 = heads * c * config.o_lora_rank + experts * d + 2 * mixes * n * d
    vectors = 2 * d + latent + c + heads + 2 * (mixes + 3)
    fp8, bf16, vectors = fp8 * layers, bf16 * layers, vectors * layers
    for kind in config.layer_types:
        if kind == CSA:
            index, index_heads, m = config.index_head_dim, config.index_n_heads, config.compress_rates[CSA]
            fp8 += latent * index_heads * index
            bf16 += 4 * d * (c + index) + d * index_heads
            vectors += (2 * m + 1) * (c + index)
        elif kind == HCA:
            bf16 += 2 * d * c
            vectors += (config.compress_rates[HCA] + 1) * c
    return Weights(
        fp8=fp8,
        bf16=bf16 + config.vocab_size * d + n * n * d,
        idle=expert * (experts - config.num_experts_per_tok) * layers,
        embedding=config.vocab_size * d,
        vectors=vectors + d + n + 1,
    )


def cache_bytes(config: DeepseekV4Config, tokens: int, layout: Layout, *, allocated: bool = False) -> CacheBytes:
    """One sequence's cache after `tokens` tokens, over all layers (V4 report 3.5).

    A compressor of ratio m has stored floor(tokens / m) entries; the window holds at most `sliding_window` tokens, a
    tail at most 2 m of them (CSA, and its indexer) or m (HCA). With `allocated`, what a cache made for that many
    tokens takes: whole pages, window and tails in full.
    """
    kinds: list[str] = cast(Any, config).layer_types
    parts = [layer_cache_bytes(config, kind, tokens, layout, allocated=allocated) for kind in kinds]
    return CacheBytes(
        csa_entries=sum(part.csa_entries for part in parts),
        index_keys=sum(part.index_keys for part in parts),
        hca_entries=sum(part.hca_entries for part in parts),
        window=sum(part.window for part in parts),
        tails=sum(part.tails for part in parts),
    )


def layer_cache_bytes(
    published: DeepseekV4Config, kind: str, tokens: int, layout: Layout, *, allocated: bool = False
) -> CacheBytes:
    """The same for one layer of `kind`, one of the published names. Pages are those of the whole model."""
    config = cast(Any, published)
    entry, key = entry_bytes(published, layout), index_key_bytes(published, layout)
    held = math.ceil(tokens / page_tokens(published)) * page_tokens(published) if allocated else tokens
    window = entry * (config.sliding_window if allocated else min(tokens, config.sliding_window))

    def tail(ring: int, channels: int) -> int:
        # The released kernels keep kv and gate in float32; a cache that is BF16 throughout has them in BF16 too.
        return 2 * (4 if layout == "packed" else 2) * channels * (ring if allocated else min(tokens, ring))

    if kind == CSA:
        m, index = config.compress_rates[CSA], config.index_head_dim
        return CacheBytes(
            csa_entries=held // m * entry,
            index_keys=held // m * key,
            window=window,
            tails=tail(2 * m, 2 * config.head_dim) + tail(2 * m, 2 * index),
        )
    if kind == HCA:
        m = config.compress_rates[HCA]
        return CacheBytes(hca_entries=held // m * entry, window=window, tails=tail(m, config.head_dim))
    return CacheBytes(window=window)


def entry_bytes(published: DeepseekV4Config, layout: Layout) -> int:
    """Bytes of a window or compressed entry. Packed: FP8 with a scale byte per 64 channels, RoPE channels in BF16, the
    whole padded to 8 bytes: 584 for the published 448 + 64."""
    config = cast(Any, published)
    match layout:
        case "packed":
            rope_dim = config.qk_rope_head_dim
            plain = config.head_dim - rope_dim
            return math.ceil((plain + math.ceil(plain / 64) + 2 * rope_dim) / 8) * 8
        case "bf16":
            return 2 * config.head_dim


def index_key_bytes(config: DeepseekV4Config, layout: Layout) -> int:
    """Bytes of an indexer key. Packed: FP4 with a scale byte per 32 channels, 68 for the published 128."""
    match layout:
        case "packed":
            return math.ceil(config.index_head_dim / 2) + math.ceil(config.index_head_dim / 32)
        case "bf16":
            return 2 * config.index_head_dim


def page_tokens(published: DeepseekV4Config) -> int:
    """Tokens of a page: the least that gives whole entries in every layer; 128 as published (32 CSA, 1 HCA)."""
    config = cast(Any, published)
    return math.lcm(*(config.compress_rates[kind] for kind in (CSA, HCA) if kind in config.layer_types))


def count_flops(published: DeepseekV4Config, tokens: int) -> Flops:
    """Decoding the last of `tokens` tokens. Index scores are counted even where the top-k would take all blocks."""
    config = cast(Any, published)
    weights, window = count_weights(published), min(tokens, config.sliding_window)
    entries, blocks = 0, 0
    for kind in config.layer_types:
        entries += window
        if kind == CSA:
            complete = tokens // config.compress_rates[CSA]
            blocks += complete
            entries += min(config.index_topk, complete)
        elif kind == HCA:
            entries += tokens // config.compress_rates[HCA]
    return Flops(
        linear=2 * (weights.fp8 + weights.bf16),
        linear_bf16=2 * weights.bf16,
        attention=4 * config.num_attention_heads * config.head_dim * entries,
        indexer=2 * config.index_n_heads * config.index_head_dim * blocks,
        index_cost=0.5,
    )


def cost_of(name: str, model: DeepseekV4Config | DeepseekV32, tokens: int) -> Cost:
    match model:
        case DeepseekV32():
            weights, flops, state = model.weights(), model.flops(tokens), 0
            packed, bf16 = model.cache_bytes(tokens, "packed"), model.cache_bytes(tokens, "bf16")
        case _:
            weights, flops = count_weights(model), count_flops(model, tokens)
            parts = cache_bytes(model, tokens, "packed")
            packed, state, bf16 = parts.compressed, parts.state, cache_bytes(model, tokens, "bf16").compressed
    return Cost(name=name, tokens=tokens, weights=weights, packed=packed, bf16=bf16, state=state, flops=flops)


# ---- the command ---------------------------------------------------------------------------------------------------


def published_config(name: str) -> DeepseekV4Config:
    """The configuration of conf/model/<name>.yaml, a file that names its vocabulary."""
    with open(os.path.join(os.path.dirname(os.path.abspath(conf.__file__)), "model", f"{name}.yaml")) as file:
        return v4_config({"num_nextn_predict_layers": 0, **yaml.safe_load(file)["config"]})


def run_cost(config: Config, context: str, out: str | None) -> list[str]:
    """The lines that `opd cost` prints: V4-Flash, V4-Pro, the configured model and V3.2 at `context` tokens. With `out`
    also writes that page, with figures over the context length.

    Raises ConfigError, with nothing written, for a context that is no positive number, for a model of another family,
    and for an `out` that cannot be written or is there already (unless run.overwrite).
    """
    try:
        tokens = int(context)
    except ValueError:
        raise ConfigError(f"context={context} is not a whole number of tokens, for example 1048576") from None
    at_least("context", tokens, 1)
    if out is not None:
        _check_out(out, config.run.overwrite)
    mine = _configured(config)
    published = {name: published_config(file) for name, file in PUBLISHED.items()}
    name = next((name for name, model in published.items() if model.to_dict() == mine.to_dict()), "this model")
    models: dict[str, DeepseekV4Config | DeepseekV32] = {**published, name: mine, BASELINE: DeepseekV32()}
    costs = [cost_of(each, model, tokens) for each, model in models.items()]
    lines = [
        f"{name} at a context of {tokens:,} tokens, beside the published models",
        "",
        "KV cache of one sequence: FP8 entries with BF16 RoPE channels, FP4 index keys (V3.2: FP8 keys)",
        *_aligned(_cache_table(costs)),
        "",
        "GFLOP of one decoded token, then in FP8 operations (BF16 counts 2, FP4 0.5): A with all linears in FP8,",
        "B with head, grouped output, compressors, routers and hyper-connections in BF16",
        "(V3.2: head, absorbed projections, routers)",
        *_aligned(_flops_table(costs)),
    ]
    if tokens > mine.max_position_embeddings:
        lines += ["", f"model.config.max_position_embeddings={mine.max_position_embeddings} is below this context"]
    if out is None:
        return [*lines, "", "figures over the context length: add out=cost.html"]
    longest = max(LONGEST, tokens)
    contexts = [1 << power for power in range(10, longest.bit_length())]
    curves = {each: [cost_of(each, model, context) for context in contexts] for each, model in models.items()}
    _write_page(out, curves, lines)
    return [*lines, "", out]


def _configured(config: Config) -> DeepseekV4Config:
    model = config.model
    if model.family != "deepseek_v4":
        raise ConfigError(f"model.family={model.family}: the formulas are DeepSeek-V4's; choose deepseek_v4")
    if model.path is None:
        fields = {"vocab_size": config.tokenizer.vocab_size, "num_nextn_predict_layers": 0, **model.config}
        return v4_config(fields)
    loaded = load_model_config(model.path, model.revision)
    if not isinstance(loaded, DeepseekV4Config):
        raise ConfigError(f"model.path={model.path} holds a {loaded.model_type} model; the formulas are DeepSeek-V4's")
    return loaded


def _check_out(out: str, overwrite: bool) -> None:
    folder = os.path.dirname(out) or "."
    if not out.endswith(".html"):
        raise ConfigError(f"out={out} does not end in .html; the figures are a page that opens in a browser")
    if not os.path.isdir(folder):
        raise ConfigError(f"out={out}: {folder} is not a folder")
    if os.path.isdir(out) or not os.access(out if os.path.exists(out) else folder, os.W_OK):
        raise ConfigError(f"out={out} cannot be written")
    if os.path.exists(out) and not overwrite:
        raise ConfigError(f"out={out} is there already; choose another name or add run.overwrite=true")


Table = list[list[str]]  # the header first; the first column is a name, the others are numbers


def _cache_table(costs: list[Cost]) -> Table:
    """The baseline is the last of `costs`, here and below."""
    baseline = costs[-1].packed
    table = [["", "parameters", "activated", "cache", "bytes/token", "of V3.2", "smaller", "window+tails", "in BF16"]]
    for each in costs:
        table.append(
            [
                each.name,
                _amount(each.weights.total),
                _amount(each.weights.activated),
                _size(each.packed),
                f"{each.packed / each.tokens:,.2f}",
                f"{each.packed / baseline:.2%}",
                f"{baseline / each.packed:.2f}x" if each.packed else "-",
                _size(each.state),
                _size(each.bf16),
            ]
        )
    return table


def _flops_table(costs: list[Cost]) -> Table:
    baseline = costs[-1].flops.fp8_bracket()
    table = [["", "linear", "attention", "indexer", "sum", "A", "of V3.2", "B", "of V3.2"]]
    for each in costs:
        flops = each.flops
        row = [each.name, *(_giga(count) for count in (flops.linear, flops.attention, flops.indexer, flops.raw))]
        for value, whole in zip(flops.fp8_bracket(), baseline, strict=True):
            row += [_giga(value), f"{value / whole:.2%}"]
        table.append(row)
    return table


def _aligned(table: Table) -> list[str]:
    first, *widths = (max(map(len, column)) for column in zip(*table, strict=True))
    return [
        "  ".join(["", row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], widths, strict=True))])
        for row in table
    ]


def _amount(parameters: int) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if parameters >= size:
            return f"{parameters / size:.2f}{unit}"
    return str(parameters)


def _giga(flops: float) -> str:
    return f"{flops / 1e9:,.1f}" if flops >= 1e9 else f"{flops / 1e9:.4f}"


def _size(size: int) -> str:
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 1 << power:
            return f"{size / (1 << power):.2f} {unit}"
    return f"{size} B"


# ---- the page ------------------------------------------------------------------------------------------------------


def _write_page(out: str, curves: dict[str, list[Cost]], lines: list[str]) -> None:
    with matplotlib.rc_context(FIGURE_STYLE):
        figures = (
            (
                "KV cache of one sequence",
                "Window and tails included, which is what a short context pays for.",
                _figure("cache", curves, "GiB", lambda point: (point.packed + point.state) / 2**30),
            ),
            (
                "Work of one decoded token",
                "In FP8 operations: BF16 counts twice, FP4 half, all linears as FP8 (A below).",
                _figure("flops", curves, "GFLOP", lambda point: point.flops.fp8_bracket()[0] / 1e9),
            ),
        )
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_PAGE)
    page = template.render(style=Markup(page_style()), names=list(curves), figures=figures, text="\n".join(lines))
    with open(out, "w", encoding="utf-8") as file:
        file.write(page)


def _figure(name: str, curves: dict[str, list[Cost]], unit: str, value: Callable[[Cost], float]) -> Markup:
    """Both axes logarithmic, with plain numbers at the ticks: 1k, 4k, ... 1M below."""
    figure, (axes,) = new_axes(6, 3.6)
    for index, points in enumerate(curves.values()):
        axes.plot([point.tokens for point in points], [value(point) for point in points], **ink(index))
    axes.set_xscale("log", base=4)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda tick, _: f"{tick / 2**20:g}M" if tick >= 2**20 else f"{tick / 2**10:g}k")
    )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}"))
    axes.minorticks_off()
    axes.set_xlabel("context, tokens")
    axes.set_ylabel(unit)
    return to_svg(figure, f"cost {name}")


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>opd cost</title>
<style>{{ style }}</style>
</head>
<body><main>
<h1>Cost over the context length</h1>
<p class="soft">By formula, from the shapes of the models. V3.2 is the baseline of the published ratios.</p>
<div class="legend" style="margin:12px 0">{% for name in names %}
<span><i style="border-top-color:var(--s{{ loop.index0 }})"></i>{{ name }}</span>{% endfor %}</div>
<div class="grid">
{% for title, note, svg in figures %}
<figure><h3>{{ title }}</h3><p class="soft">{{ note }}</p>{{ svg }}</figure>
{% endfor %}
</div>
<h2>Numbers</h2>
<div class="card"><pre>{{ text }}</pre></div>
</main></body>
</html>
"""
