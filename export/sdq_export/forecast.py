"""What an export will take, said before it starts: memory, disk and time, by parameter counts and a short measurement.

Bytes and seconds for each parameter were measured on Stable Diffusion v1-4 (docs/benchmarks.md, "The whole road").
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sdq_engines.errors import SdqError
from sdq_engines.memory import available_memory_bytes
from sdq_export.families.vae import VaeDecoder
from sdq_export.parity.budget import Gate
from sdq_export.sketch import Sketch, count_flops
from sdq_export.source import Source
from sdq_export.stepping import StepDenoiser

__all__ = ["ExportForecast", "forecast_export"]

_SMALL_BYTES = 200_000_000
"""Of all weights; an export of fewer takes a minute and a gigabyte, and is not foreseen."""

_BASE_BYTES = 1.0e9
"""The libraries, and what Python holds."""

_ROOM = 0.95
"""Of the memory that is available, what an export may count on."""


@dataclass(frozen=True)
class ExportForecast:
    """One export, foreseen; bytes are of the process, or of the builder of an engine after it.

    Attributes:
        parameters: of all parts; 0 of a model so small that nothing was reckoned.
        memory_bytes: at most, at any time.
        memory_stage: when that is.
        disk_bytes: of the package, its engines and what lies beside it meanwhile.
        seconds: of the export without engines.
        calls: of the denoiser for one image, in the gate.
    """

    parameters: int
    memory_bytes: int
    memory_stage: str
    disk_bytes: int
    seconds: float
    calls: int

    @property
    def is_small(self) -> bool:
        """Whether it is nothing to speak of."""
        return self.parameters == 0

    @property
    def sentence(self) -> str:
        """For people."""
        return (
            f"This export takes about {self.memory_bytes / 1e9:.1f} GB of memory (in {self.memory_stage}), "
            f"{self.disk_bytes / 1e9:.1f} GB of disk and {_minutes(self.seconds)} before any engine is built; "
            f"the gate calls the denoiser {self.calls} times."
        )

    def require(self, folder: Path) -> None:
        """Refuse what does not fit.

        Args:
            folder: the output, for its disk.

        Raises:
            SdqError: more memory or disk is needed than there is.
        """
        memory, disk = available_memory_bytes(), shutil.disk_usage(folder).free
        if memory is not None and self.memory_bytes > _ROOM * memory:
            raise SdqError(
                f"The export needs about {self.memory_bytes / 1e9:.1f} GB of memory (in {self.memory_stage}); "
                f"{memory / 1e9:.1f} GB are available.",
                "Close other programs, or export on a larger machine. To try it all the same: --force",
            )
        if self.disk_bytes > disk:
            raise SdqError(
                f"The export needs about {self.disk_bytes / 1e9:.1f} GB on the disk of {folder}; "
                f"{disk / 1e9:.1f} GB are free.",
                "Make room, or give another --out. To try it all the same: --force",
            )


def forecast_export(
    source: Source, gate: Gate, quantized: bool, device: str, engines: Sequence[str] = ()
) -> ExportForecast:
    """Foresee an export; no weight is read.

    Args:
        source: the checkpoint.
        gate: what the gate looks at.
        quantized: whether the denoiser is.
        device: where teacher and reference run.
        engines: that are built of the package.
    """
    calls = gate.calls(quantized)
    if sum(file.stat().st_size for file in source.folder.glob("*/*.safetensors")) < _SMALL_BYTES:
        return ExportForecast(0, 0, "", 0, 0.0, calls)
    sizes, pixels, call, decoding = _sizes(source)
    stages = _memory(source, sizes, pixels, quantized, engines)
    worst = max(stages, key=lambda name: stages[name])
    per_parameter = _QUANTIZED_SECONDS if quantized else _FLOAT_SECONDS
    work = calls * call / _speed(device) + _VAE_RUNS * decoding / _speed("cpu")
    return ExportForecast(
        parameters=sum(sizes.values()),
        memory_bytes=int(stages[worst]),
        memory_stage=worst,
        disk_bytes=int(_disk(source, sizes, quantized, engines)),
        seconds=work * _SLOWER + per_parameter * sum(sizes.values()),
        calls=calls,
    )


def _sizes(source: Source) -> tuple[dict[str, int], int, int, int]:
    """Parameters of each part, an image's pixels, the operations of a denoiser's call for one, and of decoding one."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        sketch = Sketch(source.folder, source.model, source.revision)
        sizes = {part: sum(each.numel() for each in sketch.part(part).parameters()) for part in sketch.weighted_parts}
        prompts = sketch.family.encode_prompts([None, "a prompt"])
        denoiser = StepDenoiser(sketch.denoiser, torch.zeros(1))
        latents = torch.randn(2, *sketch.family.latent_shape)
        call = count_flops(denoiser, latents, torch.zeros(2, dtype=torch.int64), prompts)
        height, width = sketch.family.image_size
        return sizes, height * width, call, count_flops(VaeDecoder(sketch.vae), latents[:1])


def _memory(
    source: Source, sizes: Mapping[str, int], pixels: int, quantized: bool, engines: Sequence[str]
) -> dict[str, float]:
    """Bytes by stage."""
    denoiser, vae = sizes[source.family.denoiser], sizes["vae"]
    text = [size for part, size in sizes.items() if part.startswith("text_encoder")]
    stages = {
        "the text encoders": 4 * sum(text) + 6 * max(text),
        "the VAE": 10 * vae + _VAE_BYTES_A_PIXEL * pixels,
        "the denoiser": (_QUANTIZED_BYTES if quantized else _FLOAT_BYTES) * denoiser,
    }
    for engine in engines:
        each = _ENGINE_BYTES[engine][int(quantized)] * denoiser
        stages[f"the build of {engine}"] = max(each, _ENGINE_BYTES[engine][0] * max(vae, *text))
    return {name: _BASE_BYTES + size for name, size in stages.items()}


def _disk(source: Source, sizes: Mapping[str, int], quantized: bool, engines: Sequence[str]) -> float:
    denoiser = sizes[source.family.denoiser]
    others = sum(sizes.values()) - denoiser
    package = 2 * others + (1 if quantized else 2) * denoiser
    built = sum((4 if name == "openvino" else 2) * others + (1 if quantized else 4) * denoiser for name in engines)
    return package + built + (denoiser if quantized else 0)  # the gate's copy without quantized activations


def _speed(device: str) -> float:
    """Floating-point operations a second of a convolution as the denoiser has them, FP32, measured for a moment."""
    convolution = torch.nn.Conv2d(320, 320, 3, padding=1, device=device)
    x = torch.randn(2, 320, 64, 64, device=device)
    best = math.inf
    with torch.no_grad():
        for _ in range(3):
            started = time.perf_counter()
            float(convolution(x).sum())  # reading it waits for the device
            best = min(best, time.perf_counter() - started)
    return 2 * 2 * 320 * 320 * 9 * 64 * 64 / best


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


# Measured: bytes at most, and seconds on one of two cores of a server's CPU, for each parameter.
_FLOAT_BYTES, _QUANTIZED_BYTES = 6.5, 8.0
_VAE_BYTES_A_PIXEL = 12_000
_ENGINE_BYTES = {"openvino": (8.0, 4.0), "onnxruntime": (8.0, 8.0), "tensorrt": (6.0, 6.0), "tensorrt-rtx": (6.0, 6.0)}
"""Of the builder: not quantized, quantized."""
_FLOAT_SECONDS, _QUANTIZED_SECONDS = 4e-8, 6e-8
_SLOWER, _VAE_RUNS = 1.3, 6
