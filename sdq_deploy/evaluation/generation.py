"""Make what images are missing, in this process or in several, and nothing that is there already."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sdq_deploy.evaluation.candidates import Candidate
from sdq_deploy.evaluation.makers import ImageBatch, Maker, load_maker
from sdq_deploy.evaluation.store import ImageStore, Shard
from sdq_deploy.libraries import quiet_libraries
from sdq_engines.errors import SdqError
from sdq_export.checkpoint import SamplerSettings

__all__ = ["Generation", "ImageWorkers", "latent_errors"]

OnImages = Callable[[int], Any]


@dataclass(frozen=True)
class Generation:
    """The images of one candidate. Picklable: it is what a worker process gets.

    Attributes:
        folder: the evaluation's `images` folder.
        candidate: whose images.
        reference: what its latents are compared with; None where it is the reference itself.
        sampler: what all images are made with.
        device: of torch, "cpu" or "cuda".
    """

    folder: Path
    candidate: Candidate
    reference: Candidate | None
    sampler: SamplerSettings
    device: str = "cpu"

    @property
    def store(self) -> ImageStore:
        """Where the images go."""
        return ImageStore(self.folder, self.candidate.name)

    def fingerprint(self, shard: Shard) -> str:
        """What the shard's images and errors depend on."""
        against = self.reference.identity if self.reference and shard.traced else ""
        return shard.fingerprint(self.candidate.identity, against, self.sampler.model_dump_json(), self.device)

    def missing(self, shards: Sequence[Shard]) -> list[Shard]:
        """Those that are not whole, or were made from something else."""
        return [shard for shard in shards if not self.store.is_whole(shard, self.fingerprint(shard))]

    def make(self, maker: Maker, shard: Shard) -> None:
        """Make and store one shard."""
        batch = maker(shard.prompts, shard.seeds)
        errors, latents = None, None
        if shard.traced and self.reference is None:
            latents = batch.latents[: shard.traced]
        elif shard.traced and self.reference is not None:
            wanted = ImageStore(self.folder, self.reference.name).read_latents(shard)
            errors = latent_errors(batch.latents[: shard.traced], wanted)
        self._check(batch)
        self.store.write(shard, self.fingerprint(shard), batch.images, errors, latents)

    def _check(self, batch: ImageBatch) -> None:
        if not np.isfinite(batch.latents).all():
            raise SdqError(
                f"{self.candidate.name} ({self.candidate.images_by}) made latents that are not finite.",
                "Its weights or its engine are damaged, or its precision overflows: try --engine onnxruntime.",
            )


def latent_errors(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> NDArray[np.float64]:
    """||z - z_FP|| / ||z_FP|| of each image and step, float64 [N, T], of latents [N, T, C, h, w]."""
    axes = (2, 3, 4)
    distance = np.sqrt(((found.astype(np.float64) - wanted) ** 2).sum(axis=axes))
    size = np.sqrt((wanted.astype(np.float64) ** 2).sum(axis=axes))
    errors: NDArray[np.float64] = distance / np.maximum(size, 1e-12)
    return errors


class ImageWorkers:
    """What makes images: this process, or several that stay for all candidates, for they take long to start.

    Args:
        processes: how many work at once; 1 is this one alone.
    """

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> ImageWorkers:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def make(self, generation: Generation, shards: Sequence[Shard], on_images: OnImages) -> int:
        """Make the shards that are missing.

        Args:
            generation: of one candidate; the reference's own must be finished before.
            shards: all of the evaluation.
            on_images: hears how many images are now there, those that were there before at once.

        Returns:
            How many images had to be made.

        Raises:
            SdqError: the candidate cannot be loaded, or a worker died.
        """
        missing = generation.missing(shards)
        wanted = sum(len(shard.prompts) for shard in missing)
        on_images(sum(len(shard.prompts) for shard in shards) - wanted)
        alone = self.processes == 1 or len(missing) < 2
        for shard in _here(generation, missing) if alone else self._beside(generation, missing):
            on_images(len(shard.prompts))
        return wanted

    def _beside(self, generation: Generation, shards: Sequence[Shard]) -> Iterator[Shard]:
        if self._pool is None:
            # spawn: a fork would copy torch's and the engines' threads in whatever state they are.
            context = multiprocessing.get_context("spawn")
            threads = max(1, (os.cpu_count() or 1) // self.processes)
            self._pool = ProcessPoolExecutor(
                self.processes, context, initializer=_start_worker, initargs=(threads, context.Value("i", 0))
            )
        try:
            for future in as_completed([self._pool.submit(_work, generation, shard) for shard in shards]):
                yield future.result()
        except BrokenProcessPool as error:
            raise SdqError(
                f"A process that made images of {generation.candidate.name} died, perhaps for want of memory.",
                "Run it again with fewer --processes; the finished images are kept.",
            ) from error


def _here(generation: Generation, shards: Sequence[Shard]) -> Iterator[Shard]:
    if not shards:
        return
    maker = load_maker(generation.candidate, generation.sampler, generation.device)
    for shard in shards:
        generation.make(maker, shard)
        yield shard


@dataclass
class _Worker:
    """A worker process's own state; it holds the maker of one candidate at a time."""

    threads: int
    rank: int
    candidate: str = ""
    maker: Maker | None = None


_worker: _Worker | None = None


def _start_worker(threads: int, ranks: Any) -> None:
    global _worker
    with ranks.get_lock():
        rank, ranks.value = ranks.value, ranks.value + 1
    torch.set_num_threads(threads)
    # Ctrl-C reaches every process of the terminal; the main one has the words for it. A shard under way is made again.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    quiet_libraries()
    _worker = _Worker(threads, rank)


def _work(generation: Generation, shard: Shard) -> Shard:
    assert _worker is not None
    if _worker.maker is None or _worker.candidate != generation.candidate.name:
        device = generation.device
        if device == "cuda":
            device = f"cuda:{_worker.rank % torch.cuda.device_count()}"
        _worker.maker = None  # frees the one before
        _worker.maker = load_maker(generation.candidate, generation.sampler, device, _worker.threads)
        _worker.candidate = generation.candidate.name
    generation.make(_worker.maker, shard)
    return shard
