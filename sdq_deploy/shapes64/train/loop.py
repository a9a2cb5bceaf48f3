"""What every trainer here shares: the learning-rate cycle, atomic checkpoints, and a loop that resumes exactly.

A step's randomness is a function of (seed, step) alone, so a run that was killed and resumed makes the same updates
as one that was not, and several processes, each with its share of every batch, make the updates of one.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed
from torch.multiprocessing.spawn import spawn

from sdq_deploy.processes import leave

__all__ = [
    "LoopConfig",
    "StepRandom",
    "is_main_process",
    "one_cycle",
    "run_in_processes",
    "run_loop",
    "to_device_images",
]


@dataclass(frozen=True)
class LoopConfig:
    """`steps` in all, `checkpoint_every` steps a checkpoint in `out`; `resume` continues from the last one,
    `init` names the checkpoint of an earlier cycle to start from."""

    out: Path
    steps: int
    peak_lr: float
    seed: int = 0
    device: str = "cpu"
    checkpoint_every: int = 250
    log_every: int = 50
    resume: bool = False
    init: Path | None = None


class StepRandom:
    """The random draws of one step: `numpy` for choices on the host, `torch` for tensors (drawn on the CPU).

    Every process draws the whole batch and keeps its `share` of it.
    """

    def __init__(self, seed: int, step: int) -> None:
        self.numpy = np.random.default_rng([seed, step])
        self.torch = torch.Generator("cpu").manual_seed(int(self.numpy.integers(1 << 62)))
        self.share = slice(_rank(), None, _processes())


def one_cycle(step: int, steps: int, peak: float, warmup: float = 0.05, final: float = 0.01) -> float:
    """Linear to `peak` over the first `warmup` of the steps, then a cosine to `final * peak`."""
    progress = (step + 1) / steps
    if progress < warmup:
        return peak * progress / warmup
    fall = (progress - warmup) / (1 - warmup)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(fall, 1.0))))


def run_loop(
    config: LoopConfig,
    state: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[StepRandom], torch.Tensor],
    after_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Minimize `loss_of` for `config.steps` steps.

    `state` names what a checkpoint holds beside the optimizer: modules, or anything with `state_dict` and
    `load_state_dict`. Gradients are averaged over processes, then clipped to norm 1.
    """
    path = config.out / "checkpoint.pt"
    config.out.mkdir(parents=True, exist_ok=True)
    everything = {**state, "optimizer": optimizer}
    first = _load(path, everything) if config.resume and path.exists() else 0
    if first == 0 and config.init is not None:
        _load(config.init, state)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    started, recent = time.monotonic(), []
    for step in range(first, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(step, config.steps, config.peak_lr)
        loss = loss_of(StepRandom(config.seed, step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        _average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        after_step(step)
        recent.append(float(loss.detach()))
        done = step + 1
        last = done == config.steps
        if is_main_process() and (done % config.log_every == 0 or last):
            seconds = (time.monotonic() - started) / (done - first)
            left = seconds * (config.steps - done) / 60
            mean = sum(recent) / len(recent)
            print(f"step {done}/{config.steps}  loss {mean:.5f}  {seconds:.3f} s/step  {left:.1f} min left", flush=True)
            recent.clear()
        if is_main_process() and (done % config.checkpoint_every == 0 or last):
            _save(path, everything, done)


def run_in_processes(task: Callable[[], None], processes: int) -> None:
    """Run `task` in `processes` new processes that share every batch (gloo, this machine only).

    On a busy CPU, processes of one thread each meet once a step; the threads of one process meet in every operation.
    """
    if processes == 1:
        return task()
    with tempfile.TemporaryDirectory() as folder:
        meeting = (Path(folder) / "meeting").as_uri()
        spawn(_run_rank, (task, processes, meeting), nprocs=processes)  # type: ignore[no-untyped-call]
    return None


def _run_rank(rank: int, task: Callable[[], None], processes: int, meeting: str) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes)
    task()
    leave()


def _average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    if _processes() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= _processes()
    for gradient, averaged in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(averaged.view_as(gradient))


def is_main_process() -> bool:
    """Whether this process is the one that writes."""
    return _rank() == 0


def _rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def _processes() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def _save(path: Path, parts: dict[str, Any], step: int) -> None:
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    torch.save({"step": step, **{name: part.state_dict() for name, part in parts.items()}}, partial)
    os.replace(partial, path)


def _load(path: Path, parts: dict[str, Any]) -> int:
    saved = torch.load(path, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return int(saved["step"])


def to_device_images(images: np.ndarray[Any, Any], device: str) -> torch.Tensor:
    """uint8 NHWC to float32 NCHW in -1..1."""
    tensor = torch.from_numpy(np.ascontiguousarray(images)).to(device)
    return tensor.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()
