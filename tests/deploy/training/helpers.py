"""Small trainings of the tiny checkpoint, in this process or in others."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from sdq_deploy.recipes import load_recipe
from sdq_deploy.training.context import TrainingContext, TrainingSettings
from sdq_deploy.training.run import make_accelerator, run_training
from sdq_export.source import load_source

ROOT = Path(__file__).parents[3]

#: A training of seconds: 3 sampling steps, 8 prompts in shards of 2, 6 iterations.
SMALL: dict[str, Any] = {
    "sampling.num_inference_steps": 3,
    "collect.num_prompts": 8,
    "collect.validation_prompts": 2,
    "collect.steps_per_prompt": 2,
    "collect.prompts_per_shard": 2,
    "calibrate.samples_per_step": 2,
    "calibrate.search_points": 10,
    "sensitivity.top_k": 3,
    "sensitivity.samples": 2,
    "fit.max_train_steps": 6,
    "fit.batch_size": 4,
    "fit.warmup_steps": 1,
    "fit.validate_every": 3,
    "fit.checkpoint_every": 2,
}


def small_settings(model: Path, out: Path, overrides: dict[str, Any] | None = None) -> TrainingSettings:
    """Settings of a small training of `model` into `out`."""
    prompts = tuple(f"a red circle number {index}" for index in range(10))
    recipe = load_recipe("shapes-64", SMALL | (overrides or {}))
    return TrainingSettings(model=str(model), out=out, recipe=recipe, prompts=prompts)


def small_context(model: Path, out: Path, overrides: dict[str, Any] | None = None) -> TrainingContext:
    """A context in this process, on the CPU, without a progress display."""
    from rich.progress import Progress

    settings = small_settings(model, out, overrides)
    return TrainingContext(
        settings, load_source(model), make_accelerator(settings.recipe, cpu=True), Progress(disable=True)
    )


def start_worker(
    model: Path, out: Path, overrides: dict[str, Any] | None = None, *, rank: int = 0, world: int = 1, port: int = 0
) -> subprocess.Popen[str]:
    """Start one process of a training; it resumes what is there."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = os.pathsep.join(str(ROOT / part) for part in (".", "export", "engines"))
    if world > 1:
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "tests.deploy.training.worker", str(model), str(out), json.dumps(overrides or {})]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def train(model: Path, out: Path, overrides: dict[str, Any] | None = None) -> list[str]:
    """Run a training in this process to its end, or go on with what is there; the stages that ran."""
    return run_training(small_settings(model, out, overrides), resume=True, cpu=True, quiet=True)


def without_stages(finished: Path, out: Path, first: str) -> Path:
    """A copy of a finished run in which `first` and the stages after it have not run yet."""
    shutil.copytree(finished, out)
    status = json.loads((out / "run.json").read_text(encoding="utf-8"))
    names = list(status["stages"])
    for name in names[names.index(first) :]:
        del status["stages"][name]
    (out / "run.json").write_text(json.dumps(status), encoding="utf-8")
    if first == "collect":
        shutil.rmtree(out / "dataset")
    return out


def run_workers(model: Path, out: Path, overrides: dict[str, Any] | None = None, *, world: int) -> None:
    """Run a training in `world` processes to its end."""
    port = free_port()
    workers = [start_worker(model, out, overrides, rank=rank, world=world, port=port) for rank in range(world)]
    for worker in workers:
        output, _ = worker.communicate(timeout=500)
        assert worker.returncode == 0, output


def free_port() -> int:
    """A TCP port that nobody listens on."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
