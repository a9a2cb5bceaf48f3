"""The four families at their real size: export of the denoiser, TensorRT-RTX's engine of it, and what both weigh.

    python benchmarks/family.py build/family --family sd14

Makes the checkpoint (published architecture, random weights, FP16), quantizes it without running it (weight scales from
the largest value, activation scales drawn, one a step), and takes the denoiser and its prologue through the code that
`sdq-deploy export` and `build` use. Parity is left out: `road.py` has the whole export. Each stage is a process of its
own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sdq_deploy.random_checkpoints import DENOISERS, FAMILIES, scaled, write_checkpoint
from sdq_deploy.recipes import load_recipe
from sdq_engines.build import build_engine
from sdq_engines.formats import PRECISIONS
from sdq_engines.lowering.save import save_graph
from sdq_engines.package.editor import PackageEditor
from sdq_engines.package.layout import DENOISER, PROLOGUE, SAMPLER, model_file
from sdq_engines.package.schema import Manifest, ModelIO, ShapeProfile
from sdq_engines.package.store import open_package
from sdq_export.checkpoint import (
    CheckpointInfo,
    QuantizedCheckpoint,
    SamplerSettings,
    SourceRef,
    quantize_weight,
    scale_key,
    weight_key,
    weight_scale_key,
)
from sdq_export.denoiser import DenoiserGraphs
from sdq_export.denoiser_export import make_denoiser, make_reference
from sdq_export.integer_storage import round_to_integers_
from sdq_export.package_manifest import sampler_info
from sdq_export.passes.prologue import prologue_names
from sdq_export.provenance import source_info, tool_versions
from sdq_export.sampler import SamplerPlan, compile_sampler
from sdq_export.scales import largest_value_scale
from sdq_export.sites import find_sites
from sdq_export.source import Source, load_source
from sdq_export.stepping import StepDenoiser

STEPS, GUIDANCE = 20, 5.0
STAGES = ("export", "tensorrt-rtx")


def make_checkpoint(folder: Path, family: str) -> Path:
    """The family's checkpoint, whole denoiser, thin text encoders and autoencoder, which are not measured."""
    if not (folder / "model_index.json").is_file():
        write_checkpoint(folder, family, scaled(family, thin=True), dtype=torch.float16)
    return folder


def quantized(source: Source, plan: SamplerPlan, precision: str) -> QuantizedCheckpoint:
    """A checkpoint of the recipe's sites whose values were not measured."""
    wanted = load_recipe(source.family.recipe, {"quantization.precision": precision}).quantization
    spec = find_sites(
        source.skeleton, plan.calls, wanted.precision, keep=wanted.keep, bits=wanted.bits, block_size=wanted.block_size
    )
    sites = spec.weight_sites
    stepped = StepDenoiser(copy.deepcopy(source.skeleton), torch.from_numpy(plan.timesteps))
    kept = {name for name, _ in stepped.model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    for name, weight in stored_weights(source):
        layer = name.removesuffix(".weight")
        if name == weight_key(layer) and layer in sites:
            scale = largest_value_scale(weight, sites[layer])
            tensors[weight_scale_key(layer)] = scale
            tensors[weight_key(layer)] = quantize_weight(weight, scale, sites[layer])
        elif name in kept:
            tensors[name] = weight.float()
    generator = torch.Generator().manual_seed(0)
    for site in spec.activations:
        tensors[scale_key(site.name)] = 0.03 * (0.85 + 0.3 * torch.rand(site.num_groups, generator=generator))
    settings = SamplerSettings(
        scheduler=plan.scheduler, config=plan.config, num_inference_steps=STEPS, guidance_scale=GUIDANCE
    )
    ref = SourceRef(model=source.model, sha256=source.sha256)
    return QuantizedCheckpoint(CheckpointInfo(spec=spec, sampler=settings, source=ref), tensors)


def stored_weights(source: Source) -> Iterator[tuple[str, Tensor]]:
    """The denoiser's parameters, one after the other from the files."""
    for path in sorted((source.folder / source.family.denoiser).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            yield from ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118 (safe_open is no dict)


def export(model: Path, package: Path, precision: str, prologue: str) -> dict[str, float]:
    """Write a package of prologue and denoiser; seconds from the quantized checkpoint to the written graphs."""
    source = load_source(model)
    plan = compile_sampler(source.scheduler, STEPS)
    checkpoint = quantized(source, plan, precision) if precision != "fp" else None
    started = time.perf_counter()
    reference = make_reference(source, plan, checkpoint, "fp16")
    integer_layers = reference.prologue_layers if prologue == "int8" else []
    round_to_integers_(reference.model, integer_layers, "int8")
    graphs = make_denoiser(source, plan, reference, checkpoint, "fp16", integer_layers=integer_layers)
    made = time.perf_counter()
    editor = PackageEditor.create(package)
    for name, graph in ((PROLOGUE, graphs.prologue), (DENOISER, graphs.denoiser)):
        for file in sorted(save_graph(graph, package / "staged" / name).parent.iterdir()):
            editor.move_file(f"{name}/{file.name}", file)
    editor.add_bytes(SAMPLER, plan.to_bytes())
    editor.commit(manifest(package, source, plan, checkpoint, graphs))
    return {"capture_and_passes": made - started, "writing": time.perf_counter() - made}


def manifest(
    package: Path, source: Source, plan: SamplerPlan, checkpoint: QuantizedCheckpoint | None, graphs: DenoiserGraphs
) -> Manifest:
    """Of a package that holds no more than what is measured."""
    return Manifest(
        name=package.name,
        family=source.family.name,
        precision=checkpoint.spec.precision if checkpoint else "fp16",
        io=ModelIO(
            latent_shape=source.family.latent_shape,
            image_size=source.family.image_size,
            prologue_inputs=[value.name or "" for value in graphs.prologue.graph.inputs],
            prologue_outputs=prologue_names(graphs.prologue),
        ),
        text=[],
        sampler=sampler_info(plan, GUIDANCE),
        defaults=source.family.call_defaults,
        source=source_info(source, checkpoint),
        components={name: model_file(name) for name in (PROLOGUE, DENOISER)},
        tools=tool_versions(),
        files={},
    )


def build(package: Path) -> dict[str, Any]:
    """Build TensorRT-RTX's engine, batch 1, and say what it computes with."""
    built = build_engine(open_package(package), "tensorrt-rtx", ShapeProfile(batch_max=1))
    entry = built.manifest.engines["tensorrt-rtx"]
    assert entry.kernels is not None
    return {
        "build_seconds": entry.build_seconds,
        "build_peak_bytes": entry.peak_memory_bytes,
        "engine_bytes": entry.bytes_on_disk,
        "quantized_layers": entry.kernels.quantized_layers,
        "int8_layers": entry.kernels.int8,
        "fallback": entry.kernels.fallback,
    }


def run_stage(stage: str, folder: Path, family: str, precision: str, prologue: str) -> None:
    """In a process of its own; writes what it found."""
    package = folder / f"{family}-{precision}"
    own_memory = watch_own_memory()
    started = time.perf_counter()
    found: dict[str, Any] = (
        export(folder / family, package, precision, prologue) if stage == "export" else build(package)
    )
    found["own_peak_bytes"] = own_memory()
    found["seconds"] = time.perf_counter() - started
    found["cpu_seconds"] = time.process_time()
    found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (folder / f"{family}-{precision}-{stage}.json").write_text(json.dumps(found, indent=2), encoding="utf-8")


def watch_own_memory() -> Callable[[], int]:
    """Watch this process's memory but for mapped files, whose pages the system takes back when it needs them.

    Returns:
        A function that gives the most so far, in bytes; the process's peak where there is no /proc.
    """
    status, most = Path("/proc/self/status"), [0]

    def watch() -> None:
        while status.is_file():
            found = re.search(r"RssAnon:\s+(\d+)", status.read_text())
            most[0] = max(most[0], 1024 * int(found[1]) if found else 0)
            time.sleep(0.05)

    threading.Thread(target=watch, daemon=True).start()
    return lambda: most[0] or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def summary(folder: Path, family: str, precision: str) -> dict[str, Any]:
    """Both stages' figures, and sizes against the FP16 denoiser's."""
    found = {
        stage: json.loads((folder / f"{family}-{precision}-{stage}.json").read_text(encoding="utf-8"))
        for stage in STAGES
    }
    fp16 = sum(path.stat().st_size for path in (folder / family / DENOISERS[family]).glob("*.safetensors"))
    package = folder / f"{family}-{precision}"
    graphs = sum(path.stat().st_size for name in (PROLOGUE, DENOISER) for path in (package / name).iterdir())
    return {**found, "fp16_bytes": fp16, "graph_bytes": graphs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", choices=FAMILIES, default="sd14")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="w4a8")
    parser.add_argument("--prologue", choices=("fp16", "int8"), default="fp16", help="how its weights are stored")
    parser.add_argument("--stage", choices=STAGES, help="this one alone, in this process")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.stage:
        run_stage(arguments.stage, folder, arguments.family, arguments.precision, arguments.prologue)
        return
    make_checkpoint(folder / arguments.family, arguments.family)
    for stage in STAGES:
        print(f"{arguments.family}, {arguments.precision}: {stage}", flush=True)
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--stage", stage], check=True)
    found = summary(folder, arguments.family, arguments.precision)
    exported, built = found["export"], found["tensorrt-rtx"]
    seconds, ratio = exported["capture_and_passes"] + exported["writing"], found["graph_bytes"] / found["fp16_bytes"]
    own, mapped = exported["own_peak_bytes"] / 1e9, exported["peak_bytes"] / 1e9
    print(f"export           {seconds:6.1f} s, peak {own:.1f} GB, {mapped:.1f} GB with the mapped checkpoint's pages")
    print(f"tensorrt-rtx     {built['build_seconds']:6.1f} s, peak {built['build_peak_bytes'] / 1e9:.1f} GB")
    print(f"INT8 x INT8      {built['int8_layers']} of {built['quantized_layers']} quantized layers")
    print(f"graphs           {found['graph_bytes'] / 1e6:.0f} MB, {ratio:.3f} x the FP16 denoiser's; engine ", end="")
    print(f"{built['engine_bytes'] / 1e6:.0f} MB, FP16 denoiser {found['fp16_bytes'] / 1e6:.0f} MB")
    versions = {"python": platform.python_version()} | tool_versions(("torch", "diffusers", "onnx-ir", "tensorrt-rtx"))
    print(" · ".join(f"{name} {value}" for name, value in versions.items()))


if __name__ == "__main__":
    main()
