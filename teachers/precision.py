"""In how many bits a teacher's weights are held, and the shells they are put into.

The one idea: checkpoints of one architecture differ in nothing but their weights, so a model is built once, as a
`Shell`, and what comes and goes are its weights alone: tensors, or modules that hold packed bytes in the place of a
parameter. However a checkpoint is read, `Shell.held` turns each of its tensors into what the shell takes.

FP8 is DeepSeek's: E4M3 elements, one power of two per tile of 128x128, here for the matrices of a model's layers.
Weights alone are rounded; products are made in the activations' precision, from one matrix at a time. FP4 is
`opd.fp4`'s packed MXFP4. Left out: when weights come and go (`teachers.shelf`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from opd.config import ConfigError
from opd.fp4 import Fp4Experts, Fp4Linear, fake_quantize, fp4_names, is_fp4_name, quantize
from opd.kernels.products import Linear
from opd.model import CausalLM
from opd.model.layers import GroupedLinear
from opd.model.moe import Experts
from opd.weights import named_weights

TILE = 128  # side of the square that shares a scale
E4M3_MAX = 448.0
SCALE_EXPONENTS = (-126, 127)  # normal powers of two of float32
# Matrices of a numbered layer. What decides where a token goes stays as it is, as does what is no matrix.
_IN_A_LAYER = re.compile(r"(^|\.)\d+\..*(?<!\.gate)(?<!router)\.weight$")
_EXPERTS = re.compile(r"\.experts\.(gate_up_proj|down_proj|\d+\.w[123]\.weight)$")  # of a deepseek_v4, in either layout

Form = Literal["fp32", "bf16", "fp8", "fp4", "mxfp4 values", "as stored"]
Entry = Tensor | nn.Module  # a module holds packed bytes and stands where the parameter stood
Entries = dict[str, Entry]  # by the parameter's or buffer's name in the model


# ---- FP8 -------------------------------------------------------------------------------------------------------------


def quantize_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [..., N, K] as E4M3 codes (float8_e4m3fn, same shape) and scales (float32 [..., N/128, K/128], rounded
    up): tile times scale. The scale is the smallest power of two with which no element of its tile saturates.

    Raises ValueError for fewer than two dimensions and for values that are not finite.
    """
    if weight.dim() < 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; FP8 tiles need two dimensions")
    weight = weight.detach().float()
    if not weight.isfinite().all():
        raise ValueError(f"weight of shape {tuple(weight.shape)} has values that are not finite")
    rows, columns = weight.shape[-2:]
    padded = functional.pad(weight.abs(), (0, -columns % TILE, 0, -rows % TILE))
    largest = padded.unflatten(-1, (-1, TILE)).unflatten(-3, (-1, TILE)).amax((-3, -1))
    # frexp: largest = m * 2**e with 0.5 <= m < 1, and 448 = 0.875 * 2**9.
    mantissa, exponent = torch.frexp(largest)
    exponent = exponent - 9 + (mantissa > E4M3_MAX / 512).int()
    scales = torch.ldexp(torch.ones_like(largest), exponent.clamp(*SCALE_EXPONENTS))
    return (weight / _spread(scales, rows, columns)).to(torch.float8_e4m3fn), scales


def dequantize_fp8(codes: Tensor, scales: Tensor) -> Tensor:
    """float32 [..., N, K], exactly what codes and scales stand for."""
    return codes.float() * _spread(scales, *codes.shape[-2:])


def _spread(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Each tile's scale at each of its elements, [..., rows, columns]."""
    return scales.repeat_interleave(TILE, -2)[..., :rows, :].repeat_interleave(TILE, -1)[..., :columns]


class Fp8Weight(nn.Module):
    """Stands where a parameter [..., N, K] stood and holds its FP8 codes and scales; called, it gives the values."""

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        codes, scales = quantize_fp8(weight)
        self.shape = tuple(codes.shape)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scales", scales, persistent=False)

    def forward(self, index: int | None = None) -> Tensor:
        """float32 [..., N, K], or one matrix [N, K] of a stack."""
        if index is None:
            return dequantize_fp8(self.codes, self.scales)
        return dequantize_fp8(self.codes[index], self.scales[index])


def _unpacked(linear: nn.Module) -> Tensor:
    return cast(Fp8Weight, linear._modules["weight"])()


class Fp8Linear(nn.Linear):
    """`nn.Linear` whose weight is an `Fp8Weight`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, _unpacked(self).to(input.dtype), self.bias)


class Fp8GroupedLinear(GroupedLinear):
    """`GroupedLinear` whose weight is an `Fp8Weight`."""

    def forward(self, input: Tensor) -> Tensor:
        weight = _unpacked(self).to(input.dtype).view(self.groups, -1, self.in_features)
        rows = input.reshape(-1, self.groups, self.in_features).transpose(0, 1)
        out = torch.bmm(rows, weight.transpose(1, 2))
        return out.transpose(0, 1).reshape(*input.shape[:-2], self.out_features)


class Fp8Experts(Experts):
    """`Experts` whose stacks are `Fp8Weight`s; one expert's matrix is unpacked at a time."""

    def _linear(self, weight: Any, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        parts = [
            functional.linear(rows, weight(expert).to(x.dtype))
            for expert, rows in enumerate(x.split(sizes))
            if len(rows)
        ]
        return torch.cat(parts) if parts else x.new_empty(0, weight.shape[1])


_FP8_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: Fp8Linear,
    Linear: Fp8Linear,
    GroupedLinear: Fp8GroupedLinear,
    Experts: Fp8Experts,
}


# ---- shells ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Shell:
    """A model without weights of its own, and the form in which it takes each of them."""

    model: CausalLM
    forms: dict[str, Form]  # by the names of `opd.weights.named_weights` on the model as it was loaded
    installed: list[str] = field(default_factory=list)
    _places: dict[str, tuple[nn.Module, str]] = field(default_factory=dict)  # owner and attribute, by name

    def held(self, name: str, tensor: Tensor) -> Entry:
        """What is held of a stored tensor, in memory of its own. Raises ConfigError for one that cannot be packed."""
        return held(name, tensor, self.forms[name])

    @property
    def keeps_stored_bytes(self) -> bool:
        """Whether every float32 tensor is held in the bytes that it was stored in."""
        return all(form in ("fp32", "mxfp4 values", "as stored") for form in self.forms.values())

    def rounded_in_place(self, tensors: dict[str, Tensor]) -> Entries:
        """What is held of stored tensors whose memory nobody else has, where `keeps_stored_bytes`."""
        for name, tensor in tensors.items():
            if self.forms[name] == "mxfp4 values":
                tensor.copy_(fake_quantize(tensor))
        return {**tensors}

    def install(self, entries: Entries) -> None:
        """Puts a checkpoint's weights in the place of whatever is there; the model is usable until `clear`."""
        for name, entry in entries.items():
            owner, leaf = self._place(name)
            if isinstance(entry, nn.Module):
                owner._modules[leaf] = entry
            elif (parameter := owner._parameters.get(leaf)) is not None:
                parameter.data = entry
            else:
                owner._buffers[leaf] = entry
        self.installed = list(entries)

    def clear(self) -> None:
        """Lets go of the weights."""
        nothing = torch.empty(0)
        for name in self.installed:
            owner, leaf = self._place(name)
            if (parameter := owner._parameters.get(leaf)) is not None:
                parameter.data = nothing
            elif leaf in owner._modules:
                owner._modules[leaf] = nn.Module()
            else:
                owner._buffers[leaf] = nothing
        self.installed = []

    def _place(self, name: str) -> tuple[nn.Module, str]:
        if name not in self._places:
            prefix, _, leaf = name.rpartition(".")
            self._places[name] = cast(nn.Module, self.model).get_submodule(prefix), leaf
        return self._places[name]


def take_weights(model: CausalLM, family: str, precision: str | None, rounded: str) -> tuple[Shell, Entries]:
    """Takes a float32 model apart: its shell, and its weights as `precision` has them held.

    `precision` is `TeacherConfig.precision`; null rounds the weights that the `model.fp4` choice `rounded` selects to
    MXFP4 values, held in float32. Raises ConfigError for a model that the precision is not for.
    """
    assert isinstance(model, nn.Module)
    model.eval().requires_grad_(False)
    weights = named_weights(model)
    try:
        forms = _forms(model, weights, family, precision, rounded)
        shell = Shell(model, forms)
        entries: Entries = {}
        for name in list(weights):
            entries[name] = shell.held(name, weights.pop(name))
            _make_room(model, name, forms[name])
    except ValueError as error:
        raise ConfigError(f"precision={precision}: {error}") from None
    return shell, entries


def held(name: str, tensor: Tensor, form: Form) -> Entry:
    """`tensor` in `form`, in memory of its own. Raises ConfigError, naming it, for values that are not finite where
    the form has no room for them."""
    tensor = tensor.detach()
    try:
        match form:
            case "as stored":
                return tensor.clone()
            case "fp32":
                return tensor.to(torch.float32, copy=True)
            case "bf16":
                return tensor.to(torch.bfloat16, copy=True)
            case "fp8":
                return Fp8Weight(tensor)
            case "fp4":
                return Fp4Experts(quantize(tensor.float()))
            case "mxfp4 values":
                return fake_quantize(tensor.to(torch.float32, copy=True))
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None


def held_bytes(stored: Mapping[str, tuple[str, tuple[int, ...]]], family: str, precision: str | None) -> int:
    """Bytes that a checkpoint with these tensors in its files (`opd.stored.stored_shapes`) takes in memory.

    Never less than what is held once it is; more for tensors that a checkpoint repeats or a model has no use for.
    """
    total = 0
    for name, (dtype, shape) in stored.items():
        numel = math.prod(shape)
        match precision:
            case _ if dtype == "I64":
                total += 8 * numel
            case "bf16" if not name.endswith("bias"):  # of which some are buffers, and stay as they are
                total += 2 * numel
            case "fp8" if len(shape) > 1 and (_IN_A_LAYER.search(name) or _EXPERTS.search(name)):
                tiles = -(-shape[-1] // TILE) * -(-shape[-2] // TILE) * (numel // (shape[-1] * shape[-2]) or 1)
                total += numel + 4 * tiles
            case "fp4" if _is_packed(name, shape, family):
                total += numel // 2 + -(-numel // 32)
            case _:
                total += 4 * numel
    return total


def entry_bytes(entries: Entries) -> int:
    """Bytes that these weights take."""
    tensors = [
        tensor for entry in entries.values() for tensor in ([entry] if isinstance(entry, Tensor) else entry.buffers())
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _is_packed(name: str, shape: tuple[int, ...], family: str) -> bool:
    if family == "deepseek_v4":
        return _EXPERTS.search(name) is not None
    return is_fp4_name(name, shape, "linears")


def _forms(
    model: nn.Module, weights: dict[str, Tensor], family: str, precision: str | None, rounded: str
) -> dict[str, Form]:
    parameters = dict(model.named_parameters())
    forms: dict[str, Form] = {}
    for name, tensor in weights.items():
        if name in parameters and tensor.dtype.is_floating_point:
            forms[name] = "bf16" if precision == "bf16" else "fp32"
        else:
            forms[name] = "as stored"
    match precision:
        case None:
            forms |= dict.fromkeys(fp4_names(model, rounded) & forms.keys(), "mxfp4 values")
        case "fp8":
            forms |= dict.fromkeys(_fp8_names(model) & forms.keys(), "fp8")
        case "fp4":
            choice = "experts" if family == "deepseek_v4" else "linears"
            names = fp4_names(model, choice) & forms.keys()
            if not names:
                raise ValueError(f"the model has no weights that fp4 packs ({choice})")
            forms |= dict.fromkeys(names, "fp4")
        case _:
            pass
    return forms


def _fp8_names(model: nn.Module) -> set[str]:
    names: set[str] = set()
    for prefix, module in model.named_modules():
        if type(module) is Experts:
            names |= {f"{prefix}.gate_up_proj", f"{prefix}.down_proj"}
        elif type(module) in _FP8_CLASSES and _IN_A_LAYER.search(f"{prefix}.weight"):
            names.add(f"{prefix}.weight")
    return names


def _make_room(model: nn.Module, name: str, form: Form) -> None:
    """Lets a module take a packed entry where it had a parameter, and the weights of the one it had be freed."""
    prefix, _, leaf = name.rpartition(".")
    owner = model.get_submodule(prefix)
    if form in ("fp8", "fp4"):
        del owner._parameters[leaf]
        owner._modules[leaf] = nn.Module()
        if form == "fp8":
            owner.__class__ = _FP8_CLASSES.get(type(owner), type(owner))
        elif isinstance(owner, nn.Linear):
            cast(Any, owner).__class__ = Fp4Linear
    elif (parameter := owner._parameters.get(leaf)) is not None:
        parameter.data = torch.empty(0)
    else:
        owner._buffers[leaf] = torch.empty(0)
