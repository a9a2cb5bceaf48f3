"""One denoising step of an SD v1-4-shaped denoiser at half width, every way to run it on a CPU, in one run.

    python benchmarks/half_width.py build/half-width

Makes the checkpoint (220 M parameters, random weights), takes it the whole road by the commands that a user types (W8A8
with per-step scales, W8A8 with one constant scale, unquantized FP32), and times a step on 32x32 latents with guidance
(batch 2) on OpenVINO, beside diffusers eager FP32 and, where `nncf` is installed, NNCF's post-training INT8 of the same
FP32 graph. What exists in the folder is kept, so a second call only measures.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdq_deploy.random_checkpoints import write_sd14
from sdq_engines import Pipeline
from sdq_engines.bench import component_calls
from sdq_engines.package.layout import DENOISER
from sdq_export.provenance import tool_versions

STEPS = 20
LATENT_SIZE = 32
TRAIN = {
    "sampling.guidance_scale": 7.5,
    "collect.num_prompts": 3,
    "collect.validation_prompts": 1,
    "collect.steps_per_prompt": 8,
    "collect.prompts_per_shard": 3,
    "calibrate.samples_per_step": 1,
    "sensitivity.samples": 1,
    "fit.mixed_precision": '"no"',
    "fit.ild_weight": 0,
}


def prepare(folder: Path, width: float) -> dict[str, float]:
    """Make checkpoint, runs and packages that are not there yet; returns the seconds of each command that ran."""
    model, prompts = folder / "model", folder / "prompts.txt"
    if not (model / "model_index.json").is_file():
        write_sd14(model, width=width, latent_size=LATENT_SIZE)
    if not prompts.is_file():
        prompts.write_text("a red circle\na blue square\na green star\na white ring\n", encoding="utf-8")
    seconds: dict[str, float] = {}
    for name, groups in (("per-step", 0), ("constant", 1)):
        settings = [
            w for key, value in {**TRAIN, "quantization.groups": groups}.items() for w in ("--set", f"{key}={value}")
        ]
        train = ["train", str(model), "--out", str(folder / f"run-{name}"), "--prompts", str(prompts)]
        train += ["--recipe", "sd", "--precision", "w8a8", "--scheduler", "ddim", "--max-train-steps", "0", *settings]
        train += ["--num-inference-steps", str(STEPS)]
        if name == "constant":
            train += ["--dataset", str(folder / "run-per-step")]
        train += ["--resume"] if (folder / f"run-{name}" / "run.json").is_file() else []
        _once(seconds, f"train {name}", folder / f"run-{name}" / "checkpoint", train)
        export = ["export", str(folder / f"run-{name}"), "--out", str(folder / name), "--engine", "openvino"]
        _once(seconds, f"export {name}", folder / name, [*export, "--batch", "1,1,1"])
    export = ["export", str(model), "--out", str(folder / "fp32"), "--dtype", "fp32", "--scheduler", "ddim"]
    export += ["--num-inference-steps", str(STEPS), "--engine", "openvino", "--batch", "1,1,1"]
    _once(seconds, "export fp32", folder / "fp32", export)
    return seconds


def _once(seconds: dict[str, float], name: str, result: Path, command: list[str]) -> None:
    if result.exists():
        return
    started = time.perf_counter()
    print("$ sdq-deploy", *command, flush=True)
    subprocess.run([sys.executable, "-m", "sdq_deploy.cli.main", *command], check=True)
    seconds[name] = time.perf_counter() - started


def eager_step(model: Path) -> Callable[[], object]:
    """A call of diffusers' UNet, FP32, batch 2."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(model / "unet", torch_dtype=torch.float32).eval()
    latents, text = torch.randn(2, 4, LATENT_SIZE, LATENT_SIZE), torch.randn(2, 77, unet.config.cross_attention_dim)

    def call() -> object:
        with torch.inference_mode():
            return unet(latents, 500, encoder_hidden_states=text)

    return call


def package_step(folder: Path) -> Callable[[], object]:
    """A step of a package by its OpenVINO engine: what the runtime's loop calls."""
    pipeline = Pipeline.load(folder, engine="openvino", verify="cached")
    return ExitStack().enter_context(component_calls(pipeline, batch=1))[DENOISER]


def nncf_step(folder: Path) -> Callable[[], object] | None:
    """A call of the FP32 package's denoiser after NNCF's post-training quantization; None without nncf."""
    try:
        import nncf
    except ImportError:
        return None
    import openvino as ov

    core = ov.Core()
    model = core.read_model(folder / "denoiser" / "model.onnx")
    rng = np.random.default_rng(0)
    shapes = {}
    for port in model.inputs:
        dims = [dim.get_length() if dim.is_static else 0 for dim in port.get_partial_shape()]
        batch = 1 if port.get_any_name() == "latents" else 2
        shapes[port.get_any_name()] = [size or batch for size in dims]
    model.reshape(shapes)

    def feeds(step: int) -> dict[str, Any]:
        made: dict[str, Any] = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        return made | {"step": np.array(step, np.int64), "guidance_scale": np.array(7.5, np.float32)}

    samples = [feeds(step) for step in range(0, STEPS, 5)]
    quantized = nncf.quantize(
        model, nncf.Dataset(samples), subset_size=len(samples), model_type=nncf.ModelType.TRANSFORMER
    )
    hints = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(quantized, "CPU", hints).create_infer_request()
    return lambda: request.infer(samples[0], share_inputs=True)


def time_in_turns(calls: dict[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """Median seconds of each call, the calls taking turns so that what else happens here meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for run in range(runs + 2):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if run >= 2:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--width", type=float, default=0.5, help="of the UNet, relative to SD v1-4's")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    stages = prepare(folder, arguments.width)
    calls = {
        "diffusers, eager FP32": eager_step(folder / "model"),
        "openvino, FP32 package": package_step(folder / "fp32"),
        "openvino, W8A8, one constant scale": package_step(folder / "constant"),
        "openvino, W8A8, per-step scales": package_step(folder / "per-step"),
    }
    if (quantized := nncf_step(folder / "fp32")) is not None:
        calls["openvino, NNCF INT8 (post-training)"] = quantized
    seconds = time_in_turns(calls, arguments.runs)
    ours = seconds["openvino, W8A8, per-step scales"]
    for name, value in seconds.items():
        print(f"{name:40} {value:7.3f} s   {value / ours:5.2f} x per-step INT8")
    for name, value in stages.items():
        print(f"{name:40} {value:7.1f} s")
    versions = {"python": platform.python_version()} | tool_versions(("torch", "diffusers", "openvino", "nncf"))
    print(" · ".join(f"{name} {value}" for name, value in versions.items()))
    results = {"seconds": seconds, "stages": stages, "versions": versions, "runs": arguments.runs}
    (folder / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
