"""The runtime room and the package commands work where importing the training stack raises, and import lazily."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sdq_engines.package.store import Package

#: Run before anything else in a child: the packages that a base install lacks cannot be imported.
BLOCK = """
import sys
class Blocked:
    names = {"torch", "diffusers", "transformers", "accelerate", "modelopt", "onnxscript"}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ImportError(f"{name} was imported")
sys.meta_path.insert(0, Blocked())
"""


def child(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200"}
    command = [sys.executable, "-c", BLOCK + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return child("from sdq_deploy.cli.main import run; run(sys.argv[1:])", *arguments)


def test_the_block_blocks() -> None:
    assert "torch was imported" in child("import torch").stderr


def test_every_module_of_the_room_imports(tmp_path: Path) -> None:
    code = """
import importlib, pkgutil, sdq_engines
names = [module.name for module in pkgutil.walk_packages(sdq_engines.__path__, "sdq_engines.")]
for name in names:
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", None) or ([] if hasattr(module, "__path__") else ["__all__"]):
        getattr(module, public)
print(len(names))
"""
    result = child(code)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 30


def test_building_and_running_needs_no_training_stack(bare: Package, tmp_path: Path) -> None:
    code = """
from sdq_engines import Pipeline
from sdq_engines.build import build_engine
from sdq_engines.package.store import open_package
for engine in ("onnxruntime", "openvino"):
    build_engine(open_package(sys.argv[1]), engine)
    print(Pipeline.load(sys.argv[1], engine=engine)("a red circle", seed=1).images[0].size)
"""
    result = child(code, str(bare.folder))
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[:2] == ["(64, 64)", "(64, 64)"]


def test_importing_the_package_is_light() -> None:
    code = """
import sdq_engines
heavy = {"numpy", "pydantic", "PIL", "onnx", "onnxruntime", "openvino"}
print(sorted(heavy & set(sys.modules)))
"""
    result = child(code)
    assert result.stdout.strip() == "[]", result.stderr


def test_each_backend_is_imported_only_when_asked(built: Callable[[str], Package]) -> None:
    code = """
from sdq_engines import Pipeline
Pipeline.load(sys.argv[1], engine=sys.argv[2])("red star", seed=0)
print(sorted({"onnxruntime", "openvino", "tensorrt_rtx", "onnx", "onnx_ir", "polygraphy"} & set(sys.modules)))
"""
    for engine in ("onnxruntime", "openvino"):
        result = child(code, str(built("w4a8").folder), engine)
        assert result.stdout.strip() == f"['{engine}']", result.stderr


def test_openvino_does_not_report_home(built: Callable[[str], Package]) -> None:
    """Left alone, `import openvino` starts a process that sends the import to an analytics service."""
    code = """
from sdq_engines import Pipeline
Pipeline.load(sys.argv[1], engine="openvino")("red star", seed=0)
print(sys.modules["openvino_telemetry"], "openvino_telemetry.main" in sys.modules)
import multiprocessing; print(multiprocessing.active_children())
"""
    result = child(code, str(built("w4a8").folder))
    assert result.stdout.splitlines() == ["None False", "[]"], result.stderr


def test_run_writes_a_png(built: Callable[[str], Package], tmp_path: Path) -> None:
    out = tmp_path / "new" / "image.png"
    result = command("run", str(built("w4a8").folder), "a red circle", "--seed", "7", "--out", str(out), "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["seeds"] == [7]
    assert report["images"] == [str(out)]
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["run", "build", "inspect", "verify", "doctor", "bench"])
def test_help_has_an_example(name: str) -> None:
    result = command(name, "--help")
    assert result.returncode == 0, result.stderr
    assert f"sdq-deploy {name}" in result.stdout


def test_doctor_inspect_and_verify_speak_json(built: Callable[[str], Package]) -> None:
    folder = str(built("w4a8").folder)
    doctor = json.loads(command("doctor", "--json").stdout)
    assert doctor["engines"]["openvino"]["works"]
    assert doctor["auto"] in doctor["engines"]
    inspect = json.loads(command("inspect", folder, "--json").stdout)
    assert inspect["engines"]["openvino"]["kernels"]["int8"] == 6
    assert inspect["bytes"]["total"] == sum(entry.size for entry in built("w4a8").manifest.files.values())
    assert json.loads(command("verify", folder, "--json").stdout)["ok"]
