"""The whole road of a family, every part at its real size: train without fit steps, export, build and check, run.

    python benchmarks/road.py build/road --family sd14
    python benchmarks/road.py build/road --family sd14 --precision fp16

Makes the checkpoint (published architecture, random weights, FP16) and takes it through the commands that a user types,
each a process of its own: seconds, CPU seconds and the most memory of each, and of each stage of the export, builder
included. Speed, size and memory do not depend on what the weights are; images do, and are noise. `--width` scales the
denoiser down. What exists in the folder is kept: a second call exports, builds and runs again, and does not train.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from sdq_deploy.random_checkpoints import FAMILIES, scaled, write_checkpoint
from sdq_engines.in_progress import IN_PROGRESS
from sdq_engines.package.store import open_package
from sdq_export.provenance import tool_versions

PROMPTS = ("a red circle", "a photo of an astronaut riding a horse on mars")
#: A road to measure, not a training: a prompt, a sample a step, and no layers compared with each other.
TRAIN = {
    "collect.num_prompts": 1,
    "collect.validation_prompts": 1,
    "collect.steps_per_prompt": 64,
    "collect.prompts_per_shard": 1,
    "calibrate.samples_per_step": 1,
    "calibrate.smoothing": "[]",
    "sensitivity.samples": 1,
    "fit.mixed_precision": '"no"',
}
_POLL_SECONDS = 0.1


@dataclass
class Peak:
    """The most memory of a command's processes together, in bytes: all pages, and those that are of no mapped file."""

    resident: int = 0
    own: int = 0

    def add(self, resident: int, own: int) -> None:
        self.resident, self.own = max(self.resident, resident), max(self.own, own)


@dataclass
class Measured:
    """One command: its time by the clock and by the CPUs, its memory, and its stages' seconds and memory."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak: Peak = field(default_factory=Peak)
    stages: dict[str, float] = field(default_factory=dict)
    stage_peaks: dict[str, Peak] = field(default_factory=dict)


def measured(command: list[str], watched: Path | None = None) -> Measured:
    """Run a command of sdq-deploy to its end.

    Args:
        command: its arguments.
        watched: the output folder whose in-progress file names the stages.
    """
    print("$ sdq-deploy", *command, flush=True)
    found, started, before = Measured(), time.perf_counter(), os.times()
    child = subprocess.Popen([sys.executable, "-m", "sdq_deploy.cli.main", *command])
    watcher = threading.Thread(target=_watch, args=(child, watched, found), daemon=True)
    watcher.start()
    code = child.wait()
    watcher.join()
    found.seconds = time.perf_counter() - started
    after = os.times()
    found.cpu_seconds = after.children_user + after.children_system - before.children_user - before.children_system
    if code:
        _print(command[0], found)
        raise SystemExit(code)
    return found


def _watch(child: subprocess.Popen[bytes], watched: Path | None, found: Measured) -> None:
    last = time.perf_counter()
    while child.poll() is None:
        stage, now = _stage(watched), time.perf_counter()
        resident, own = _memory(child.pid)
        found.peak.add(resident, own)
        found.stages[stage] = found.stages.get(stage, 0.0) + now - last
        found.stage_peaks.setdefault(stage, Peak()).add(resident, own)
        last = now
        time.sleep(_POLL_SECONDS)


def _stage(watched: Path | None) -> str:
    """What the export says that it is doing; outside of it, in the same command, an engine is built and checked."""
    if watched is None:
        return "all"
    try:
        return str(json.loads((watched / IN_PROGRESS).read_text(encoding="utf-8"))["stage"])
    except (OSError, ValueError, KeyError):
        return "engine" if (watched / "prologue").is_dir() else "starting"


def _memory(pid: int) -> tuple[int, int]:
    """Of a process and all below it: resident, and without the pages of mapped files."""
    resident = own = 0
    for process in _tree(pid):
        try:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii", errors="replace")
        except OSError:
            continue
        rows = {name: 1024 * int(kilobytes) for name, kilobytes in re.findall(r"(\w+):\s+(\d+) kB", status)}
        resident += rows.get("VmRSS", 0)
        own += rows.get("RssAnon", 0) + rows.get("RssShmem", 0)
    return resident, own


def _tree(pid: int) -> Iterator[psutil.Process]:
    try:
        root = psutil.Process(pid)
        yield from (root, *root.children(recursive=True))
    except psutil.NoSuchProcess:
        return


def road(folder: Path, arguments: argparse.Namespace) -> dict[str, Measured]:
    """All commands, by name."""
    family, precision = arguments.family, arguments.precision
    model = folder / f"{family}-{arguments.width:g}"
    if not (model / "model_index.json").is_file():
        write_checkpoint(model, family, scaled(family, arguments.width, arguments.latent_size), dtype=torch.float16)
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    run, package = folder / f"{model.name}-{precision}-run", folder / f"{model.name}-{precision}"
    found = {}
    exported = model if precision == "fp16" else run
    steps = ["--num-inference-steps", str(arguments.steps)]
    if precision != "fp16" and not (run / "checkpoint" / "quant.json").is_file():
        settings = [word for key, value in TRAIN.items() for word in ("--set", f"{key}={value}")]
        train = ["train", str(model), "--out", str(run), "--precision", precision, "--method", "ptq", *settings]
        train += ["--prompts", str(prompts), *steps, *(["--resume"] if (run / "run.json").is_file() else [])]
        found["train"] = measured(train)
    export = ["export", str(exported), "--out", str(package), "--engine", arguments.engine, "--batch", "1,1,1"]
    export += ["--gate", arguments.gate, "--device", arguments.device, *(["--force"] if arguments.force else [])]
    export += ["--prologue", arguments.prologue] if arguments.prologue and precision != "fp16" else []
    found["export"] = measured([*export, *(steps if precision == "fp16" else [])], package)
    image = ["run", str(package), PROMPTS[1], "--engine", arguments.engine, "--out", str(folder / "image.png")]
    found["run"] = measured([*image, "--seed", "7"])
    return found


def report(folder: Path, arguments: argparse.Namespace, found: dict[str, Measured]) -> None:
    """Print the table, and write it as JSON beside the packages."""
    for name, each in found.items():
        _print(name, each)
    name = f"{arguments.family}-{arguments.width:g}-{arguments.precision}"
    manifest = open_package(folder / name, verify="cached").manifest
    entry = manifest.engines[next(iter(manifest.engines))]
    print(f"builder {entry.build_seconds:.0f} s, {_gb(entry.peak_memory_bytes).strip()} GB; ", end="")
    print(f"package {sum(file.size for file in manifest.files.values()) / 1e9:.2f} GB, engine {entry.backend}")
    print(machine())
    content: dict[str, Any] = {key: asdict(value) for key, value in found.items()}
    content |= {"machine": machine(), "parity": manifest.fidelity["parity"]}
    (folder / f"{name}.json").write_text(json.dumps(content, indent=2), encoding="utf-8")


def _print(name: str, found: Measured) -> None:
    print(f"\n{'':44} {'seconds':>8} {'CPU s':>8} {'peak GB':>8} {'own GB':>8}")
    peak = found.peak
    print(f"{name:44} {found.seconds:8.1f} {found.cpu_seconds:8.1f} {_gb(peak.resident)} {_gb(peak.own)}")
    for stage, seconds in found.stages.items() if len(found.stages) > 1 else ():
        peak = found.stage_peaks[stage]
        print(f"  {stage:42} {seconds:8.1f} {'':8} {_gb(peak.resident)} {_gb(peak.own)}")


def machine() -> str:
    """Versions, cores, and what of the CPU decides how fast integers and BF16 are."""
    versions = {"python": platform.python_version()}
    versions |= tool_versions(("torch", "diffusers", "onnxruntime", "openvino"))
    words = [f"{name} {value}" for name, value in versions.items()]
    try:
        flags = set(re.findall(r"\b(?:avx2|avx512f|avx512_vnni|avx512_bf16|amx_int8|amx_bf16)\b", _cpuinfo()))
    except OSError:
        flags = set()
    return " · ".join([*words, f"{os.cpu_count()} cores", " ".join(sorted(flags)) or platform.processor()])


def _cpuinfo() -> str:
    return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")


def _gb(count: int) -> str:
    return f"{count / 1e9:8.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", choices=FAMILIES, default="sd14")
    parser.add_argument("--precision", choices=("fp16", "w8a8", "w4a8", "w4a16"), default="w4a8")
    parser.add_argument("--width", type=float, default=1.0, help="of the denoiser, relative to the published one")
    parser.add_argument("--latent-size", type=int, help="latents are this many pixels high and wide")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--engine", default="openvino")
    parser.add_argument("--gate", default="auto", help="as of sdq-deploy export")
    parser.add_argument("--device", default="auto", help="as of sdq-deploy export")
    parser.add_argument("--prologue", choices=("int8", "int4"), help="as of sdq-deploy export")
    parser.add_argument("--force", action="store_true", help="as of sdq-deploy export")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    report(folder, arguments, road(folder, arguments))


if __name__ == "__main__":
    main()
