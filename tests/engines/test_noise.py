"""Same seed, same noise as torch's CPU generator, draw after draw."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sdq_engines.runtime.noise import NoiseStream

#: Sizes below 16 (the scalar form), multiples of 16, and sizes with a tail, mixed so that each continues the last.
SHAPES = [
    (4, 8, 8),
    (5,),
    (3,),
    (1, 3, 7),
    (17,),
    (16,),
    (1,),
    (33,),
    (2,),
    (15,),
    (4, 64, 64),
    (1000,),
    (7,),
    (4, 8, 8),
]


@pytest.mark.parametrize("seed", [0, 7, 123456789, 2**32 - 1, 2**40 + 5, 2**64 - 1, -1, -3])
def test_stream_equals_torch(seed: int) -> None:
    generator, stream = torch.Generator("cpu").manual_seed(seed), NoiseStream(seed)
    for shape in SHAPES:
        wanted = torch.randn(shape, generator=generator).numpy()
        np.testing.assert_allclose(stream.normal(shape), wanted, atol=2e-6, rtol=0, err_msg=str(shape))


def test_batched_and_single_draws_differ_as_in_torch() -> None:
    """diffusers draws one image per generator; [2, 20] from one stream is not twice [20]."""
    generator, stream = torch.Generator().manual_seed(3), NoiseStream(3)
    np.testing.assert_allclose(stream.normal((2, 20)), torch.randn((2, 20), generator=generator).numpy(), atol=2e-6)
    twice = NoiseStream(3)
    assert not np.allclose(np.stack([twice.normal((20,)) for _ in range(2)]), NoiseStream(3).normal((2, 20)), atol=1e-3)


def test_a_seed_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="seed"):
        NoiseStream(2**64)
