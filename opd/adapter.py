"""Low-rank adapters on an hf model: the model's own weights stay as they are, and a product of two thin matrices is
trained beside each of its matrices.

The idea: adapters are the learner's business alone. Everyone else, rollout workers, teachers and servers, gets weights
under the published names with the product added in, so nothing outside of this file and `opd.learner` knows of them.
Only this file imports peft, and only where adapters are asked for. Left out: adapters of stacked experts, and MXFP4,
which would have to round the sum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from opd.config import ConfigError, LoraConfig
from opd.model.hub import HubModel
from opd.stored import stored_tensors
from opd.weights import resolve_checkpoint

ADAPTER = "default"  # peft's name of the only one
PREFIX = "base_model.model."  # of tensor names in an adapter's file, as peft writes them
FILE = "adapter_model.safetensors"
HASHED_BYTES = 4096  # of each of the model's own tensors


def add_adapters(model: HubModel, lora: LoraConfig, path: str) -> None:
    """Adds adapters to `model` and leaves nothing else trainable. They start as zero, so the model computes what it
    did; their first factor is drawn from torch's global generator. `path` is where the model came from.

    Raises ConfigError without peft, and for targets that are no matrices of the model's layers.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError(f"model.lora.rank={lora.rank} needs the package peft: pip install 'opd[lora]'") from error
    inner = model.__dict__["_inner"]
    head = {id(model.head)}
    matrices = {
        name.rsplit(".", 1)[-1]
        for name, module in inner.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and id(module.weight) not in head
    }
    if unknown := [target for target in lora.targets if target not in matrices]:
        raise ConfigError(f"model.lora.targets names {unknown}; the matrices of {path} are: {sorted(matrices)}")
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft divides by the rank whatever the type
        target_modules=list(lora.targets) or sorted(matrices),
        base_model_name_or_path=path,
        task_type="CAUSAL_LM",
    )
    peft.inject_adapter_in_model(config, inner, ADAPTER)
    model.__dict__["peft_config"] = config


def has_adapters(model: nn.Module) -> bool:
    return "peft_config" in model.__dict__


def merged(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weights` of a model with adapters, all of them by name, as those of the published model: each matrix with its
    adapter's product added, FP32."""
    layers = dict(model.named_modules())
    result: dict[str, Tensor] = {}
    for name, weight in weights.items():
        layer = name.removesuffix(".base_layer.weight")
        if layer != name:
            module: Any = layers[layer]
            first, second = (weights[f"{layer}.lora_{part}.{ADAPTER}.weight"].float() for part in "AB")
            product = (second @ first) * module.scaling[ADAPTER]
            result[f"{layer}.weight"] = weight + (product.T if module.fan_in_fan_out else product)
        elif not _is_adapter(name):
            result[name.replace(".base_layer.", ".")] = weight
    return result


def adapter_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of `weights` that are adapters."""
    return {name: weight for name, weight in weights.items() if _is_adapter(name)}


def save_adapter(folder: Path, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Writes `folder` as peft does, from `adapter_weights` in host memory."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {PREFIX + name.replace(f".{ADAPTER}.", "."): weight.contiguous() for name, weight in weights.items()}
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    model.__dict__["peft_config"].save_pretrained(folder)


def load_adapter(folder: Path) -> dict[str, Tensor]:
    """What `save_adapter` wrote, by the model's names. Raises ConfigError for a file that is missing."""
    if not (folder / FILE).is_file():
        raise ConfigError(f"{folder / FILE} does not exist; expected the adapters of a checkpoint")
    tensors = load_file(folder / FILE)
    return {
        name.removeprefix(PREFIX).replace(".weight", f".{ADAPTER}.weight"): tensor for name, tensor in tensors.items()
    }


def base_hash(path: str, revision: str | None = None) -> str:
    """sha256 over names, shapes and first bytes of a checkpoint's tensors: by which the model that adapters belong to
    is known again. Raises as `resolve_checkpoint` does."""
    digest = hashlib.sha256()
    for name, weight in sorted(stored_tensors(resolve_checkpoint(path, revision)), key=lambda entry: entry[0]):
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        start = weight.reshape(-1)[: HASHED_BYTES // weight.element_size()]
        digest.update(start.clone().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _is_adapter(name: str) -> bool:
    return f".lora_A.{ADAPTER}." in name or f".lora_B.{ADAPTER}." in name
