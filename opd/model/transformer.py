"""DeepSeek-V4 as one module: configuration, blocks, the whole-sequence forward and the cached one, initialisation.

Configuration class and parameter names are those of transformers' `DeepseekV4ForCausalLM`, so weights go both ways
untouched. The trunk ends in hidden states; logits are the business of whoever holds the head (losses in tiles, the
rollout engine for the last position only). The block that predicts one token further runs on demand, over whole
sequences only: it is trained, and nothing here samples with it.

Left out: one layer's inside (`block`) and what the cache holds (`cache`).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config

from opd.config import ConfigError
from opd.fp4 import BLOCK
from opd.kernels.products import Linear
from opd.model.attention import Compressor, Indexing
from opd.model.block import CSA, HCA, Block
from opd.model.block import WINDOW_ONLY as WINDOW_ONLY  # the three are known under this module
from opd.model.cache import Cache, CompressorState, Extension, LayerCache, Layout, RowFormat, page_size
from opd.model.hyper_connection import HyperHead
from opd.model.layers import RMSNorm, rope_frequencies, rope_rotation
from opd.model.moe import SCORING, balance_statistics, replayed_experts, rerouted
from opd.model.mtp import MtpBlock

SIZES = (
    *("vocab_size", "hidden_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("q_lora_rank", "o_groups", "o_lora_rank", "sliding_window", "index_n_heads", "index_head_dim", "index_topk"),
    *("n_routed_experts", "num_experts_per_tok", "hc_mult", "hc_sinkhorn_iters", "max_position_embeddings"),
)
FIXED = {  # what the published class can say and only one value of which is V4
    "num_key_value_heads": 1,
    "n_shared_experts": 1,
    "hidden_act": "silu",
    "norm_topk_prob": True,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "router_jitter_noise": 0.0,
    "tie_word_embeddings": False,
}


@dataclass(slots=True)
class ModelOutput:
    """What a forward over whole sequences returns, for every family of model."""

    hidden: Tensor  # [B, T, D], after the final norm: the input of the head
    balance_loss: Tensor  # 0-dim, sum over sequences of V4's sequence-wise balance loss, mean over score-routed layers
    # int64 [L, E], real tokens sent to each expert of each score-routed layer, the MTP block's last if it ran; [0, 0]
    # if dense
    expert_load: Tensor
    index_loss: Tensor | None = None  # 0-dim, sum over sequences of the indexers' loss, mean over CSA layers; if asked
    index_recall: Tensor | None = None  # [2]: sum and number of the recalls that `IndexReport` describes; if asked
    mtp_hidden: Tensor | None = None  # [B, T, D]: index t predicts token t + 2, and means nothing from length - 1 on
    routing: Tensor | None = None  # int16 [B, T, L, K]: ids of the experts chosen by each score-routed layer; if asked
    rerouted: Tensor | None = None  # int64 [2]: the sums over layers of what `rerouted` counts; if experts were given


def v4_config(fields: dict[str, Any]) -> DeepseekV4Config:
    """The published configuration class from its published field names; a misspelt or impossible one is refused."""
    legacy = {"compress_ratios", "num_hash_layers", "qk_rope_head_dim", "compress_rate_csa", "compress_rate_hca"}
    known = {field.name for field in dataclasses.fields(DeepseekV4Config)} | legacy
    for key in fields:
        if key not in known:
            close = difflib.get_close_matches(key, known, 3)
            raise ConfigError(f"model.config.{key} is not a field of DeepseekV4Config; close to it: {close or 'none'}")
    try:
        config = DeepseekV4Config(**fields)
    except Exception as error:  # the library's own validation, in whatever class it raises
        raise ConfigError(f"model.config is not valid: {error}") from error
    check_v4_config(config)
    return config


def check_v4_config(published: DeepseekV4Config) -> None:
    """Raises ConfigError for shapes that cannot work, and for settings that this model would not follow."""
    config = cast(Any, published)  # its optional fields are filled by the class itself

    def refuse(key: str, value: object, why: str) -> NoReturn:
        raise ConfigError(f"model.config.{key}={value!r} cannot work: {why}")

    for key in SIZES:
        if getattr(config, key) < 1:
            refuse(key, getattr(config, key), "it must be at least 1")
    for key in ("swiglu_limit", "rms_norm_eps"):
        if getattr(config, key) <= 0:
            refuse(key, getattr(config, key), "it must be above 0")
    for key, only in FIXED.items():
        if getattr(config, key) != only:
            refuse(key, getattr(config, key), f"this model has it fixed at {only!r}")
    if config.num_attention_heads % config.o_groups:
        refuse("o_groups", config.o_groups, f"num_attention_heads={config.num_attention_heads} is not a multiple of it")
    rope_dim = config.qk_rope_head_dim
    if rope_dim % 2 or not 0 < rope_dim <= config.head_dim:
        why = f"it gives {rope_dim} RoPE channels of {config.head_dim}"
        refuse("partial_rotary_factor", config.partial_rotary_factor, why)
    if CSA in config.layer_types and config.index_head_dim < rope_dim:
        refuse("index_head_dim", config.index_head_dim, f"it is smaller than the {rope_dim} RoPE channels")
    if config.num_experts_per_tok > config.n_routed_experts:
        refuse("num_experts_per_tok", config.num_experts_per_tok, f"there are {config.n_routed_experts} experts")
    if config.scoring_func not in SCORING:
        refuse("scoring_func", config.scoring_func, f"choose one of {', '.join(SCORING)}")
    if config.num_nextn_predict_layers not in (0, 1):
        why = "multi-token prediction has depth 1 in V4; choose 1, or 0 for none"
        refuse("num_nextn_predict_layers", config.num_nextn_predict_layers, why)
    for kind in (CSA, HCA):
        ratio = config.compress_rates.get(kind)
        if kind in config.layer_types and not (isinstance(ratio, int) and 1 <= ratio <= config.sliding_window):
            why = "tokens of an unfinished block are reachable through the window only, so it is a whole number"
            refuse(f"compress_rates.{kind}", ratio, f"{why} from 1 to sliding_window={config.sliding_window}")
    for key in config.compress_rates:
        if key not in (CSA, HCA):
            refuse(f"compress_rates.{key}", config.compress_rates[key], f"choose {CSA} or {HCA}")
    for label in ("main", "compress"):
        parameters, prefix = config.rope_parameters[label], f"rope_parameters.{label}"
        kind, theta, factor = (parameters.get(key) for key in ("rope_type", "rope_theta", "partial_rotary_factor"))
        if kind not in ("default", "yarn"):
            refuse(f"{prefix}.rope_type", kind, "choose default or yarn")
        if theta is None or theta <= 1:
            refuse(f"{prefix}.rope_theta", theta, "the base of the frequencies must be above 1")
        # transformers reads these two from here; another value would make a checkpoint mean two models.
        if factor is None or int(config.head_dim * factor) != rope_dim:
            refuse(f"{prefix}.partial_rotary_factor", factor, f"the model's own is {config.partial_rotary_factor}")
        if kind == "yarn" and parameters.get("attention_factor") != 1.0:
            refuse(f"{prefix}.attention_factor", parameters.get("attention_factor"), "V4 has it fixed at 1.0")


class Trunk(nn.Module):
    """Everything below the head; a module of its own for the published names (`model.layers...`)."""

    def __init__(self, config: Any, quantized: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, kind, mlp_kind == "hash_moe", quantized)
            for kind, mlp_kind in zip(config.layer_types, config.mlp_layer_types, strict=True)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hc_head = HyperHead(config.hc_mult, config.hidden_size, config.hc_eps, config.rms_norm_eps)


class DeepseekV4(nn.Module):
    """The student. `fp4` is the model config's choice of weights that are used as MXFP4 values: experts or none;
    `fp4_index` puts the indexer's queries and keys through a Hadamard rotation and MXFP4.

    With `num_nextn_predict_layers` = 1 there is a block for multi-token prediction, `mtp[0]`, under the released
    checkpoint's prefix, which transformers leaves unread. It owns neither embedding nor head.
    """

    main_frequencies: Tensor
    compress_frequencies: Tensor

    def __init__(self, config: DeepseekV4Config, fp4: str = "none", fp4_index: bool = False) -> None:
        super().__init__()
        self.config: Any = config
        self.model = Trunk(config, quantized=fp4 == "experts")
        for block in self.blocks:
            if (indexer := getattr(block.self_attn.compressor, "indexer", None)) is not None:
                indexer.quantized = fp4_index
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mtp = nn.ModuleList(MtpBlock(config, fp4 == "experts") for _ in range(config.num_nextn_predict_layers))
        rope_dim = self.config.qk_rope_head_dim
        for kind in ("main", "compress"):
            frequencies = rope_frequencies(self.config.rope_parameters[kind], rope_dim)
            self.register_buffer(f"{kind}_frequencies", frequencies, persistent=False)

    @property
    def head(self) -> nn.Parameter:
        """The output head [V, D]."""
        return cast(nn.Parameter, self.lm_head.weight)

    @property
    def blocks(self) -> list[Block]:
        return [cast(Block, block) for block in self.model.layers]

    @property
    def routing_shape(self) -> tuple[int, int]:
        """(L, K) of a token's recorded expert ids: layers of the trunk with learned routing, experts per token."""
        return sum(not block.mlp.gate.is_hash for block in self.blocks), self.config.num_experts_per_tok

    def forward(
        self,
        token_ids: Tensor,
        lengths: Tensor,
        indexing: Indexing = "off",
        *,
        mtp: bool = False,
        routing: Tensor | None = None,
        record_routing: bool = False,
    ) -> ModelOutput:
        """Whole sequences: int64 [B, T] right-padded with any valid id, int64 [B]. Padding never reaches real tokens.

        `indexing` also trains the indexers of CSA layers (see `Attention.forward`); the two index fields of the result
        stay None when no sequence has more blocks than an indexer picks. `mtp` also runs the block that predicts one
        token further. `routing`, integers [B, T, L, K], are experts to use again in the trunk's learned layers (see
        `replayed_experts`), and `record_routing` reports the ones that were used.
        Raises ValueError when T exceeds the configured context, for `mtp` without such a block, and for a `routing`
        that does not fit.
        """
        length = token_ids.shape[1]
        if length > self.config.max_position_embeddings:
            raise ValueError(f"{length} tokens exceed max_position_embeddings={self.config.max_position_embeddings}")
        if mtp and not self.mtp:
            raise ValueError("mtp=True: this model has no such block; num_nextn_predict_layers=1 makes one")
        positions = torch.arange(length, device=token_ids.device)
        real = positions < lengths[:, None]
        given = record = None
        if routing is not None:
            given = replayed_experts(routing, real, self.routing_shape, self.config.n_routed_experts)
        if record_routing:
            record = self.new_routing(*token_ids.shape)
        rotations = self._rotations(positions[None])
        site = self.blocks[0].attn_hc.collapse(self._embed(token_ids))
        balance, load, reports, changes = [], [], [], []
        streams = hidden = site.hidden  # both come from the last layer
        for block, after in zip(self.blocks, [*self.blocks[1:], None], strict=True):
            rotation, frequencies = rotations[block.self_attn.compressor is not None]
            h = block.input_layernorm(site.hidden).view(*token_ids.shape, -1)
            mixed, report = block.self_attn(h, rotation, frequencies, lengths, indexing)
            if report is not None:
                reports.append(report)
            site = block.attn_hc.expand_into(site, mixed.flatten(0, 1), block.ffn_hc)
            layer = len(load)  # among those with learned routing
            replayed = given[layer] if given and not block.mlp.gate.is_hash else None
            out, scores, chosen = block.apply_experts(site.hidden, token_ids, replayed)
            if after is None:
                streams, hidden = block.ffn_hc.expand_into_head(site, out, self.model.hc_head)
            else:
                site = block.ffn_hc.expand_into(site, out, after.attn_hc)
            if not block.mlp.gate.is_hash:
                if record is not None:
                    record[:, :, layer] = chosen.view(*token_ids.shape, -1)
                if replayed is not None:
                    changes.append(rerouted(scores, block.mlp.gate.e_score_correction_bias, replayed))
                layer_balance, layer_load = balance_statistics(scores, chosen, real)
                balance.append(layer_balance)
                load.append(layer_load)
        hidden = self.model.norm(hidden).view(*token_ids.shape, -1)
        output = ModelOutput(hidden, hidden.new_zeros(()), torch.zeros(0, 0, dtype=torch.int64), routing=record)
        if mtp:
            ahead = cast(MtpBlock, self.mtp[0])
            next_ids = token_ids.roll(-1, 1)  # what follows a row's last token is any id, and nothing before it sees it
            output.mtp_hidden, scores, chosen = ahead(streams, next_ids, self.model.embed_tokens, *rotations[False])
            layer_balance, layer_load = balance_statistics(scores, chosen, positions + 1 < lengths[:, None])
            balance.append(layer_balance)
            load.append(layer_load)
        if load:
            output.balance_loss, output.expert_load = torch.stack(balance).mean(), torch.stack(load)
        if changes:
            output.rerouted = torch.stack(changes).sum(0)
        if reports:
            output.index_loss = torch.stack([report.loss for report in reports]).mean()
            output.index_recall = torch.stack([report.recall for report in reports]).sum(0)
        return output

    def extend(self, token_ids: Tensor, cache: Cache, at: Extension, record: Tensor | None = None) -> Tensor:
        """New tokens of cached sequences: int64 [B, T] right-padded -> hidden [B, T, D]; the cache moves on.

        Rows may stand at different positions and bring different numbers of tokens. Any split of a sequence into calls
        gives the same hidden states to rounding. `record`, as `new_routing(B, T)` makes it, is filled with the ids of
        the experts that were chosen.
        """
        rotations = self._rotations(at.positions)
        streams = self._embed(token_ids)
        layer = 0  # of `record`
        for block, layer_cache in zip(self.blocks, cache.layers, strict=True):
            rotation, frequencies = rotations[block.self_attn.compressor is not None]
            site = block.attn_hc.collapse(streams)
            h = block.input_layernorm(site.hidden).view(*token_ids.shape, -1)
            mixed = block.self_attn.extend(h, rotation, frequencies, layer_cache, at).flatten(0, 1)
            streams = block.attn_hc.expand(site, mixed)
            streams, _, chosen = block.mix_experts(streams, token_ids)
            if record is not None and not block.mlp.gate.is_hash:
                record[:, :, layer] = chosen.view(*token_ids.shape, -1)
                layer += 1
        return self.model.norm(self.model.hc_head(streams)).view(*token_ids.shape, -1)

    def new_cache(
        self, num_slots: int, max_tokens: int, num_pages: int | None = None, layout: Layout = "plain"
    ) -> Cache:
        """An empty cache on the parameters' device; "plain" is in their dtype. `num_pages` None: enough for all slots.

        Index keys are stored in MXFP4 by the packed layout, and by both where `fp4_index` has them in it already, which
        changes nothing but their size.
        Raises ValueError for it where index keys do not divide into blocks of 32.
        """
        config, dtype, device = self.config, self.lm_head.weight.dtype, self.lm_head.weight.device
        if layout == "packed" and config.index_head_dim % BLOCK:
            raise ValueError(f"index_head_dim={config.index_head_dim} is not a multiple of {BLOCK}: no packed layout")
        compressors = [compressor for block in self.blocks if (compressor := block.self_attn.compressor) is not None]
        page_tokens = page_size([compressor.ratio for compressor in compressors])
        if num_pages is None:
            num_pages = num_slots * -(-max_tokens // page_tokens)
        tail_dtype = dtype if layout == "plain" else torch.float32
        rope_dim = config.qk_rope_head_dim
        key_format = RowFormat("plain" if layout == "plain" else "fp8", config.head_dim, rope_dim, dtype)
        plain_index, packed_index = (
            RowFormat(kind, config.index_head_dim, rope_dim, dtype) for kind in ("plain", "fp4")
        )

        def zeros(leading: tuple[int, ...], row_format: RowFormat) -> Tensor:
            size, stored = row_format.storage
            return torch.zeros(*leading, size, dtype=stored, device=device)

        def state(compressor: Compressor, row_format: RowFormat) -> CompressorState:
            series = RowFormat("plain", compressor.kv_proj.out_features, rope_dim, tail_dtype)
            ring = (num_slots, compressor.ring_tokens)
            pages = (num_pages, page_tokens // compressor.ratio)
            return CompressorState(zeros(ring, series), zeros(ring, series), zeros(pages, row_format), row_format)

        cache = Cache(num_slots, max_tokens, page_tokens, num_pages)
        for block in self.blocks:
            compressor = block.self_attn.compressor
            indexer = getattr(compressor, "indexer", None)
            cache.layers.append(
                LayerCache(
                    zeros((num_slots, config.sliding_window), key_format),
                    key_format,
                    None if compressor is None else state(compressor, key_format),
                    None
                    if indexer is None
                    else state(indexer, packed_index if layout == "packed" or indexer.quantized else plain_index),
                )
            )
        return cache

    def new_routing(self, num_rows: int, num_tokens: int) -> Tensor:
        """Room for the expert ids of these many tokens, int16 [B, T, L, K] on the parameters' device."""
        shape = (num_rows, num_tokens, *self.routing_shape)
        return torch.empty(shape, dtype=torch.int16, device=self.lm_head.weight.device)

    @torch.no_grad()
    def update_selection_bias(self, load: Tensor, speed: float) -> None:
        """Auxiliary-loss-free balancing: experts above the mean load [L, E] become `speed` less likely to be chosen.

        `load` is that of `ModelOutput`, with the MTP block's row or without.
        """
        routers = [block.mlp.gate for block in self.blocks if not block.mlp.gate.is_hash]
        if len(load) == len(routers) + 1:
            routers += [cast(MtpBlock, block).mlp.gate for block in self.mtp]
        for router, counts in zip(routers, load.to(self.lm_head.weight.device, torch.float32), strict=True):
            router.e_score_correction_bias += speed * torch.sign(counts.mean() - counts)

    def _embed(self, token_ids: Tensor) -> Tensor:
        """Every stream starts as the embedding: int64 [B, T] -> [n, B T, D]."""
        embedded = self.model.embed_tokens(token_ids.flatten())
        return embedded.expand(self.config.hc_mult, -1, -1)

    def _rotations(self, positions: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(rotation at the positions, frequencies) of window-only layers and of compressed ones."""
        main, compress = self.main_frequencies, self.compress_frequencies
        return (rope_rotation(positions, main), main), (rope_rotation(positions, compress), compress)


@torch.no_grad()
def initialize(model: DeepseekV4, seed: int) -> None:
    """Weights to train from scratch. Nothing is published for V4 but alpha = 0.01; the rest is this project's choice.

    Matrices are normal with standard deviation 1 / sqrt(fan-in), which keeps every projection of a unit-RMS input at
    unit RMS whatever the width; the two matrices that write to the residual streams (o_b_proj, down_proj) are smaller
    by sqrt(2 L), and embedding and head have deviation 1 and 1 / sqrt(D). Hyper-connections start with alpha 0.01 and
    an identity-leaning residual matrix (+2 on its diagonal); hash tables hold K distinct experts per token id.
    The multi-token-prediction block draws from a seed of its own, so the trunk is the same with it and without.
    """
    config = model.config
    generator, mtp_generator = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
    residual_scale = (2 * config.num_hidden_layers) ** -0.5
    n = config.hc_mult

    for name, parameter in model.named_parameters():
        leaf, source = name.rsplit(".", 1)[-1], mtp_generator if name.startswith("mtp.") else generator
        if leaf == "scale" or leaf == "hc_scale":
            parameter.fill_(0.01)
        elif leaf == "base":
            parameter.zero_()
            parameter[2 * n :].view(n, n).diagonal().fill_(2.0)
        elif leaf in ("sinks", "position_bias", "hc_base"):
            parameter.zero_()
        elif "norm" in name and parameter.ndim == 1:
            parameter.fill_(1.0)
        elif name == "model.embed_tokens.weight":
            parameter.copy_(torch.randn(parameter.shape, generator=source))
        else:
            residual = leaf == "down_proj" or "down_proj" in name or "o_b_proj" in name
            deviation = parameter.shape[-1] ** -0.5 * (residual_scale if residual else 1.0)
            parameter.copy_(torch.randn(parameter.shape, generator=source) * deviation)
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):
            order = torch.rand(buffer.shape[0], config.n_routed_experts, generator=generator).argsort(-1)
            buffer.copy_(order[:, : buffer.shape[1]])


def num_parameters(model: nn.Module) -> int:
    return sum(math.prod(parameter.shape) for parameter in model.parameters())
