"""Models that many tests share: a tiny Stable Diffusion with seeded random weights, in diffusers' layout."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Two cores: a pool of threads per worker only makes them wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a complete Stable Diffusion checkpoint with few, random parameters: 8x8 latents, 64x64 pixels."""
    from tests.tiny import write_tiny_sd

    return write_tiny_sd(tmp_path_factory.mktemp("tiny_sd"))
