"""Weights outside a running model: snapshots, checkpoint folders, content hashes.

The one idea: a `WeightSnapshot` is a flat map from transformers' parameter name to a tensor, or to a packed FP4
tensor. It is what the learner publishes, what a rollout worker applies, and what one safetensors file holds. A
checkpoint folder is the same map with FP32 masters beside `config.json` and the tokenizer, so `from_pretrained` opens
it and nothing else is needed.

`read_tensors` also accepts the released DeepSeek-V4 layout and gives it back under transformers' names. No pickle is
read or written. Left out: reading the same files again and again (`opd.stored`), optimizer state (`opd.learner`),
building a model from a config (`opd.model`), and quantised released weights, which are refused by name.

This file imports no model code, so it can be used from `opd.model` itself. It is over the usual length because of the
refusals: whatever a user can hand it in place of a checkpoint is named, by path and by what was expected.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from opd.config import ConfigError
from opd.fp4 import dequantize, is_fp4_name, packed_weights, quantize
from opd.types import Fp4Tensor, WeightSnapshot

if TYPE_CHECKING:
    from opd.chat import Chat

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32)
CODES, SCALES = ".fp4_codes", ".fp4_scales"
MTP = "mtp."  # begins the names of the multi-token-prediction block, in memory as in the released layout

# Released DeepSeek-V4 name -> transformers' name, applied in this order to names without a leading "model.". Names that
# are transformers' own pass through unchanged, which is why each pattern names its surroundings.
RELEASED_NAMES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), target)
    for pattern, target in (
        (r"^embed\.weight$", "embed_tokens.weight"),
        (r"^head\.weight$", "lm_head.weight"),
        (r"(^|\.)hc_head_(fn|base|scale)$", r"\1hc_head.hc_\2"),
        (r"\.attn_norm\.", ".input_layernorm."),
        (r"\.ffn_norm\.", ".post_attention_layernorm."),
        (r"\.hc_(attn|ffn)_(fn|base|scale)$", r".\1_hc.\2"),
        (r"\.attn\.", ".self_attn."),
        (r"\.ffn\.", ".mlp."),
        (r"\.self_attn\.indexer\.compressor\.", ".self_attn.compressor.indexer."),
        (r"\.self_attn\.indexer\.weights_proj\.", ".self_attn.compressor.indexer.scorer.weights_proj."),
        (r"\.self_attn\.indexer\.wq_b\.", ".self_attn.compressor.indexer.q_b_proj."),
        (r"(\.self_attn\.(?:.*\.)?)norm\.weight$", r"\1kv_norm.weight"),
        (r"\.attn_sink$", ".sinks"),
        (r"\.ape$", ".position_bias"),
        (r"\.q_norm\.", ".q_a_norm."),
        (r"\.w(q_a|q_b|kv|o_a|o_b)\.", r".\1_proj."),
        (r"\.wgate\.", ".gate_proj."),
        (r"\.gate\.bias$", ".gate.e_score_correction_bias"),
        (r"\.shared_experts\.w1\.", ".shared_experts.gate_proj."),
        (r"\.shared_experts\.w2\.", ".shared_experts.down_proj."),
        (r"\.shared_experts\.w3\.", ".shared_experts.up_proj."),
    )
)
ONE_EXPERT = re.compile(r"^(?P<experts>(?:layers|mtp)\.\d+\.mlp\.experts)\.(?P<index>\d+)\.(?P<part>w[123])\.weight$")
# Copies of the trunk's embedding and head that a released file repeats beside the block which shares them.
MTP_COPIES = re.compile(r"^mtp\.\d+\.(emb\.tok_emb|embed|head)\.weight$")


# --- snapshots --------------------------------------------------------------------------------------------------------


def named_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name; of tied tensors only the first name appears."""
    seen: set[int] = set()
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():  # keep_vars: tied tensors stay one object
        if id(tensor) not in seen:
            seen.add(id(tensor))
            weights[name] = tensor.detach()
    return weights


def snapshot_of(model: nn.Module, policy_version: int, fp4: str) -> WeightSnapshot:
    """Copies a model's weights to CPU memory that nobody else holds.

    `fp4` is `ModelConfig.fp4`: the tensors it selects are packed here, once, so every reader unpacks the same bits.
    All other tensors keep their dtype. The multi-token-prediction block stays behind: nobody samples or scores with it.
    """
    snapshot = WeightSnapshot(policy_version=policy_version)
    for name, weight in named_weights(model).items():
        if name.startswith(MTP):
            continue
        if is_fp4_name(name, tuple(weight.shape), fp4):
            packed = quantize(weight)
            snapshot.tensors[name] = Fp4Tensor(
                codes=packed.codes.cpu(), scales=packed.scales.cpu(), shape=tuple(packed.shape)
            )
        else:
            snapshot.tensors[name] = weight.to("cpu", copy=True).contiguous()
    return snapshot


@torch.no_grad()
def apply_snapshot(model: nn.Module, snapshot: WeightSnapshot) -> None:
    """Writes a snapshot into a model's own tensors. FP4 tensors go into packed weights as they are, and into parameters
    unpacked to their dtype.

    A multi-token-prediction block, which snapshots leave out, keeps its weights.
    Raises ValueError, naming the tensor, for one that is missing, unknown, or of another shape or kind. Nothing is
    written then: all names and shapes are checked before the first copy.
    """
    weights = named_weights(model) | packed_weights(model)
    described = f"snapshot of policy version {snapshot.policy_version}"
    if missing := [name for name in weights if name not in snapshot.tensors and not name.startswith(MTP)]:
        raise ValueError(f"{described} lacks {len(missing)} tensors of the model, first {missing[0]!r}")
    if unexpected := [name for name in snapshot.tensors if name not in weights]:
        raise ValueError(f"{described} has {len(unexpected)} tensors that the model lacks, first {unexpected[0]!r}")
    for name, value in snapshot.tensors.items():
        weight = weights[name]
        if tuple(value.shape) != tuple(weight.shape):
            raise ValueError(f"{described}: {name!r} has shape {tuple(value.shape)}, the model's {tuple(weight.shape)}")
        if not isinstance(weight, torch.Tensor):
            if not isinstance(value, Fp4Tensor):
                raise ValueError(f"{described}: {name!r} is {value.dtype}, the model's is packed FP4")
            weight.check(value)
            continue
        floating = isinstance(value, Fp4Tensor) or value.dtype.is_floating_point
        if floating != weight.dtype.is_floating_point:
            kind = "FP4" if isinstance(value, Fp4Tensor) else value.dtype
            raise ValueError(f"{described}: {name!r} is {kind}, the model's is {weight.dtype}")
    for name, value in snapshot.tensors.items():
        weight = weights[name]
        if isinstance(weight, torch.Tensor):
            weight.copy_(dequantize(value) if isinstance(value, Fp4Tensor) else value)
        elif isinstance(value, Fp4Tensor):
            weight.load(value)


def save_snapshot(path: str | Path, snapshot: WeightSnapshot) -> None:
    """Writes one safetensors file, in place of whatever is at `path`, so that a reader sees the old one or the new one.

    An FP4 tensor `x` is stored as `x.fp4_codes` and `x.fp4_scales`; its shape, and the policy version, are metadata.
    """
    path = Path(path)
    flat: dict[str, torch.Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, value in snapshot.tensors.items():
        if isinstance(value, Fp4Tensor):
            shapes[name] = tuple(value.shape)
            flat[name + CODES], flat[name + SCALES] = value.codes.contiguous(), value.scales.contiguous()
        else:
            flat[name] = value.contiguous()
    metadata = {"format": "pt", "policy_version": str(snapshot.policy_version), "fp4_shapes": json.dumps(shapes)}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    save_file(flat, unfinished, metadata=metadata)
    flush(unfinished)
    os.replace(unfinished, path)
    flush(path.parent)


def load_snapshot(path: str | Path) -> WeightSnapshot:
    """Reads what `save_snapshot` wrote, bit for bit. Raises ConfigError for a file that is missing, torn or of another
    kind."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; expected the safetensors file of a weight snapshot")
    flat: dict[str, torch.Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            for name in file.keys():  # noqa: SIM118 (not a dict)
                flat[name] = file.get_tensor(name)
    except SafetensorError as error:
        raise ConfigError(f"{path} is not a complete safetensors file: {error}") from None
    if "policy_version" not in metadata or "fp4_shapes" not in metadata:
        raise ConfigError(f"{path} is a safetensors file but not a weight snapshot: it states no policy_version")
    snapshot = WeightSnapshot(policy_version=int(metadata["policy_version"]))
    for name, shape in json.loads(metadata["fp4_shapes"]).items():
        codes, scales = flat.pop(name + CODES, None), flat.pop(name + SCALES, None)
        if codes is None or scales is None:
            raise ConfigError(f"{path} lacks the FP4 codes or scales of {name!r}")
        snapshot.tensors[name] = Fp4Tensor(codes=codes, scales=scales, shape=tuple(shape))
    snapshot.tensors.update(flat)
    return snapshot


# --- checkpoint folders -----------------------------------------------------------------------------------------------


def save_checkpoint(folder: str | Path, model: nn.Module, chat: Chat | None) -> None:
    """Writes a folder that `AutoModelForCausalLM.from_pretrained` opens: config, weights as they are (the masters),
    generation config, and the tokenizer with its chat template if `chat` is given.

    `model.config` is a transformers config. The folder is written beside its place, flushed to disk, then renamed; an
    existing folder is replaced. Under this name a crash leaves the old folder, the new one or none, never part of one.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    replaced = folder.with_name(f".{folder.name}.replaced")
    for leftover in (unfinished, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished.mkdir()

    weights = {name: weight.cpu().contiguous() for name, weight in named_weights(model).items()}
    save_file(weights, unfinished / SINGLE_FILE, metadata={"format": "pt"})
    config: Any = copy.deepcopy(model.config)
    config.dtype = next(weight.dtype for weight in weights.values() if weight.dtype.is_floating_point)
    if not config.architectures:  # servers look the class up by this name
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.save_pretrained(unfinished)
    generation: Any = getattr(model, "generation_config", None) or GenerationConfig.from_model_config(config)
    generation.save_pretrained(unfinished)
    if chat is not None:
        chat.save(unfinished)

    for path in [*unfinished.rglob("*"), unfinished]:
        flush(path)
    if folder.exists():
        os.rename(folder, replaced)
    os.rename(unfinished, folder)
    flush(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def resolve_checkpoint(path: str | Path, revision: str | None = None) -> Path:
    """The local folder of a checkpoint given as a folder or as a hub id (which is downloaded, safetensors only).

    Raises ConfigError, naming the path and what was expected, for a folder that is missing or holds no config.json or
    no safetensors weights (pickled weights are refused by name), and for a hub id that can not be fetched.
    """
    folder = Path(path)
    looks_local = folder.is_absolute() or str(path).startswith((".", "~")) or len(folder.parts) > 2
    in_local_folder = len(folder.parts) == 2 and folder.parent.is_dir()
    if not folder.exists():
        if looks_local or in_local_folder:
            raise ConfigError(
                f"{path} does not exist; expected a checkpoint folder with config.json and {SINGLE_FILE}, or a hub id"
            )
        try:
            folder = Path(
                snapshot_download(
                    str(path),
                    revision=revision,
                    allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"],
                )
            )
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"{path} is no folder here and can not be fetched from the hub (revision {revision or 'main'}): "
                f"{reason}"
            ) from None
    if not folder.is_dir():
        raise ConfigError(f"{path} is not a folder; expected a checkpoint folder with config.json and {SINGLE_FILE}")
    if not (folder / "config.json").is_file():
        inner = folder / "hf"
        hint = f"; did you mean {inner}?" if (inner / "config.json").is_file() else ""
        raise ConfigError(f"{path} holds no config.json; expected a checkpoint folder as transformers saves it{hint}")
    weight_files(folder)
    return folder


def load_model_config(path: str | Path, revision: str | None = None) -> PreTrainedConfig:
    """The transformers config of a checkpoint. Raises ConfigError for all that `resolve_checkpoint` refuses and for a
    config.json of an architecture that transformers does not know; code that a checkpoint ships is never run."""
    folder = resolve_checkpoint(path, revision)
    _read_json(folder / "config.json")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the library's validators raise classes of their own, by field
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"{folder / 'config.json'} is not a config that transformers reads: {reason}") from error


def read_tensors(path: str | Path, revision: str | None = None, *, mtp: bool = False) -> dict[str, torch.Tensor]:
    """A DeepSeek-V4 checkpoint's tensors by transformers' in-memory names, dtypes as stored.

    `path` is a checkpoint folder (single file or sharded index), a hub id, or one .safetensors file. Names may be
    transformers' own or the released ones, with or without the leading "model."; per-expert w1, w3 (gate first, then
    up) and w2 are stacked into gate_up_proj [E, 2I, D] and down_proj [E, D, I]. Tensors of the multi-token-prediction
    block are read if `mtp` asks for them, as "mtp.0." and the names of a layer, without the copies of embedding and
    head. Tensors are memory-mapped unless stacking copies them: copy before writing.

    Raises ConfigError for all that `resolve_checkpoint` refuses, for another model_type, for torn files and shards,
    for quantised tensors, and for an incomplete set of experts.
    """
    path = Path(path)
    if path.is_file():
        _refuse_pickle(path)
        files: dict[Path, list[str] | None] = {path: None}
    else:
        folder = resolve_checkpoint(path, revision)
        model_type = _read_json(folder / "config.json").get("model_type")
        if model_type != "deepseek_v4":
            raise ConfigError(f"{folder} holds a model of type {model_type!r}; expected 'deepseek_v4'")
        files = weight_files(folder)

    tensors: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[str, dict[int, torch.Tensor]]] = {}
    for name, tensor in _stored_tensors(files):
        if name.removeprefix("model.").startswith(MTP) and not mtp:
            continue
        if tensor.dtype not in PLAIN_DTYPES:
            raise ConfigError(
                f"{path}: {name!r} is quantised ({tensor.dtype}); expected float32, bfloat16 or float16 weights"
            )
        target = name.removeprefix("model.")
        if MTP_COPIES.match(target):
            continue
        for pattern, replacement in RELEASED_NAMES:
            target = pattern.sub(replacement, target)
        if match := ONE_EXPERT.match(target):
            parts = experts.setdefault(match["experts"], {"w1": {}, "w2": {}, "w3": {}})
            parts[match["part"]][int(match["index"])] = tensor
            continue
        target = _in_model(target)
        if target in tensors:
            raise ConfigError(f"{path} has two tensors that mean {target!r}; one of them is {name!r}")
        tensors[target] = tensor
    for prefix, parts in experts.items():
        gate, down, up = (_in_order(path, f"{prefix}.*.{part}", parts) for part, parts in sorted(parts.items()))
        if not len(gate) == len(down) == len(up):
            raise ConfigError(
                f"{path}: {prefix} has {len(gate)} w1, {len(down)} w2 and {len(up)} w3; expected as many of each"
            )
        stacked = _in_model(f"{prefix}.gate_up_proj"), _in_model(f"{prefix}.down_proj")
        for target in stacked:
            if target in tensors:
                raise ConfigError(f"{path} has {target!r} both stacked and as single experts")
        tensors[stacked[0]] = torch.cat([torch.stack(gate), torch.stack(up)], dim=1)
        tensors[stacked[1]] = torch.stack(down)
    return tensors


def _in_model(name: str) -> str:
    """The in-memory name of a tensor whose leading "model." was taken off."""
    return name if name.startswith(("lm_head.", MTP)) else f"model.{name}"


# --- content hashes ---------------------------------------------------------------------------------------------------


def head_hash(weight: torch.Tensor) -> str:
    """sha256 (hexadecimal) over dtype, shape and bytes, by which a hidden state is tied to its own output head."""
    digest = hashlib.sha256()
    _hash_tensor(digest, weight)
    return digest.hexdigest()


def snapshot_hash(snapshot: WeightSnapshot) -> str:
    """XXH3 (hexadecimal) over names and contents, by which weights are known again: two snapshots of a policy at the
    same step of the same run are one policy. No defence against a forger; of a publish it takes a small part."""
    digest = xxhash.xxh3_128()
    for name, value in snapshot.tensors.items():
        digest.update(name.encode())
        for tensor in (value.codes, value.scales) if isinstance(value, Fp4Tensor) else (value,):
            _hash_tensor(digest, tensor)
    return digest.hexdigest()


def checkpoint_hash(folder: str | Path) -> str:
    """sha256 over the names and contents of a checkpoint's weights, one tensor in memory at a time.

    Does not depend on sharding, file order, metadata and the like. Raises as `resolve_checkpoint` does.
    """
    folder = resolve_checkpoint(folder)
    digest = hashlib.sha256()
    for name, tensor in _stored_tensors(weight_files(folder), by_name=True):
        digest.update(name.encode())
        _hash_tensor(digest, tensor)
    return digest.hexdigest()


def _hash_tensor(digest: Any, tensor: torch.Tensor) -> None:
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


# --- files ------------------------------------------------------------------------------------------------------------


def weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """The safetensors files of a checkpoint, each with the tensor names its index promises (None: no index)."""
    if (folder / SINGLE_FILE).is_file():
        return {folder / SINGLE_FILE: None}
    if (folder / INDEX_FILE).is_file():
        weight_map = _read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConfigError(f"{folder / INDEX_FILE} has no weight_map; expected tensor names and their shard files")
        shards: dict[Path, list[str] | None] = {}
        for name, shard in weight_map.items():
            if Path(shard).name != shard:
                raise ConfigError(f"{folder / INDEX_FILE} places {name!r} outside its folder, in {shard!r}")
            _refuse_pickle(folder / shard)
            if not (folder / shard).is_file():
                raise ConfigError(f"{folder / shard} does not exist; {INDEX_FILE} places {name!r} in it")
            promised = shards.setdefault(folder / shard, [])
            assert promised is not None
            promised.append(name)
        return shards
    for path in sorted(folder.iterdir()):
        if path.suffix in PICKLE_SUFFIXES:
            _refuse_pickle(path)
    raise ConfigError(f"{folder} holds no weights; expected {SINGLE_FILE} or {INDEX_FILE}")


def _refuse_pickle(path: Path) -> None:
    if path.suffix != ".safetensors":
        raise ConfigError(
            f"{path} is not a safetensors file, and pickled weights are never loaded; expected {SINGLE_FILE}"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not readable as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}; expected a JSON object")
    return content


def opened_tensors(files: dict[Path, list[str] | None]) -> list[tuple[str, Any]]:
    """Name of every tensor in `files` with the open file that holds it."""
    opened: list[tuple[str, Any]] = []
    for path, promised in files.items():
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path} is not a complete safetensors file: {error}") from None
        names = set(file.keys())
        if absent := [name for name in promised or [] if name not in names]:
            raise ConfigError(f"{path} lacks {absent[0]!r}, which {INDEX_FILE} places in it")
        opened.extend((name, file) for name in (promised if promised is not None else sorted(names)))
    return opened


def _stored_tensors(files: dict[Path, list[str] | None], by_name: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of everything in `files`, memory-mapped; `by_name` sorts over all files."""
    opened = opened_tensors(files)
    if by_name:
        opened.sort(key=lambda entry: entry[0])
    for name, file in opened:
        yield name, file.get_tensor(name)


def _in_order(path: Path, name: str, parts: dict[int, torch.Tensor]) -> list[torch.Tensor]:
    """Experts 0 to E - 1. Raises ConfigError if one is missing or their shapes differ."""
    for index in range(len(parts)):
        if index not in parts:
            raise ConfigError(f"{path} lacks expert {index} of {name}; the highest one there is {max(parts)}")
        if parts[index].shape != parts[0].shape:
            raise ConfigError(
                f"{path}: expert {index} of {name} has shape {tuple(parts[index].shape)}, expert 0 another"
            )
    return [parts[index] for index in range(len(parts))]


def flush(path: str | Path) -> None:
    """Has the disk take what was written to a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
