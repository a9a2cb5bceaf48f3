"""One denoising step of each family at its real size on a CPU: OpenVINO, quantized or not, beside diffusers eager FP32.

    python benchmarks/family_step.py build/family --family sd14

Takes the checkpoint and the W4A8 package of `family.py` where they are in the folder and makes them where not, and a
package in floating point beside them. Batch 1 with guidance. A full-size denoiser leaves no room for another: each is
timed in a process of its own, one after the other; one that fails, for want of memory, is left out of the table.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from family import GUIDANCE, STEPS, export, make_checkpoint

from sdq_deploy.random_checkpoints import FAMILIES
from sdq_engines.backends.registry import backend
from sdq_engines.bench import Timing, measure
from sdq_engines.build import build_engine
from sdq_engines.package.layout import PROLOGUE
from sdq_engines.package.schema import ShapeProfile
from sdq_engines.package.store import open_package
from sdq_export.provenance import tool_versions
from sdq_export.sampler import compile_sampler
from sdq_export.source import load_source

RUNS = {
    "eager": "diffusers, eager FP32",
    "fp": "OpenVINO, the graph in floating point",
    "w4a8": "OpenVINO, W4A8, INT8 x INT8",
}


def eager_step(model: Path) -> Callable[[], object]:
    """A call of diffusers' own denoiser on 2 latents."""
    source = load_source(model)
    latents = torch.randn(2, *source.family.latent_shape)
    prompts, timestep = source.family.encode_prompts(["a red circle", None]), torch.tensor(500.0)

    def call() -> object:
        with torch.inference_mode():
            return source.family.network.predict(source.denoiser, latents, timestep, prompts)

    return call


def package_step(model: Path, folder: Path, precision: str) -> Callable[[], object]:
    """A step of a package by its OpenVINO engine: what the runtime's loop calls."""
    if not (folder / "manifest.json").is_file():
        export(model, folder, precision, "fp16")
    package = open_package(folder)
    if "openvino" not in package.manifest.engines:
        package = build_engine(package, "openvino", ShapeProfile(batch_max=1))
    source = load_source(model)
    plan = compile_sampler(source.scheduler, STEPS)
    session = backend("openvino").load(package, package.engine("openvino"), {})
    conditioning = source.family.encode_prompts([None, "a red circle"]).numpy()
    wanted = package.manifest.io.prologue_inputs
    prompt = session.component(PROLOGUE).run({name: conditioning[name] for name in wanted})
    latents = np.random.default_rng(0).standard_normal((1, *source.family.latent_shape)).astype(np.float32)
    stepper = session.stepper(latents, GUIDANCE, plan.coefficients[0], prompt)

    def step() -> None:
        stepper.step(0, None)

    return step


def run(what: str, folder: Path, family: str, runs: int) -> None:
    """Time one of RUNS; in a process of its own."""
    model = folder / family
    step = eager_step(model) if what == "eager" else package_step(model, folder / f"{family}-{what}", what)
    timing = measure(step, runs, warm_up=1)
    (folder / f"{family}-step-{what}.json").write_text(json.dumps(asdict(timing)), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", choices=FAMILIES, default="sd14")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", choices=RUNS, help="this one alone, in this process")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.only:
        run(arguments.only, folder, arguments.family, arguments.runs)
        return
    make_checkpoint(folder / arguments.family, arguments.family)
    command = [sys.executable, __file__, *sys.argv[1:], "--only"]
    done = [what for what in RUNS if subprocess.run([*command, what]).returncode == 0]
    found = {what: Timing(**json.loads((folder / f"{arguments.family}-step-{what}.json").read_text())) for what in done}
    for what, step in found.items():
        over = f", {step.median / found['w4a8'].median:5.2f} x" if "w4a8" in found else ""
        print(f"{RUNS[what]:40} {step.median:7.2f} s ({step.best:.2f} to {step.worst:.2f}){over}")
    versions = {"python": platform.python_version()} | tool_versions(("torch", "diffusers", "openvino"))
    print(" · ".join(f"{name} {value}" for name, value in versions.items()))
    if len(done) < len(RUNS):
        raise SystemExit(f"failed: {', '.join(RUNS[what] for what in RUNS if what not in done)}")


if __name__ == "__main__":
    main()
