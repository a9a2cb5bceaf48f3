"""Rounding by a number format against other implementations of it."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from sdq_engines.formats import FP8, INT4, INT8
from sdq_export.rounding import as_numpy, code_steps, fake_quantize, round_


def every_code() -> Tensor:
    """The 254 numbers of E4M3FN, ascending; both zeros."""
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return torch.from_numpy(np.sort(codes[np.isfinite(codes)]))


def test_fp8_rounds_as_ml_dtypes_does() -> None:
    torch.manual_seed(0)
    codes = every_code()
    between = (codes[1:] + codes[:-1]) / 2  # ties, also of the subnormal numbers
    near = torch.cat([between, between.nextafter(codes[1:]), between.nextafter(codes[:-1])])
    x = torch.cat([codes, near, torch.randn(20_000) * 100, torch.randn(20_000) / 100])
    clipped = np.clip(x.numpy(), -448, 448)
    wanted = clipped.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.array_equal(round_(x.clone(), FP8).numpy(), wanted)


def test_fp8_clips_what_is_beyond_its_limits() -> None:
    x = torch.tensor([449.0, 465.0, 1e6, -1e30, float("inf")])
    assert round_(x, FP8).tolist() == [448, 448, 448, -448, 448]


def test_fake_quantization_is_the_nearest_number_of_the_format() -> None:
    torch.manual_seed(1)
    x, scale = torch.randn(2000), torch.tensor(0.0137)
    for format, codes in ((FP8, every_code()), (INT4, torch.arange(-8.0, 8.0)), (INT8, torch.arange(-128.0, 128.0))):
        nearest = ((x / scale)[:, None] - codes).abs().amin(dim=1)
        found = fake_quantize(x, scale, format) / scale
        assert torch.allclose((x / scale - found).abs(), nearest, atol=1e-4)


def test_code_steps_count_the_codes_from_zero() -> None:
    codes = every_code()
    positive = codes[codes > 0]
    assert code_steps(positive, FP8).tolist() == list(range(1, 127))
    assert code_steps(-positive, FP8).tolist() == [-step for step in range(1, 127)]
    assert code_steps(torch.tensor([0.0, -0.0]), FP8).tolist() == [0, 0]
    assert code_steps(torch.tensor([-8.0, 7.0]), INT4).tolist() == [-8, 7]


def test_codes_become_arrays_of_their_own_type() -> None:
    codes = every_code().to(torch.float8_e4m3fn)
    array = as_numpy(codes)
    assert array.dtype == ml_dtypes.float8_e4m3fn
    assert np.array_equal(array.astype(np.float32), codes.float().numpy())
    assert as_numpy(torch.tensor([1, -2], dtype=torch.int8)).dtype == np.int8
