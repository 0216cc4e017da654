"""FP4 weights: the formats, the modules that hold nothing but packed bytes, and which tensors of a model are FP4.

MXFP4, in which the policy is sampled, published and trained, has E2M1 elements and one power of two per 32 inputs. The
one idea: `quantize` (what is published and what rollout workers multiply by) and `fake_quantize` (what the learner
multiplies by) round through the same function, so the learner trains exactly the weights that the workers sample from.

A weight w of a block becomes scale * e, with e on the grid 0, 0.5, 1, 1.5, 2, 3, 4, 6 and a sign, and
scale = 2 ** ceil(log2(amax / 6)) over the 32 neighbours along the last dimension. Rounding the exponent up means that
no element saturates, hence the straight-through gradient needs no mask.

NVFP4 has the same elements, an E4M3 scale per 16 inputs and one float32 scale per matrix. Here the block's scale is
rounded up too, from the smallest normal one on, and the matrix's is a power of two: so nothing saturates, rounding
twice is rounding once, and every value is exact in bfloat16.

`Fp4Linear` and `Fp4Experts` multiply by packed bytes through `opd.kernels`, or in plain torch where those have nothing
for the device. It is over the usual length because a format, its inverse and its user must be read together. Left out:
activations, and how fast products are made.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from opd.kernels import cpu, fused, products
from opd.types import Fp4Tensor

BLOCK = 32  # inputs that share a scale in MXFP4
NV_BLOCK = 16  # in NVFP4
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by code; bit 3 of a code is the sign

_TILE = 128  # side of the square tile that shares one scale once FP4 has become FP8
_EXACT_SPAN = 14  # largest spread of scale exponents in such a tile that E4M3 holds exactly, subnormals included
_DTYPES = (torch.float32, torch.bfloat16, torch.float64)  # those that hold every value of both formats exactly
_KERNEL_DTYPES = (torch.float32, torch.bfloat16)  # of activations; others are multiplied in plain torch
_EXPERT_SUFFIXES = (".experts.gate_up_proj", ".experts.down_proj")
# Matrices of a numbered layer; what decides where a token goes, or is a norm, stays as it is.
_LINEAR = re.compile(r"(^|\.)\d+\..*(?<!norm)(?<!\.gate)(?<!router)\.weight$")

Format = Literal["mxfp4", "nvfp4"]


@dataclass(slots=True, kw_only=True, frozen=True)
class NvFp4Tensor:
    """A weight held as NVFP4: E2M1 codes, one E4M3 scale per 16 inputs, one float32 scale per matrix.

    Example: a [3, 2, 64] weight has codes uint8 [3, 2, 32] (even input in the low nibble), scales uint8 [3, 2, 4]
    (the bits of float8_e4m3fn) and matrix_scales [3].
    """

    codes: Tensor  # uint8 [..., K / 2]
    scales: Tensor  # uint8 [..., K / 16]
    matrix_scales: Tensor  # float32, the leading dimensions without the last two
    shape: tuple[int, ...]  # of the weight; the last dimension K is a multiple of 16


# ---- the formats -----------------------------------------------------------------------------------------------------


def quantize(weight: Tensor) -> Fp4Tensor:
    """Rounds a weight [..., K] to MXFP4, ties to even. A float64 weight is rounded to float32 first.

    A block whose largest magnitude is below 6 * 2**-126, an all-zero block included, gets scale byte 1. The sign of
    what rounds to zero is kept (code 8). Raises ValueError if K is not a multiple of 32, for another dtype than
    float32, bfloat16 or float64, and if a value is not finite in float32.
    """
    weight = _checked(weight, "mxfp4")
    elements, scale_bytes = _round_to_grid(weight)
    return Fp4Tensor(
        codes=_packed_codes(elements), scales=scale_bytes.squeeze(-1).to(torch.uint8), shape=tuple(weight.shape)
    )


def quantize_nv(weight: Tensor) -> NvFp4Tensor:
    """Rounds a weight [..., K] to NVFP4, ties to even; a matrix is the last two dimensions. As `quantize` otherwise.

    Block scales are at least 2**-6 and matrix scales at least 2**-119, so what is below that fraction of its matrix's
    largest magnitude is rounded as coarsely as a larger block; an all-zero block has scale byte 8.
    """
    weight = _checked(weight, "nvfp4")
    elements, scale_bytes, matrix_scales = _round_to_nv_grid(weight)
    return NvFp4Tensor(
        codes=_packed_codes(elements),
        scales=scale_bytes.squeeze(-1).to(torch.uint8),
        matrix_scales=matrix_scales,
        shape=tuple(weight.shape),
    )


def dequantize(tensor: Fp4Tensor | NvFp4Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [..., K] that `tensor` stands for, exactly; `dtype` is float32, bfloat16 or float64.

    Only what the largest float32 values round up to, 2**128 and above, needs float64: the narrower two make it an
    infinity. A matrix scale of NVFP4 that was made elsewhere, and is no power of two, is multiplied in and rounded.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype} does not hold every FP4 value; choose one of {_names(_DTYPES)}")
    magnitudes = torch.tensor(E2M1_VALUES, dtype=dtype, device=tensor.codes.device)
    values = torch.cat((magnitudes, -magnitudes))
    both_nibbles = torch.stack((tensor.codes & 15, tensor.codes >> 4), dim=-1)
    elements = values[both_nibbles.int()].reshape(
        *tensor.scales.shape, NV_BLOCK if isinstance(tensor, NvFp4Tensor) else BLOCK
    )
    if isinstance(tensor, NvFp4Tensor):
        scales = tensor.scales.view(torch.float8_e4m3fn).to(dtype)
        scales = scales * tensor.matrix_scales.to(dtype).reshape(*tensor.matrix_scales.shape, *_ones(tensor.shape))
    else:
        # The dtype decodes 2 ** (byte - 127) with its two special bytes: 0 is a subnormal of float32, 255 is NaN.
        scales = tensor.scales.view(torch.float8_e8m0fnu).to(dtype)
    return (elements * scales.unsqueeze(-1)).reshape(tensor.shape)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, kind: Format) -> Tensor:
        if kind == "mxfp4" and weight.dtype == torch.float32 and fused.usable(weight):
            return fused.mxfp4_values(weight)
        if kind == "mxfp4":
            elements, scale_bytes = _round_to_grid(weight.float())
            scales = _power_of_two(scale_bytes)
        else:
            elements, scale_bytes, matrix_scales = _round_to_nv_grid(weight.float())
            scales = _nv_scales(scale_bytes, matrix_scales, weight.shape)
        return elements.mul_(scales).reshape(weight.shape).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


def fake_quantize(weight: Tensor, kind: Format = "mxfp4") -> Tensor:
    """`dequantize(quantize(weight), weight.dtype)`, bit for bit, as a node of the graph: the gradient passes unchanged.

    `kind` "nvfp4" goes through `quantize_nv` instead. Raises ValueError as those do for shape and dtype. Values are not
    checked, since that would wait for the device in every forward: a value that is not finite comes out as NaN, and the
    loss shows it.
    """
    _check_weight(weight.shape, weight.dtype, kind)
    return _StraightThrough.apply(weight, kind)


def lossless_violations(tensor: Fp4Tensor) -> int:
    """Number of 128x128 tiles whose scale exponents span more than 14, where a conversion to FP8 E4M3 can lose bits.

    A tile in FP8 has the scale 2**-6 times the largest of its FP4 scales. Leading dimensions are separate matrices,
    tiles at the edges may be smaller, and blocks that hold only zeros are left out: zero is exact at any scale.
    """
    num_rows = tensor.shape[-2] if len(tensor.shape) > 1 else 1
    blocks = (-1, num_rows, tensor.scales.shape[-1])
    scales = tensor.scales.reshape(blocks)
    empty = ((tensor.codes & 0x77) == 0).unflatten(-1, (-1, BLOCK // 2)).all(dim=-1).reshape(blocks)
    if scales.numel() == 0:
        return 0
    per_tile = _TILE // BLOCK
    padding = (0, -blocks[2] % per_tile, 0, -num_rows % _TILE)

    def tiles(bytes_: Tensor, neutral: int) -> Tensor:
        padded = functional.pad(bytes_.masked_fill(empty, neutral).int(), padding, value=neutral)
        return padded.unflatten(-1, (-1, per_tile)).unflatten(-3, (-1, _TILE))  # [..., tile row, 128, tile column, 4]

    span = tiles(scales, 0).amax(dim=(-3, -1)) - tiles(scales, 255).amin(dim=(-3, -1))
    return int((span > _EXACT_SPAN).sum())


# ---- packed weights --------------------------------------------------------------------------------------------------


class Fp4Experts(nn.Module):
    """The weights of a stack of linear maps, packed and nothing else: it stands where the parameter [E, N, K] stood.

    A matrix [N, K] is a stack of one. On the CPU the bytes are in the order in which the kernels read them. They are no
    part of a state dict: `packed_weights` finds them, `load` replaces them and `packed` gives them back as published.
    """

    codes: Tensor
    scales: Tensor
    matrix_scales: Tensor

    def __init__(self, tensor: Fp4Tensor | NvFp4Tensor) -> None:
        """Raises ValueError for a tensor of other dimensions or without elements, and as `load` does."""
        super().__init__()
        if len(tensor.shape) not in (2, 3) or 0 in tensor.shape:
            raise ValueError(f"packed weights have shape {tuple(tensor.shape)}; expected [experts,] outputs, inputs")
        self.shape = tuple(tensor.shape)
        self.is_nv = isinstance(tensor, NvFp4Tensor)
        for name in ("codes", "scales", "matrix_scales"):
            self.register_buffer(name, torch.empty(0, device=tensor.codes.device), persistent=False)
        self.load(tensor)

    def load(self, tensor: Fp4Tensor | NvFp4Tensor) -> None:
        """Takes the bytes of another tensor, to this module's device. Raises ValueError as `check` does."""
        self.check(tensor)
        device = self.codes.device
        codes, scales = tensor.codes.to(device), tensor.scales.to(device)
        if len(self.shape) == 2:
            codes, scales = codes[None], scales[None]
        self.codes, self.scales = cpu.tiled(codes, scales) if device.type == "cpu" else (codes, scales)
        if isinstance(tensor, NvFp4Tensor):
            self.matrix_scales = tensor.matrix_scales.to(device, torch.float32).reshape(-1)

    def check(self, tensor: Fp4Tensor | NvFp4Tensor) -> None:
        """Raises ValueError unless `load` would take this tensor: one of another shape or format, or with scales that
        the kernels do not multiply by: bytes 0 and 255 of MXFP4 (2**-127 and NaN), negative ones and NaN of NVFP4, none
        of which `quantize` and `quantize_nv` make."""
        if tuple(tensor.shape) != self.shape or isinstance(tensor, NvFp4Tensor) != self.is_nv:
            raise ValueError(
                f"{_format_of(tensor)} of shape {tuple(tensor.shape)} cannot take the place of "
                f"{'NVFP4' if self.is_nv else 'MXFP4'} of shape {self.shape}"
            )
        lowest, highest = (0, 126) if self.is_nv else (1, 254)
        found = [int(byte) for byte in tensor.scales.aminmax()] if tensor.scales.numel() else [lowest]
        if found[0] < lowest or found[-1] > highest:
            raise ValueError(
                f"{_format_of(tensor)} of shape {self.shape} has scale bytes from {found[0]} to {found[-1]}; products "
                f"are made with {lowest} to {highest}"
            )

    def packed(self) -> Fp4Tensor | NvFp4Tensor:
        """The published bytes."""
        return self._published(self.codes, self.scales)

    def forward(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """x [R, K], rows sorted by expert, `sizes` rows of each: [R, N] in x's dtype, summed in at least float32.

        Raises ValueError for shapes that do not fit, and for an x that asks for a gradient: there is none.
        """
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("packed FP4 weights are for sampling; they give no gradient")
        # Not as attributes: few rows leave the caches empty, and looking these up in Python would be felt.
        codes: Any = self._buffers["codes"]
        scales: Any = self._buffers["scales"]
        shape, (num_features, width) = x.shape, self.shape[-2:]
        if len(shape) != 2 or shape[1] != width or len(sizes) != codes.shape[0] or sum(sizes) != shape[0]:
            raise ValueError(
                f"x has shape {tuple(shape)} in {len(sizes)} segments of {sum(sizes)} rows together; these packed "
                f"weights have shape {self.shape}"
            )
        compute = _kernel(x) if x.dtype in _KERNEL_DTYPES else None
        if compute is None:
            return self._in_plain_torch(x, sizes)
        y = compute(x, codes, scales, sizes, num_features)
        if self.is_nv:
            rows = torch.tensor(sizes, device=x.device)
            y *= self.matrix_scales.to(y.dtype).repeat_interleave(rows, output_size=len(y))[:, None]
        return y

    def _in_plain_torch(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """The kernels' twin. One expert's weight is unpacked at a time."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        y = x.new_empty(x.shape[0], self.shape[-2])
        start = 0
        for expert, size in enumerate(sizes):
            if size:
                weight = dequantize(self._published(self.codes, self.scales, expert), dtype)
                y[start : start + size] = functional.linear(x[start : start + size].to(dtype), weight)
            start += size
        return y

    def _published(self, codes: Tensor, scales: Tensor, expert: int | None = None) -> Fp4Tensor | NvFp4Tensor:
        """The published bytes of codes and scales as they lie on their device, of all experts or as one's matrix."""
        shape, matrix_scales = self.shape, self.matrix_scales
        if expert is not None:
            codes, scales, matrix_scales = (part[expert : expert + 1] for part in (codes, scales, matrix_scales))
            shape = shape[-2:]
        if codes.device.type == "cpu":
            codes, scales = cpu.untiled(codes, scales, shape[-2])
        codes = codes.reshape(*shape[:-1], codes.shape[-1])
        scales = scales.reshape(*shape[:-1], scales.shape[-1])
        if self.is_nv:
            matrix_scales = matrix_scales.reshape(shape[:-2])
            return NvFp4Tensor(codes=codes, scales=scales, matrix_scales=matrix_scales, shape=shape)
        return Fp4Tensor(codes=codes, scales=scales, shape=shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp4Experts:
        """Moves between kinds of device by way of the published bytes, since each kind has its own order."""
        codes, scales = self.codes, self.scales
        super()._apply(fn, recurse)
        if self.codes.device.type != codes.device.type:
            self.load(self._published(codes, scales))
        return self


class Fp4Linear(nn.Module):
    """`nn.Linear` with a packed weight: an `Fp4Experts` of one matrix in the place of the parameter `weight`."""

    def __init__(self, tensor: Fp4Tensor | NvFp4Tensor, bias: Tensor | None = None) -> None:
        """`tensor` has the shape [N, K]; raises ValueError as `Fp4Experts` does."""
        super().__init__()
        if len(tensor.shape) != 2:
            raise ValueError(f"a packed linear has shape {tuple(tensor.shape)}; expected outputs, inputs")
        self.out_features, self.in_features = tensor.shape
        self.weight = Fp4Experts(tensor)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        weight: Any = self._modules["weight"]
        *lead, width = x.shape
        if len(lead) == 1:
            y = weight.forward(x, lead)
        else:
            rows = x.reshape(-1, width)
            y = weight.forward(rows, (len(rows),)).view(*lead, self.out_features)
        return y if self.bias is None else y + self.bias


class FakeFp4Linear(nn.Linear):
    """`nn.Linear` that multiplies by `fake_quantize(weight)`: what the learner trains where workers hold Fp4Linear."""

    def forward(self, input: Tensor) -> Tensor:
        return products.linear(input, fake_quantize(self.weight), self.bias)


def pack_weights(model: nn.Module, choice: str) -> None:
    """Replaces every weight that `choice` selects by one that holds its packed MXFP4 bytes only, under the same name.

    `choice` as in `fp4_names`. The rest of the model, forward included, is unchanged.
    """
    names = fp4_names(model, choice)
    for prefix, module in list(model.named_modules()):
        for child_name, child in list(module.named_children()):
            name = ".".join(filter(None, (prefix, child_name)))
            if f"{name}.weight" in names and isinstance(child, nn.Linear):
                setattr(module, child_name, Fp4Linear(quantize(child.weight), child.bias))
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() == 3 and ".".join(filter(None, (prefix, leaf))) in names:
                delattr(module, leaf)
                module.add_module(leaf, Fp4Experts(quantize(parameter)))


def packed_weights(model: nn.Module) -> dict[str, Fp4Experts]:
    """The packed weights of a model by the names of the parameters whose place they took."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Fp4Experts)}


def fake_quantize_linears(model: nn.Module) -> None:
    """Makes every `nn.Linear` that `model.fp4`=linears selects multiply by its MXFP4 values; parameters stay."""
    names = fp4_names(model, "linears")
    for name, module in model.named_modules():
        if f"{name}.weight" in names:
            module.__class__ = FakeFp4Linear


_LINEARS = (nn.Linear, products.Linear, FakeFp4Linear)  # and no other subclass: its forward may be more than a product


# ---- which weights are FP4 -------------------------------------------------------------------------------------------


def fp4_names(model: nn.Module, choice: str) -> set[str]:
    """Names of the model's parameters that `is_fp4_name` selects. Raises ValueError as that does, and for a matrix that
    "linears" selects but that is not the weight of an `nn.Linear` (GPT-2 stores its maps the other way round)."""
    names = {name for name, weight in model.named_parameters() if is_fp4_name(name, tuple(weight.shape), choice)}
    if choice == "linears":
        linears = {f"{name}.weight" for name, module in model.named_modules() if type(module) in _LINEARS}
        if strange := sorted(names - linears):
            owner = model.get_submodule(strange[0].rpartition(".")[0])
            raise ValueError(
                f"{strange[0]} belongs to a {type(owner).__name__}; with model.fp4=linears the matrices of a model's "
                "layers must be those of nn.Linear"
            )
    return names


def is_fp4_name(name: str, shape: Sequence[int], choice: str) -> bool:
    """Whether the parameter `name` is held in MXFP4 under the config's `model.fp4` = `choice`.

    "experts": the stacked weights of the routed experts. "linears": the matrices of a dense model's numbered layers, of
    32 outputs and more; not embeddings, the head, norms and routers. "none": nothing. Raises ValueError for another
    choice, and for a chosen weight whose last dimension is not a multiple of 32.
    """
    match choice:
        case "none":
            return False
        case "experts":
            chosen = name.endswith(_EXPERT_SUFFIXES)
        case "linears":
            chosen = len(shape) == 2 and shape[0] >= BLOCK and _LINEAR.search(name) is not None
        case _:
            raise ValueError(f"model.fp4={choice!r} is not allowed; choose one of experts, linears, none")
    if chosen and (not shape or shape[-1] % BLOCK):
        raise ValueError(
            f"{name} has shape {tuple(shape)}; with model.fp4={choice} its last dimension must be a multiple of {BLOCK}"
        )
    return chosen


# ---- rounding --------------------------------------------------------------------------------------------------------


def _check_weight(shape: torch.Size, dtype: torch.dtype, kind: Format) -> None:
    block = BLOCK if kind == "mxfp4" else NV_BLOCK
    if not shape or shape[-1] % block:
        raise ValueError(
            f"weight has shape {tuple(shape)}; {kind.upper()} needs a last dimension that is a multiple of {block}"
        )
    if dtype not in _DTYPES:
        raise ValueError(f"weight has dtype {dtype}; {kind.upper()} is made from one of {_names(_DTYPES)}")


def _checked(weight: Tensor, kind: Format) -> Tensor:
    """The weight in float32, or ValueError."""
    _check_weight(weight.shape, weight.dtype, kind)
    weight = weight.detach().float()
    finite = weight.isfinite()
    if not finite.all():
        position = tuple((~finite).nonzero()[0].tolist())
        raise ValueError(
            f"weight of shape {tuple(weight.shape)} has {int((~finite).sum())} values that are not finite, the first "
            f"of them {weight[position].item()} at {position}; {kind.upper()} holds finite values only"
        )
    return weight


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _round_to_grid(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [..., K] -> new elements on the E2M1 grid [..., K/32, 32] and scale bytes int32 [..., K/32, 1].

    Every step is exact but the rounding itself, and each is one pass over memory: the learner runs this on all its
    experts in every forward.
    """
    blocks = weight.unflatten(-1, (weight.shape[-1] // BLOCK, BLOCK))
    magnitudes = blocks.abs()
    amax_bits = magnitudes.amax(dim=-1, keepdim=True).view(torch.int32)
    # amax = m * 2**e with 1 <= m < 2 gives ceil(log2(amax / 6)) = e - 2 if m <= 1.5, else e - 1. Adding the 22 low bits
    # carries into the exponent exactly when m > 1.5, that is when the mantissa is above 0x400000.
    scale_bytes = (((amax_bits + 0x3FFFFF) >> 23) - 2).clamp_(min=1)
    elements = blocks * _power_of_two(254 - scale_bytes)  # byte b is 2 ** (b - 127), so 254 - b is its inverse
    return _nearest(elements, magnitudes).copysign_(blocks), scale_bytes


def _round_to_nv_grid(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float32 [..., K] -> new elements on the E2M1 grid [..., K/16, 16], scale bytes int32 [..., K/16, 1] of E4M3, and
    matrix scales float32 [...] without the last two dimensions."""
    blocks = weight.unflatten(-1, (weight.shape[-1] // NV_BLOCK, NV_BLOCK))
    magnitudes = blocks.abs()
    amax = magnitudes.amax(dim=-1, keepdim=True)
    matrix_dims = tuple(range(max(len(weight.shape) - 2, 0), amax.dim()))
    matrix_amax = amax.amax(dim=matrix_dims) if amax.numel() else amax.new_zeros(weight.shape[:-2])
    # The smallest power of two that lets 6 * 448 = 1.3125 * 2**11 times it reach the largest magnitude: m * 2**e gives
    # 2 ** (e - 11) if m <= 1.3125, whose mantissa is 0x280000, else 2 ** (e - 10).
    matrix_bytes = (((matrix_amax.view(torch.int32) + 0x57FFFF) >> 23) - 11).clamp_(min=8)
    matrix_scales = _power_of_two(matrix_bytes)
    # E4M3's bits are a float's, cut to 3 of mantissa, its exponent's bias being 120 less. Adding all that is cut but
    # its last bit's worth rounds up.
    wanted = amax / 6 / matrix_scales.reshape(*matrix_scales.shape, *_ones(weight.shape), 1)
    scale_bytes = (((wanted.view(torch.int32) + 0xFFFFF) >> 20) - (120 << 3)).clamp_(min=8)
    elements = blocks / _nv_scales(scale_bytes, matrix_scales, weight.shape)
    return _nearest(elements, magnitudes).copysign_(blocks), scale_bytes, matrix_scales


def _nv_scales(scale_bytes: Tensor, matrix_scales: Tensor, shape: Sequence[int]) -> Tensor:
    """The products of normal E4M3 scales, int32 bytes [..., K/16, 1], and their matrices' scales: exact float32."""
    scales = ((scale_bytes + (120 << 3)) << 20).view(torch.float32)
    return scales * matrix_scales.reshape(*matrix_scales.shape, *_ones(shape), 1)


def _ones(shape: Sequence[int]) -> tuple[int, ...]:
    """As many ones as a weight of `shape` has matrix dimensions: by them, what is per matrix broadcasts."""
    return (1,) * min(len(shape), 2)


def _nearest(elements: Tensor, binade: Tensor) -> Tensor:
    """Rounds magnitudes up to 6 to the E2M1 grid, ties to even, in place; the sign of a zero may get lost. `binade` is
    a buffer of the same shape that may be written over."""
    # The grid's step at x is 2 ** (max(exponent of x, 0) - 1). A float of 1.5 * 2**23 steps has just that step as the
    # weight of its last bit, so adding it makes the addition round to the grid, ties to even.
    torch.bitwise_and(elements.view(torch.int32), 0x7F800000, out=binade.view(torch.int32))
    binade.clamp_(min=1.0)
    return elements.add_(binade, alpha=1.5 * 2**22).sub_(binade, alpha=1.5 * 2**22)


def _packed_codes(elements: Tensor) -> Tensor:
    """Elements on the grid [..., K/B, B] -> uint8 [..., K/2], the even one of two in the low nibble."""
    # Twice a grid value is one of 0, 1, 2, 3, 4, 6, 8, 12: an index from which the code is read.
    doubles = torch.tensor(E2M1_VALUES, device=elements.device).mul_(2).int()
    code_of_double = torch.zeros(13, dtype=torch.uint8, device=elements.device)
    code_of_double[doubles] = torch.arange(8, dtype=torch.uint8, device=elements.device)
    codes = code_of_double[(elements.abs() * 2).int()]
    codes |= elements.signbit().to(torch.uint8) << 3
    codes = codes.flatten(-2)
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def _power_of_two(scale_bytes: Tensor) -> Tensor:
    """int32 bytes 1..254 -> float32 2 ** (byte - 127)."""
    return (scale_bytes << 23).view(torch.float32)


def _format_of(tensor: Fp4Tensor | NvFp4Tensor) -> str:
    return "NVFP4" if isinstance(tensor, NvFp4Tensor) else "MXFP4"


def _kernel(x: Tensor) -> Callable[[Tensor, Tensor, Tensor, Sequence[int], int], Tensor] | None:
    """What multiplies on x's device; None: nothing but plain torch."""
    if x.is_cpu:
        return cpu.linear if cpu.paths() else None
    if x.is_cuda and importlib.util.find_spec("triton"):
        from opd.kernels import triton_fp4  # needs triton and CUDA to be imported

        return triton_fp4.linear
    return None
