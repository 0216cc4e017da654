"""Both FP4 formats against scalar oracles, their tables, bounds and exactness; modules that hold packed bytes only."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from opd.fp4 import (
    FakeFp4Linear,
    Fp4Experts,
    Fp4Linear,
    NvFp4Tensor,
    dequantize,
    fake_quantize,
    fake_quantize_linears,
    fp4_names,
    is_fp4_name,
    lossless_violations,
    pack_weights,
    packed_weights,
    quantize,
    quantize_nv,
)
from opd.kernels import cpu
from opd.types import Fp4Tensor
from tests import oracles


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit, which tells -0.0 from 0.0."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(integer), b.view(integer))


def hard_weights(seed: int = 0) -> Tensor:
    """[24, 96] float32: blocks of every size from subnormal to the largest, ties, zeros and signs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(24, 96, generator=generator)
    exponents = torch.linspace(-140, 122, 24 * 3).round().reshape(24, 3, 1)
    weight = torch.ldexp(weight.reshape(24, 3, 32).double(), exponents.int()).float().reshape(24, 96)
    weight[0, :32] = 0.0
    weight[1, :32] = -0.0
    weight[2, :32] = 1.74 * 2.0**127  # from 1.75 on, float32 values round to 2**128
    weight[3, :32] = torch.randint(-24, 25, (32,), generator=generator) / 4  # multiples of 1/4 up to 6: many ties
    weight[3, 0] = 6.0
    weight[4, :32] = 1e-45  # the smallest subnormal
    return weight


def grid_tensor(scale_bytes: Tensor) -> Fp4Tensor:
    """A weight whose blocks hold all 16 codes twice, with the scale bytes [..., K/32]."""
    codes = torch.arange(32) % 16
    packed = (codes[0::2] | (codes[1::2] << 4)).to(torch.uint8)
    *leading, num_blocks = scale_bytes.shape
    return Fp4Tensor(
        codes=packed.expand(*leading, num_blocks, 16).reshape(*leading, num_blocks * 16).contiguous(),
        scales=scale_bytes.to(torch.uint8),
        shape=(*leading, num_blocks * 32),
    )


def through_fp8(tensor: Fp4Tensor) -> Tensor:
    """The values of one 128x128 tile after E4M3 with one scale, 2**-6 of the tile's largest."""
    scale = 2.0 ** (int(tensor.scales.max()) - 127 - 6)
    values = dequantize(tensor, torch.float64)
    return (values / scale).float().to(torch.float8_e4m3fn).double() * scale


def test_matches_the_oracle_bit_for_bit() -> None:
    for seed in range(3):
        weight = hard_weights(seed)
        codes, scales, values = oracles.fp4_quantize(weight)
        result = quantize(weight)
        assert torch.equal(result.codes, codes)
        assert torch.equal(result.scales, scales)
        assert result.shape == (24, 96)
        assert same_bits(dequantize(result, torch.float64), values)


def test_code_table_and_nibble_order() -> None:
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    weight = torch.tensor(values + [-value for value in values] + [0.0] * 16)
    result = quantize(weight)
    assert result.scales.tolist() == [127]
    assert result.codes.tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] + [0] * 8
    assert same_bits(dequantize(result), weight)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_ties_go_to_even(sign: float) -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    even = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    above = torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    below = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0])
    infinity = torch.tensor(torch.inf)
    for inputs, expected in (
        (ties, even),
        (torch.nextafter(ties, infinity), above),
        (torch.nextafter(ties, -infinity), below),
    ):
        block = torch.zeros(32)
        block[0] = 6.0  # fixes the scale at 1
        block[1:8] = sign * inputs
        assert same_bits(fake_quantize(block)[1:8], sign * expected)
        assert same_bits(dequantize(quantize(block))[1:8], sign * expected)


def test_scale_is_the_fp32_division_rounded_up_to_a_power_of_two() -> None:
    mantissas = torch.tensor([0, 1, 2, 0x3FFFFE, 0x3FFFFF, 0x400000, 0x400001, 0x400002, 0x7FFFFE, 0x7FFFFF])
    bits = ((torch.arange(1, 255)[:, None] << 23) | mantissas).flatten().int()
    amax = bits.view(torch.float32)
    block = torch.zeros(len(amax), 32)
    block[:, 5] = -amax
    quotient = (amax.clamp(min=6 * 2.0**-126) / 6).view(torch.int32)
    expected = (quotient >> 23) + ((quotient & 0x7FFFFF) != 0)
    assert torch.equal(quantize(block).scales[:, 0].int(), expected)


def test_zero_and_tiny_blocks_have_scale_byte_1() -> None:
    weight = torch.zeros(3, 32)
    weight[1] = 2.0**-140
    weight[2, 0] = 6 * 2.0**-126
    result = quantize(weight)
    assert result.scales.tolist() == [[1], [1], [1]]
    assert result.codes[:2].count_nonzero() == 0


def test_scaled_amax_and_error_bounds() -> None:
    weight = torch.randn(256, 64, generator=torch.Generator().manual_seed(1))
    result = quantize(weight)
    scale = torch.exp2(result.scales.double() - 127)[..., None]
    scaled = weight.double().reshape(256, 2, 32) / scale
    amax = scaled.abs().amax(dim=-1)
    assert bool((amax > 3).all())
    assert bool((amax <= 6).all())
    error = (dequantize(result, torch.float64).reshape(256, 2, 32) / scale - scaled).abs()
    magnitude = scaled.abs()
    for low, high, bound in ((0.0, 2.0, 0.25), (2.0, 4.0, 0.5), (4.0, 6.0, 1.0)):
        here = error[(magnitude >= low) & (magnitude <= high)]
        assert bound * 0.9 < here.max() <= bound
    relative_rms = (error * scale).square().mean().sqrt() / weight.double().square().mean().sqrt()
    assert relative_rms == pytest.approx(0.1154, abs=0.002)


def test_idempotent_in_value() -> None:
    once = dequantize(quantize(hard_weights()))
    assert same_bits(dequantize(quantize(once)), once)
    assert same_bits(fake_quantize(once), once)
    # A block whose largest element became 3 is stored again with half the scale.
    block = torch.zeros(32)
    block[0] = 3.2
    first = quantize(block)
    second = quantize(dequantize(first))
    assert int(first.scales[0]) - int(second.scales[0]) == 1


def test_scaling_by_a_power_of_two_moves_only_the_scale() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    plain, scaled = quantize(weight), quantize(weight * 2.0**-20)
    assert torch.equal(plain.codes, scaled.codes)
    assert torch.equal(plain.scales.int() - 20, scaled.scales.int())


@pytest.mark.parametrize("shape", [(32,), (0, 64), (3, 0), (5, 96), (2, 3, 64), (2, 1, 3, 32)])
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    result = quantize(weight)
    assert result.codes.shape == (*shape[:-1], shape[-1] // 2)
    assert result.scales.shape == (*shape[:-1], shape[-1] // 32)
    assert dequantize(result).shape == shape
    assert same_bits(fake_quantize(weight), dequantize(result))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fake_quantize_is_dequantize_of_quantize(dtype: torch.dtype) -> None:
    weight = hard_weights().to(dtype)
    for given in (weight, weight.reshape(3, 8, 96).transpose(0, 1), weight.reshape(96, 24).T):
        expected = dequantize(quantize(given), dtype)
        assert same_bits(fake_quantize(given), expected)
        assert torch.equal(expected.double(), dequantize(quantize(given), torch.float64))


def test_gradient_passes_unchanged() -> None:
    generator = torch.Generator().manual_seed(4)
    for dtype in (torch.float32, torch.bfloat16):
        master = torch.randn(16, 64, generator=generator).to(dtype).requires_grad_()
        inputs = torch.randn(7, 64, generator=generator).to(dtype)
        plain = dequantize(quantize(master), dtype).requires_grad_()
        (inputs @ fake_quantize(master).T).square().sum().backward()
        (inputs @ plain.T).square().sum().backward()
        assert master.grad is not None
        assert plain.grad is not None
        assert same_bits(master.grad, plain.grad)
        assert master.grad.count_nonzero() > 0


def test_fake_quantize_shows_what_is_not_finite_as_nan() -> None:
    weight = torch.ones(3, 32)
    weight[0, 3], weight[1, 4] = torch.nan, torch.inf
    result = fake_quantize(weight)
    assert bool(result[0, 3].isnan())
    assert bool(result[1, 4].isnan())
    assert torch.equal(result[2], weight[2])


@pytest.mark.parametrize("span", [0, 11, 14, 15])
def test_fp8_holds_a_tile_exactly_up_to_span_14(span: int) -> None:
    scales = torch.full((128, 4), 120)
    scales[77, 2] -= span
    tensor = grid_tensor(scales)
    exact = torch.equal(through_fp8(tensor), dequantize(tensor, torch.float64))
    assert exact == (span <= 14)
    assert lossless_violations(tensor) == (0 if exact else 1)


def test_lossless_violations_counts_tiles() -> None:
    scales = torch.full((2, 300, 9), 100)  # tiles of 3 x 3 in each of two matrices, the last ones cut
    assert lossless_violations(grid_tensor(scales)) == 0
    scales[0, 299, 8] = 115  # a cut corner tile
    scales[1, 5, 0] = 116
    scales[1, 127, 3] = 85  # the same tile again
    scales[1, 128, 3] = 114  # the next tile down, still exact
    assert lossless_violations(grid_tensor(scales)) == 2
    assert lossless_violations(grid_tensor(torch.tensor([100, 115]))) == 1  # a vector is one row


def test_lossless_violations_leaves_out_blocks_of_zeros() -> None:
    weight = torch.randn(128, 128, generator=torch.Generator().manual_seed(5))
    weight[3, 32:64] = 0.0
    weight[4, 32:64] = -0.0
    assert lossless_violations(quantize(weight)) == 0
    assert lossless_violations(quantize(torch.zeros(128, 128))) == 0
    weight[3, 40] = 1e-20
    assert lossless_violations(quantize(weight)) == 1


def test_the_largest_float32_rounds_to_a_power_that_float64_holds() -> None:
    weight = torch.full((32,), torch.finfo(torch.float32).max)
    assert dequantize(quantize(weight), torch.float64).unique().tolist() == [2.0**128]
    assert same_bits(fake_quantize(weight), dequantize(quantize(weight)))


def test_special_scale_bytes_are_decoded() -> None:
    tensor = grid_tensor(torch.tensor([[0, 1, 254, 255]]))
    values = dequantize(tensor).reshape(4, 32)
    assert values[0, 1] == 2.0**-128
    assert values[1, 2] == 2.0**-126
    assert values[2, 3] == 1.5 * 2.0**127
    assert bool(values[3].isnan().all())


def test_refuses_what_it_cannot_hold() -> None:
    for function in (quantize, fake_quantize):
        with pytest.raises(ValueError, match=r"\(4, 48\).*multiple of 32"):
            function(torch.zeros(4, 48))
        with pytest.raises(ValueError, match=r"torch\.float16.*float32, bfloat16, float64"):
            function(torch.zeros(4, 32, dtype=torch.float16))
        with pytest.raises(ValueError, match="multiple of 32"):
            function(torch.tensor(1.0))
    weight = torch.zeros(2, 4, 32)
    weight[1, 2, 7], weight[1, 3, 0] = torch.nan, torch.inf
    with pytest.raises(ValueError, match=r"2 values that are not finite.*nan at \(1, 2, 7\)"):
        quantize(weight)
    with pytest.raises(ValueError, match="1 values that are not finite"):
        quantize(torch.full((1, 32), 1.0, dtype=torch.float64).index_fill(1, torch.tensor([9]), 1e39))
    with pytest.raises(ValueError, match=r"torch\.float16"):
        dequantize(quantize(torch.zeros(32)), torch.float16)


def test_which_names_are_fp4() -> None:
    experts = "model.layers.3.mlp.experts."
    for name in ("gate_up_proj", "down_proj"):
        assert is_fp4_name(experts + name, (8, 256, 128), "experts")
        assert not is_fp4_name(experts + name, (8, 256, 128), "none")
        with pytest.raises(ValueError, match=rf"experts.{name} has shape \(8, 256, 100\)"):
            is_fp4_name(experts + name, (8, 256, 100), "experts")
    for name in ("mlp.shared_experts.down_proj", "mlp.experts.gate_up_proj_bias", "self_attn.o_proj.weight"):
        assert not is_fp4_name("model.layers.3." + name, (256, 100), "experts")
    with pytest.raises(ValueError, match=r"model\.fp4='all'.*experts, linears, none"):
        is_fp4_name("lm_head.weight", (32, 32), "all")


def test_which_linears_are_fp4() -> None:
    for name in ("model.layers.0.self_attn.q_proj.weight", "transformer.h.11.mlp.dense.weight", "layers.3.fc1.weight"):
        assert is_fp4_name(name, (64, 32), "linears")
        assert not is_fp4_name(name, (64, 32), "experts")
        with pytest.raises(ValueError, match=rf"{name} has shape \(64, 40\); with model.fp4=linears"):
            is_fp4_name(name, (64, 40), "linears")
    for name, shape in (
        ("model.embed_tokens.weight", (64, 32)),
        ("lm_head.weight", (64, 32)),
        ("model.layers.0.input_layernorm.weight", (32,)),
        ("model.layers.0.self_attn.q_norm.weight", (64, 32)),
        ("model.layers.0.self_attn.q_proj.bias", (64,)),
        ("model.layers.0.mlp.gate.weight", (128, 40)),  # a router; gate_proj is a linear map
        ("model.layers.0.mlp.small.weight", (31, 40)),
        ("model.layers.0.mlp.experts.gate_up_proj", (8, 64, 32)),
    ):
        assert not is_fp4_name(name, shape, "linears")
    assert is_fp4_name("model.layers.0.mlp.gate_proj.weight", (64, 32), "linears")


# ---- NVFP4 -----------------------------------------------------------------------------------------------------------

E4M3_NORMALS = [2.0**exponent * (8 + mantissa) / 8 for exponent in range(-6, 9) for mantissa in range(8)][:-1]


def float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


def nv_matrix(weight: Tensor) -> tuple[list[int], list[int], float]:
    """Codes and scale bytes in a row, and the matrix's scale, one scalar at a time."""
    exponent = -119
    while 2688.0 * 2.0**exponent < weight.abs().max().item():
        exponent += 1
    codes, scale_bytes = [], []
    for block in weight.reshape(-1, 16).tolist():
        wanted = float32(max(abs(value) for value in block) / 6) / 2.0**exponent
        index = next(i for i, scale in enumerate(E4M3_NORMALS) if scale >= wanted)
        scale_bytes.append(index + 8)
        for value in block:
            scaled = float32(abs(value) / (E4M3_NORMALS[index] * 2.0**exponent))
            code = min(range(8), key=lambda c: (abs(oracles.FP4_GRID[c] - scaled), c % 2))
            codes.append(code + (8 if math.copysign(1.0, value) < 0 else 0))
    return codes, scale_bytes, 2.0**exponent


def nv_weights(seed: int = 0) -> Tensor:
    """[3, 8, 96] float32 of magnitudes far apart: between matrices, and between blocks of one."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 8, 6, 16, generator=generator)
    weight = torch.ldexp(weight, torch.randint(-16, 3, (3, 8, 6, 1), generator=generator))
    weight = torch.ldexp(weight, torch.tensor([-90, 0, 100]).reshape(3, 1, 1, 1)).reshape(3, 8, 96)
    weight[1, 0, :16] = 0.0
    weight[1, 1, :16] = torch.arange(16) / 4  # many ties
    weight[1, 2, :16] = -0.0
    return weight


def test_nvfp4_matches_the_oracle() -> None:
    for seed in range(3):
        weight = nv_weights(seed)
        result = quantize_nv(weight)
        for matrix in range(3):
            codes, scale_bytes, matrix_scale = nv_matrix(weight[matrix])
            unpacked = torch.stack((result.codes[matrix] & 15, result.codes[matrix] >> 4), -1)
            assert unpacked.flatten().tolist() == codes
            assert result.scales[matrix].flatten().tolist() == scale_bytes
            assert result.matrix_scales[matrix].item() == matrix_scale
            scales = torch.tensor([E4M3_NORMALS[byte - 8] for byte in scale_bytes], dtype=torch.float64)
            grid = torch.tensor(oracles.FP4_GRID + tuple(-value for value in oracles.FP4_GRID), dtype=torch.float64)
            values = (grid[codes].reshape(-1, 16) * scales[:, None] * matrix_scale).reshape(8, 96)
            assert same_bits(dequantize(result, torch.float64)[matrix], values)


def test_nvfp4_is_exact_in_bfloat16_idempotent_and_never_saturates() -> None:
    for weight in (nv_weights(5), torch.randn(64, 48, generator=torch.Generator().manual_seed(1))):
        result = quantize_nv(weight)
        values = dequantize(result, torch.float64)
        assert torch.equal(dequantize(result, torch.bfloat16).double(), values)
        again = quantize_nv(dequantize(result))
        assert same_bits(dequantize(again), dequantize(result))
        blocks, rounded = weight.double().unflatten(-1, (-1, 16)), values.unflatten(-1, (-1, 16))
        saturated = rounded.abs().amax(-1) < blocks.abs().amax(-1) * (1 - 2.0**-23)
        assert not bool((saturated & (result.scales > 8)).any())  # at the smallest scale the largest element may be < 5


@pytest.mark.parametrize("shape", [(16,), (0, 64), (3, 0), (5, 48), (2, 3, 64), (2, 1, 3, 16)])
def test_nvfp4_of_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        result = quantize_nv(weight.to(dtype))
        assert result.scales.shape == (*shape[:-1], shape[-1] // 16)
        assert result.matrix_scales.shape == shape[:-2]
        assert dequantize(result).shape == shape
        assert same_bits(fake_quantize(weight.to(dtype), "nvfp4"), dequantize(result, dtype))


def test_nvfp4_gradient_passes_and_refusals_name_the_format() -> None:
    master = torch.randn(16, 64, generator=torch.Generator().manual_seed(4)).requires_grad_()
    fake_quantize(master, "nvfp4").square().sum().backward()
    assert master.grad is not None
    assert torch.equal(master.grad, 2 * fake_quantize(master.detach(), "nvfp4"))
    with pytest.raises(ValueError, match=r"\(4, 24\); NVFP4.*multiple of 16"):
        quantize_nv(torch.zeros(4, 24))
    with pytest.raises(ValueError, match="NVFP4 holds finite values only"):
        quantize_nv(torch.full((2, 16), torch.inf))


def test_nvfp4_is_closer_than_mxfp4() -> None:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(6))
    errors = [
        (dequantize(rounded) - weight).square().mean().sqrt() for rounded in (quantize_nv(weight), quantize(weight))
    ]
    assert errors[0] < 0.9 * errors[1]


# ---- modules that hold packed bytes ----------------------------------------------------------------------------------


def close(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("quantizer", [quantize, quantize_nv])
@pytest.mark.parametrize("with_library", [True, False])
def test_experts_multiply_by_their_dequantised_weight(
    quantizer: Any, with_library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_library:
        monkeypatch.setattr(cpu, "paths", lambda: ())
    generator = torch.Generator().manual_seed(0)
    tensor = quantizer(torch.randn(3, 40, 96, generator=generator))
    experts, x, sizes = Fp4Experts(tensor), torch.randn(9, 96, generator=generator), (4, 0, 5)
    weight = dequantize(tensor)
    assert close(experts(x, sizes), torch.cat((x[:4] @ weight[0].T, x[4:] @ weight[2].T)))
    assert close(experts(x.double(), sizes), torch.cat((x[:4] @ weight[0].T, x[4:] @ weight[2].T)).double())
    assert experts(x[:0], (0, 0, 0)).shape == (0, 40)
    assert experts(x[:0].double(), (0, 0, 0)).shape == (0, 40)
    narrow = experts(x.half(), sizes)
    assert narrow.dtype == torch.float16
    assert torch.allclose(narrow.float(), experts(x, sizes), rtol=1e-2, atol=0.1)


@pytest.mark.parametrize("quantizer", [quantize, quantize_nv])
@pytest.mark.parametrize("shape", [(2, 20, 64), (20, 64)])
def test_packed_bytes_are_all_there_is_and_come_back(quantizer: Any, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (quantizer(torch.randn(shape, generator=generator)) for _ in range(2))
    experts = Fp4Experts(first)
    assert not list(experts.parameters()) and not experts.state_dict()
    floats = [buffer for buffer in experts.buffers() if buffer.dtype.is_floating_point]
    assert sum(buffer.numel() for buffer in floats) <= math.prod(shape[:-2])
    for tensor in (first, second):
        experts.load(tensor)
        again = experts.packed()
        assert type(again) is type(tensor) and again.shape == shape
        assert torch.equal(again.codes, tensor.codes) and torch.equal(again.scales, tensor.scales)
        assert same_bits(dequantize(again), dequantize(tensor))
    moved = copy.deepcopy(experts).to(torch.bfloat16)
    assert same_bits(dequantize(moved.packed()), dequantize(second))


def test_packed_weights_take_less_than_a_third_of_bfloat16() -> None:
    linear = Fp4Linear(quantize(torch.randn(256, 128)))
    assert 256 * 128 * 2 / sum(buffer.nbytes for buffer in linear.buffers()) == pytest.approx(
        4 / (1 + 1 / 16), rel=1e-3
    )


def test_a_packed_linear_takes_inputs_of_any_leading_shape() -> None:
    linear = Fp4Linear(quantize(torch.randn(40, 64)), bias=torch.randn(40))
    x = torch.randn(2, 3, 64)
    y = linear(x.reshape(6, 64))
    assert torch.equal(linear(x), y.view(2, 3, 40))
    torch.testing.assert_close(linear(x[0, 0]), y[0])
    assert linear(x[:, :0]).shape == (2, 0, 40)


def test_packed_modules_refuse() -> None:
    tensor = quantize(torch.randn(2, 20, 64))
    experts = Fp4Experts(tensor)
    with pytest.raises(
        ValueError, match=r"MXFP4 of shape \(20, 64\) cannot take the place of MXFP4 of shape \(2, 20, 64\)"
    ):
        experts.load(quantize(torch.randn(20, 64)))
    with pytest.raises(ValueError, match="NVFP4 of shape"):
        experts.load(quantize_nv(torch.randn(2, 20, 64)))
    for byte in (0, 255):
        scales = tensor.scales.clone()
        scales[1, 3, 1] = byte
        with pytest.raises(ValueError, match=r"products are made with 1 to 254"):
            experts.load(Fp4Tensor(codes=tensor.codes, scales=scales, shape=tensor.shape))
    nv = quantize_nv(torch.randn(2, 16))
    negative = NvFp4Tensor(codes=nv.codes, scales=nv.scales | 128, matrix_scales=nv.matrix_scales, shape=nv.shape)
    with pytest.raises(ValueError, match="products are made with 0 to 126"):
        Fp4Linear(negative)
    with pytest.raises(ValueError, match=r"\(5, 64\) in 2 segments of 6 rows"):
        experts(torch.zeros(5, 64), (5, 1))
    with pytest.raises(ValueError, match="no gradient"):
        experts(torch.zeros(5, 64, requires_grad=True), (5, 0))
    with pytest.raises(ValueError, match="expected outputs, inputs"):
        Fp4Linear(tensor)
    for shape in ((32,), (3, 0, 32), (3, 0)):
        with pytest.raises(ValueError, match=r"expected \[experts,\] outputs, inputs"):
            Fp4Experts(quantize(torch.zeros(shape)))
    assert same_bits(dequantize(experts.packed()), dequantize(tensor))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(32, 64)
        self.down_proj = nn.Linear(64, 32, bias=False)
        self.gate = nn.Linear(32, 40, bias=False)
        self.norm = nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(functional.silu(self.up_proj(self.norm(x)))) + self.gate(x).sum(-1, keepdim=True)


class Stack(nn.Module):
    def __init__(self, block: type[nn.Module] = Block) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 32)
        self.layers = nn.ModuleList(block() for _ in range(2))
        self.lm_head = nn.Linear(32, 50, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def test_learner_and_worker_of_a_dense_model_hold_the_same_linears() -> None:
    ids = torch.arange(12).reshape(2, 6)
    plain, learner, worker = Stack(), Stack(), Stack()
    fake_quantize_linears(learner)
    pack_weights(worker, "linears")
    names = {f"layers.{layer}.{name}.weight" for layer in range(2) for name in ("up_proj", "down_proj")}
    assert fp4_names(plain, "linears") == names
    assert packed_weights(worker).keys() == names
    assert learner.state_dict().keys() == plain.state_dict().keys()
    assert worker.state_dict().keys() == plain.state_dict().keys() - names
    assert sum(isinstance(module, FakeFp4Linear) for module in learner.modules()) == 4
    assert fp4_names(learner, "linears") == names
    with torch.no_grad():
        for name in names:
            plain.get_parameter(name).copy_(fake_quantize(plain.get_parameter(name)))
        assert torch.equal(learner(ids), plain(ids))
        assert close(worker(ids), plain(ids))
    learner(ids).square().sum().backward()
    for name in names:
        assert learner.get_parameter(name).grad is not None
    pack_weights(learner, "linears")  # a learner's model packs alike
    with torch.no_grad():
        assert torch.equal(learner(ids), worker(ids))


def test_linears_that_are_no_linear_maps_are_refused() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(32, 64))

    class Strange(Block):
        def __init__(self) -> None:
            super().__init__()
            self.c_attn = Turned()

    for function in (fake_quantize_linears, lambda model: pack_weights(model, "linears")):
        with pytest.raises(ValueError, match=r"layers.0.c_attn.weight belongs to a Turned; with model.fp4=linears"):
            function(Stack(Strange))
