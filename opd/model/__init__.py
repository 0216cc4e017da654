"""The model families behind one contract: token ids in, hidden states after the final norm out, a head beside them."""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config

from opd.config import ConfigError, ModelConfig
from opd.fp4 import BLOCK
from opd.model.hub import HubModel, load_hub_model
from opd.model.transformer import CSA, HCA, DeepseekV4, ModelOutput, check_v4_config, initialize, v4_config
from opd.weights import MTP, load_model_config, read_tensors

__all__ = ["CausalLM", "DeepseekV4", "HubModel", "ModelOutput", "load_model", "new_v4"]


log = logging.getLogger(__name__)


class CausalLM(Protocol):
    """What learner, teachers and engines know of a model (an nn.Module)."""

    config: Any  # the transformers configuration object

    @property
    def head(self) -> nn.Parameter: ...

    def __call__(self, token_ids: Tensor, lengths: Tensor) -> ModelOutput: ...

    def update_selection_bias(self, load: Tensor, speed: float) -> None: ...


def new_v4(model: ModelConfig, vocab_size: int, seed: int) -> DeepseekV4:
    """A DeepSeek-V4 with fresh weights, from `model.config` and the tokenizer's vocabulary.

    Raises ConfigError for fields that cannot work, and when `model.config.vocab_size` is smaller than the tokenizer.
    """
    fields = {"vocab_size": vocab_size, "num_nextn_predict_layers": 0, **model.config}
    if fields["vocab_size"] < vocab_size:
        raise ConfigError(
            f"model.config.vocab_size={fields['vocab_size']} is smaller than the tokenizer's {vocab_size} entries"
        )
    config: Any = v4_config(fields)
    rates, topk = config.compress_rates, config.index_topk
    if model.max_tokens > config.max_position_embeddings:
        raise ConfigError(
            f"model.max_tokens={model.max_tokens} exceeds model.config.max_position_embeddings="
            f"{config.max_position_embeddings}"
        )
    if HCA in config.layer_types and rates[HCA] > model.max_tokens:
        log.warning(
            "model.config.compress_rates.%s=%d: no block of a sequence of at most model.max_tokens=%d tokens is ever "
            "complete, so these layers see their window only",
            HCA,
            rates[HCA],
            model.max_tokens,
        )
    if CSA in config.layer_types and topk >= model.max_tokens // rates[CSA]:
        log.info(
            "model.config.index_topk=%d takes every block of model.max_tokens=%d tokens: the indexer has no choice",
            topk,
            model.max_tokens,
        )
    _check_fp4_widths(config, model)
    built = DeepseekV4(config, model.fp4, model.fp4_index)
    initialize(built, seed)
    return built


def load_model(model: ModelConfig, path: str | None = None, *, mtp: bool = False) -> DeepseekV4 | HubModel:
    """The model of a checkpoint folder or hub id (`path`, or `model.path`) with float32 parameters.

    `model.fp4` decides which weights its forward rounds to MXFP4 values. The checkpoint's block for
    multi-token prediction comes along if `mtp` asks for it: only a learner has a use for it. Where config.json promises
    a block that the files lack, which is what transformers writes, the model has none and a warning says so.
    Raises ConfigError for a missing or damaged checkpoint, for one of another family, and for weights that do not fit
    its own config.
    """
    source = path or model.path
    if not source:
        raise ConfigError("model.path is null; name the folder or hub id of a checkpoint")
    if model.family == "hf":
        return load_hub_model(source, model.revision, fp4=model.fp4)
    config = load_model_config(source, model.revision)
    if not isinstance(config, DeepseekV4Config):
        raise ConfigError(
            f"{source} holds a {config.model_type} model; family=deepseek_v4 cannot load it, use family=hf"
        )
    check_v4_config(config)
    _check_fp4_widths(config, model)
    mtp = mtp and config.num_nextn_predict_layers > 0
    tensors = read_tensors(source, model.revision, mtp=mtp)
    if mtp and not any(name.startswith(MTP) for name in tensors):
        log.warning(
            "%s: config.json asks for multi-token prediction, but no tensor is its block's; trained without", source
        )
        mtp = False
    config.num_nextn_predict_layers = int(mtp)
    built = DeepseekV4(config, model.fp4, model.fp4_index)
    wanted = {name: tensor.shape for name, tensor in built.state_dict().items()}
    for name, shape in wanted.items():
        if name not in tensors:
            raise ConfigError(f"{source} lacks the tensor {name} that its config.json asks for")
        if tensors[name].shape != shape:
            raise ConfigError(
                f"{source} holds {name} as {list(tensors[name].shape)}; its config.json asks for {list(shape)}"
            )
    for name in tensors:
        if name not in wanted:
            raise ConfigError(f"{source} holds the tensor {name} that its config.json has no place for")
    built.load_state_dict(tensors)
    return built


def architecture(model: ModelConfig) -> str:
    """What two checkpoints must have in common to be loaded into the same worker."""
    fields = load_model_config(model.path or "", model.revision).to_dict()
    for key in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"):
        fields.pop(key, None)
    return json.dumps([model.family, fields], sort_keys=True, default=str)


def without_weights(model: ModelConfig, path: str) -> DeepseekV4:
    """The DeepSeek-V4 of a checkpoint on the meta device: what its shape allows is known without reading tensors.

    Raises ConfigError as `load_model` does for a config.json that cannot work.
    """
    config: Any = load_model_config(path, model.revision)
    check_v4_config(config)
    _check_fp4_widths(config, model)
    with torch.device("meta"):
        return DeepseekV4(config, model.fp4, model.fp4_index)


def _check_fp4_widths(config: DeepseekV4Config, model: ModelConfig) -> None:
    width = config.index_head_dim
    if model.fp4_index and (width % BLOCK or width & (width - 1)):
        raise ConfigError(
            f"model.config.index_head_dim={width} is no power of two of at least {BLOCK}, which the Hadamard rotation "
            "and the MXFP4 blocks of index keys need; change it or set model.fp4_index=false"
        )
    for key in ("hidden_size", "moe_intermediate_size"):
        if model.fp4 == "experts" and getattr(config, key) % BLOCK:
            raise ConfigError(
                f"model.config.{key}={getattr(config, key)} is not a multiple of {BLOCK}, the block of weights that "
                "shares a scale in MXFP4; change it or set model.fp4=none"
            )


def check_replay(config: Any) -> None:
    """Raises ConfigError for a student, known by its transformers configuration, whose routing cannot be replayed."""
    if "moe" not in getattr(config, "mlp_layer_types", ()):
        raise ConfigError(
            f"rollout.routing_replay=true cannot work: no layer of this {config.model_type} model has learned routing "
            "(it takes a deepseek_v4 with `moe` in mlp_layer_types); set rollout.routing_replay=false"
        )


def with_path(model: ModelConfig, path: str, *, fp4: str | None = None) -> ModelConfig:
    """The same model settings over another checkpoint."""
    return dataclasses.replace(model, path=path, fp4=fp4 or model.fp4)
