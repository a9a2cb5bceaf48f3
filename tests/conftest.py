"""Models that many tests share: a tiny Stable Diffusion with seeded random weights, in diffusers' layout."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

# Two cores: a pool of threads per worker only makes them wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# One cache for the whole run, its workers and the commands that they start: most of what an export of a tiny model
# takes is tracing, and the same graphs are wanted again and again.
if "SDQ_CACHE_DIR" not in os.environ:
    os.environ["SDQ_CACHE_DIR"] = _CACHE = tempfile.mkdtemp(prefix="sdq-tests-")
else:
    _CACHE = None

# A shell without job control starts background commands with SIGINT ignored, and what the tests interrupt inherits it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure() -> None:
    """Workers found the cache in their environment; who made it removes it."""
    if _CACHE is not None:
        shutil.rmtree(_CACHE, ignore_errors=True)


#: What a file imports, or a test asks for, that exports, builds or trains a model.
_EXPORTS = {
    *(
        "export_package",
        "export_run",
        "export_model",
        "build_engine",
        "run_training",
        "train",
        "start_worker",
        "run_workers",
        "launch_nodes",
    ),
    *("run_method", "run_evaluate", "built", "copy", "full", "finished_run", "float_package", "quantized_package"),
    *("other_family", "captured", "captured_denoiser", "checkpoint"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what exports; and files with slow tests first.

    Workers take whole files, and one that is left for the end keeps all waiting.
    """
    for item in items:
        if _EXPORTS & ({*vars(getattr(item, "module", None)), *getattr(item, "fixturenames", ())}):
            item.add_marker("export")
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny checkpoint by its name in `tests.tiny.WRITERS`, not to be changed.

    One folder a session, for an export keeps its captures by the folder, and tracing is what most tests' time goes to.
    """
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        from tests.tiny import WRITERS

        if name not in made:
            made[name] = WRITERS[name](tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture(scope="session")
def tiny_sd(tiny: Callable[[str], Path]) -> Path:
    """Folder of a complete Stable Diffusion checkpoint with few, random parameters: 8x8 latents, 64x64 pixels."""
    return tiny("sd")
