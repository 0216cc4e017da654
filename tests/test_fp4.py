"""MXFP4 against a scalar oracle, its tables, its error bounds, and its exactness in FP8."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opd.fp4 import dequantize, fake_quantize, is_fp4_name, lossless_violations, quantize
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
    with pytest.raises(ValueError, match=r"model\.fp4='all'.*experts, none"):
        is_fp4_name("lm_head.weight", (32, 32), "all")
