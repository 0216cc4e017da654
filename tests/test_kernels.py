"""Products with packed FP4 weights: every path of the compiled library, and Triton's, against float64 and the twin."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opd.fp4 import Fp4Experts, NvFp4Tensor, dequantize, quantize, quantize_nv
from opd.kernels import cpu
from opd.kernels.library import operators
from opd.types import Fp4Tensor

PATHS = cpu.paths()
needs_library = pytest.mark.skipif(not PATHS, reason="no C++ compiler, and no library in the cache")

# experts, outputs, inputs, rows of each expert
CASES = [
    (1, 16, 32, (1,)),
    (1, 1, 32, (3,)),
    (1, 37, 96, (5,)),
    (1, 50, 224, (17,)),
    (1, 33, 288, (64,)),
    (1, 19, 64, (131,)),
    (3, 40, 160, (2, 0, 7)),
    (4, 24, 32, (0, 0, 1, 0)),
    (2, 48, 352, (70, 16)),
]


def weight_of(experts: int, outputs: int, inputs: int, kind: str = "mxfp4") -> Fp4Tensor | NvFp4Tensor:
    """Blocks of very different magnitude, as a wrong scale would go unseen among equal ones."""
    generator = torch.Generator().manual_seed(outputs * inputs)
    weight = torch.randn(experts, outputs, inputs, generator=generator)
    steps = torch.randint(-6, 7, (experts, outputs, inputs // 16, 1), generator=generator)
    weight = torch.ldexp(weight.unflatten(-1, (-1, 16)), steps).flatten(-2)
    return quantize(weight) if kind == "mxfp4" else quantize_nv(weight)


def rows_of(sizes: tuple[int, ...], inputs: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(sum(sizes), inputs, generator=generator).to(dtype)


def exact(x: Tensor, weight: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """In float64, each row with its expert's matrix of `weight` [E, N, K]."""
    parts = x.double().split(list(sizes))
    return torch.cat([rows @ matrix.double().T for rows, matrix in zip(parts, weight, strict=True)])


def assert_rounded_as_float32(y: Tensor, x: Tensor, weight: Tensor, sizes: tuple[int, ...]) -> None:
    """Errors are those of adding K products in float32, and of rounding the sum to y's dtype."""
    expected, magnitude = exact(x, weight, sizes), exact(x.abs(), weight.abs(), sizes)
    eps = torch.finfo(torch.float32).eps
    bound = magnitude * eps * x.shape[1] ** 0.5 * 2
    if y.dtype == torch.bfloat16:
        bound = bound + expected.abs() * torch.finfo(torch.bfloat16).eps
    assert y.shape == expected.shape
    assert bool(((y.double() - expected).abs() <= bound).all())


@needs_library
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", PATHS)
def test_every_path_is_the_product_on_ragged_shapes(path: str, dtype: torch.dtype, kind: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for experts, outputs, inputs, sizes in CASES:
            tensor, x = weight_of(experts, outputs, inputs, kind), rows_of(sizes, inputs, dtype)
            packed = Fp4Experts(tensor)
            y = cpu.linear(x, packed.codes, packed.scales, sizes, outputs, path)
            if packed.is_nv:
                y *= packed.matrix_scales.to(dtype).repeat_interleave(torch.tensor(sizes))[:, None]
            assert y.dtype == dtype
            assert_rounded_as_float32(y, x, dequantize(tensor), sizes)
    finally:
        torch.set_num_threads(before)


@needs_library
@pytest.mark.parametrize("path", PATHS)
def test_threads_share_work_that_is_worth_it(path: str) -> None:
    """Large enough that two threads take part, which the small shapes above are not."""
    before = torch.get_num_threads()
    tensor, sizes = weight_of(2, 600, 512), (90, 5)
    packed, x = Fp4Experts(tensor), rows_of(sizes, 512, torch.float32)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(cpu.linear(x, packed.codes, packed.scales, sizes, 600, path))
    finally:
        torch.set_num_threads(before)
    assert_rounded_as_float32(results[0], x, dequantize(tensor), sizes)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", PATHS)
def test_a_row_is_the_same_bits_in_any_batch(path: str, dtype: torch.dtype) -> None:
    packed = Fp4Experts(weight_of(1, 50, 416))
    x = rows_of((71,), 416, dtype)
    alone = torch.cat([cpu.linear(row[None], packed.codes, packed.scales, (1,), 50, path) for row in x])
    for size in (2, 3, 4, 5, 7, 8, 16, 31, 71):
        together = [cpu.linear(rows, packed.codes, packed.scales, (len(rows),), 50, path) for rows in x.split(size)]
        assert torch.equal(torch.cat(together), alone), size


@needs_library
@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize(("lowest", "highest"), [(-3, 3), (-130, -100), (-20, 100), (90, 126)])
def test_a_row_is_the_same_bits_where_sums_overflow_or_vanish(kind: str, lowest: int, highest: int) -> None:
    """Many rows meet weights that their scales have been multiplied into, which few rows do not."""
    generator = torch.Generator().manual_seed(highest)
    steps = torch.randint(lowest, highest, (1, 70, 20, 1), generator=generator)
    weight = torch.ldexp(torch.randn(1, 70, 20, 32, generator=generator).clamp(-3, 3), steps).flatten(-2)
    packed = Fp4Experts(quantize(weight) if kind == "mxfp4" else quantize_nv(weight))
    for low, high in ((-2, 3), (-126, -90), (-100, 1), (0, 127)):
        steps = torch.randint(low, high, (40, 640), generator=generator)
        x = torch.ldexp(torch.randn(40, 640, generator=generator), steps)
        x[3], x[5, 7], x[6, 9] = 0, torch.inf, torch.nan
        for rows in (x.bfloat16(), x[10:].bfloat16(), x):
            together = cpu.linear(rows, packed.codes, packed.scales, (len(rows),), 70)
            alone = [cpu.linear(row[None], packed.codes, packed.scales, (1,), 70) for row in rows]
            assert torch.equal(together.nan_to_num(7), torch.cat(alone).nan_to_num(7))


@needs_library
def test_every_code_and_every_scale_is_decoded() -> None:
    """A unit vector reads one column of the weight, exactly, in every path."""
    codes = torch.arange(32) % 16
    packed_codes = (codes[0::2] | (codes[1::2] << 4)).to(torch.uint8)
    scales = torch.arange(1, 255, dtype=torch.uint8)
    tensor = Fp4Tensor(codes=packed_codes.expand(254, 16).contiguous(), scales=scales[:, None], shape=(254, 32))
    packed, x = Fp4Experts(tensor), torch.eye(32)
    fits = dequantize(tensor, torch.float64).abs() < 2.0**128
    for path in PATHS:
        y = cpu.linear(x, packed.codes, packed.scales, (32,), 254, path).T
        assert torch.equal(y[fits], dequantize(tensor)[fits])


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("outputs", [1, 16, 37])
@pytest.mark.parametrize("inputs", [32, 160])
def test_tiled_bytes_go_back(experts: int, outputs: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (experts, outputs, inputs // 2), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 256, (experts, outputs, inputs // 32), dtype=torch.uint8, generator=generator)
    tiles = -(-outputs // 32)
    tiled_codes, tiled_scales = cpu.tiled(codes, scales)
    assert tiled_codes.shape == (experts, tiles, inputs // 8, 32, 4)
    assert tiled_scales.shape == (experts, tiles, inputs // 32, 32)
    again = cpu.untiled(tiled_codes, tiled_scales, outputs)
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], scales)


@needs_library
def test_large_codes_that_change_pages_keep_their_bytes() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (3, 2048, 1024), dtype=torch.uint8, generator=generator)
    scales = torch.randint(1, 255, (3, 2048, 64), dtype=torch.uint8, generator=generator)
    tiled_codes, tiled_scales = cpu.tiled(codes, scales)
    assert sys.platform != "linux" or tiled_codes.data_ptr() % (2 << 20) == 0  # where a large page can begin
    again = cpu.untiled(tiled_codes, tiled_scales, 2048)
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], scales)


@needs_library
def test_refuses_what_does_not_fit() -> None:
    packed, x = Fp4Experts(weight_of(2, 20, 64)), torch.zeros(5, 64)
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((x[:, :32], packed.codes, packed.scales, (5, 0), 20), "x has 32 inputs, the codes 64"),
        ((x, packed.codes, packed.scales, (5,), 20), "one entry per expert"),
        ((x, packed.codes, packed.scales, (5, 1), 20), "sizes sum to 6, x has 5 rows"),
        ((x, packed.codes, packed.scales, (6, -1), 20), "not be negative"),
        ((x, packed.codes, packed.scales, (5, 0), 33), "33 features do not fill 1 tiles"),
        ((x.double(), packed.codes, packed.scales, (5, 0), 20), "float32 or bfloat16"),
        ((x, packed.codes, packed.scales[:, :, :1].contiguous(), (5, 0), 20), "do not belong"),
        ((x, packed.codes, packed.scales, (5, 0), 20, "avx9"), "path avx9 is not one"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            cpu.linear(*arguments)


@pytest.fixture
def fresh_paths() -> Iterator[None]:
    """`cpu.paths` looks anew, in the test and after it."""
    for found in (cpu.paths, operators):
        found.cache_clear()
    yield
    for found in (cpu.paths, operators):
        found.cache_clear()


@pytest.mark.parametrize("compiler", ["/nowhere/c++", "false"])
def test_without_a_compiler_there_is_one_warning_and_the_twin(
    compiler: str, fresh_paths: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    tensor, sizes = weight_of(2, 24, 64), (3, 2)
    x = rows_of(sizes, 64, torch.float32)
    with caplog.at_level(logging.INFO):
        results = [Fp4Experts(tensor)(x, sizes) for _ in range(2)]
    ours = [record for record in caplog.records if record.name.startswith("opd.kernels")]
    warnings = [record.getMessage() for record in ours if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "plain torch" in warnings[0] and "compiling the CPU kernels failed: " in warnings[0]
    assert cpu.paths() == ()
    for y in results:
        assert_rounded_as_float32(y, x, dequantize(tensor), sizes)
    with pytest.raises(RuntimeError, match="no compiled library"):
        cpu.linear(x, *cpu.tiled(tensor.codes, tensor.scales), sizes, 24)
    assert not list(tmp_path.rglob("*.so"))


@needs_library
def test_a_library_in_the_cache_is_taken_without_a_compiler(
    fresh_paths: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with caplog.at_level(logging.INFO):
        assert cpu.paths() == PATHS
    assert {record.levelno for record in caplog.records} == {logging.INFO}
    assert PATHS[0] in caplog.text


def test_a_cache_that_cannot_be_written_is_no_error(
    fresh_paths: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert cpu.paths() == ()
    assert "plain torch" in caplog.text and str(tmp_path) in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_is_the_product_on_ragged_shapes(dtype: torch.dtype, kind: str) -> None:
    pytest.importorskip("triton")
    for experts, outputs, inputs, sizes in CASES:
        tensor, x = weight_of(experts, outputs, inputs, kind), rows_of(sizes, inputs, dtype)
        y = Fp4Experts(tensor).to("cuda")(x.cuda(), sizes).cpu()
        assert y.dtype == dtype
        assert_rounded_as_float32(y, x, dequantize(tensor), sizes)
