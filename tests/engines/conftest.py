"""Packages that are made once a session; a test that changes one takes a copy."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sdq_engines.build import build_engine
from sdq_engines.package.store import Package, open_package
from tests.engines.graphs import TinyShape
from tests.engines.packages import make_package

SHAPES = {
    "w8a8": TinyShape(precision="w8a8"),
    "w4a8": TinyShape(precision="w4a8"),
    "w4a16": TinyShape(precision="w4a16", stochastic=True, history=0),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDQ_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Package]:
    """The package of a precision with the engines onnxruntime and openvino; do not change it."""
    made: dict[str, Package] = {}

    def get(precision: str) -> Package:
        if precision not in made:
            package = make_package(tmp_path_factory.mktemp(precision) / "package", SHAPES[precision])
            for engine in ("onnxruntime", "openvino"):
                package = build_engine(package, engine)
            made[precision] = package
        return made[precision]

    return get


@pytest.fixture(scope="session")
def full(tmp_path_factory: pytest.TempPathFactory) -> Package:
    """Stochastic, with history and a VAE encoder, built for both CPU engines; do not change it."""
    shape = TinyShape(precision="w8a8", stochastic=True, encoder=True)
    package = make_package(tmp_path_factory.mktemp("full") / "package", shape)
    for engine in ("onnxruntime", "openvino"):
        package = build_engine(package, engine)
    return package


@pytest.fixture
def bare(tmp_path: Path) -> Package:
    """A fresh package without engines, to be changed."""
    return make_package(tmp_path / "package", SHAPES["w4a8"])


@pytest.fixture
def copy(built: Callable[[str], Package], tmp_path: Path) -> Package:
    """A fresh copy of the built w4a8 package, to be changed."""
    folder = tmp_path / "copy"
    shutil.copytree(built("w4a8").folder, folder)
    return open_package(folder)
