"""`DeepseekV4.extend` as one compiled call, where weights and cache allow it.

At small width most of a decoding step is Python between operators. `stepper` binds the weights and the cache as they
are now to one C++ object that makes the same operators in the same order; its results are those of `extend` in every
bit where both go through the compiled kernels, and tests compare the two. Whoever replaces weights asks for another.

Left out: the C++ (`opd/kernels/step.cpp`), and everything that is not float32 on a CPU, for which `extend` remains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from opd.fp4 import Fp4Experts
from opd.kernels import cpu, fused
from opd.kernels.library import operators
from opd.model.block import Block
from opd.model.cache import Cache, Extension, LayerCache
from opd.model.indexer import Indexer, hadamard
from opd.model.transformer import DeepseekV4

Part = tuple[Tensor, Extension]  # new tokens int64 [B, T] of cached sequences, and where they go


class Extend(Protocol):
    def __call__(self, parts: Sequence[Part], records: Sequence[Tensor] = ()) -> Tensor: ...


def stepper(model: DeepseekV4, cache: Cache) -> Extend:
    """What maps parts of a step, say decoding rows and chunks of prompts, to the hidden states of their rows' last new
    tokens, [rows of all parts, D], as `model.extend` does with this cache, under the weights that the model holds now,
    which must stay as they are. `records` has each part's `record`, or nothing. No gradient."""
    if not _fits(model, cache):

        def by_operators(parts: Sequence[Part], records: Sequence[Tensor] = ()) -> Tensor:
            filled = records or [None] * len(parts)
            hidden = [
                model.extend(token_ids, cache, at, record)
                for (token_ids, at), record in zip(parts, filled, strict=True)
            ]
            rows = [torch.arange(len(part), device=part.device) for part in hidden]
            return torch.cat([h[row, at.lengths - 1] for h, row, (_, at) in zip(hidden, rows, parts, strict=True)])

        return by_operators
    step = _compiled(model, cache)

    def extend(parts: Sequence[Part], records: Sequence[Tensor] = ()) -> Tensor:
        ats = [at for _, at in parts]
        return step.extend(
            [token_ids for token_ids, _ in parts],
            [at.slots for at in ats],
            [at.starts for at in ats],
            [at.lengths for at in ats],
            [at.positions for at in ats],
            [at.pages for at in ats],
            [at.max_end for at in ats],
            list(records),
        )

    return extend


def _fits(model: DeepseekV4, cache: Cache) -> bool:
    """Whether every operator of this model has its compiled loop."""
    if operators() is None or model.config.hc_mult != fused.STREAMS:
        return False
    tensors = [*model.model.parameters(), *(tensor for layer in cache.layers for tensor in layer.per_slot())]
    if any(tensor.dtype != torch.float32 or not tensor.is_cpu for tensor in tensors):
        return False
    for block, layer in zip(model.blocks, cache.layers, strict=True):
        experts = block.mlp.experts
        for weight in (experts.gate_up_proj, experts.down_proj):
            # Values that `extend` would round first, and scales that it multiplies by afterwards, are its business.
            if weight.is_nv if isinstance(weight, Fp4Experts) else experts.quantized:
                return False
        if layer.format.kind != "plain" or (layer.compressor and layer.compressor.format.kind != "plain"):
            return False
        if layer.indexer and layer.indexer.format.kind == "fp8":
            return False
    return True


def _compiled(model: DeepseekV4, cache: Cache) -> Any:
    """The C++ object for the present tensors of both."""
    config, trunk = model.config, model.model
    sizes = {
        "streams": config.hc_mult,
        "hc_iterations": config.hc_sinkhorn_iters,
        "heads": config.num_attention_heads,
        "groups": config.o_groups,
        "experts": config.n_routed_experts,
        "experts_per_token": config.num_experts_per_tok,
        "is_sigmoid": int(config.scoring_func == "sigmoid"),
        "topk": config.index_topk,
        "gate_up_features": 2 * config.moe_intermediate_size,
        "down_features": config.hidden_size,
    }
    numbers = {
        "eps": config.rms_norm_eps,
        "hc_eps": config.hc_eps,
        "swiglu_limit": float(config.swiglu_limit),
        "routed_scaling_factor": float(config.routed_scaling_factor),
    }
    of_trunk = {name: value.detach() for name, value in trunk.named_parameters() if not name.startswith("layers.")}
    step = cast(Any, torch.classes).opd.Step(of_trunk, sizes, numbers, cpu.paths()[0])
    for block, layer in zip(model.blocks, cache.layers, strict=True):
        compressor = block.self_attn.compressor
        of_layer = dict(sizes)
        if compressor is not None:
            of_layer |= {"ratio": compressor.ratio, "overlap": int(compressor.overlap)}
        frequencies = model.main_frequencies if compressor is None else model.compress_frequencies
        step.add_layer(_tensors(block, layer), of_layer, numbers, frequencies)
    return step


def _tensors(block: Block, layer: LayerCache) -> dict[str, Tensor]:
    """A layer's weights by their published names, and its cache."""
    tensors = {name: value.detach() for name, value in (*block.named_parameters(), *block.named_buffers())}
    tensors["cache.window"] = layer.window
    for name, state in (("compressor", layer.compressor), ("indexer", layer.indexer)):
        if state is not None:
            tensors |= {f"cache.{name}.{leaf}": getattr(state, leaf) for leaf in ("kv", "gate", "entries")}
    indexer: Indexer | None = getattr(block.self_attn.compressor, "indexer", None)
    if indexer is not None and indexer.quantized:
        tensors["hadamard"] = hadamard(indexer.width)
    return tensors
