"""The manifest: what a package says about itself (docs/package-format.md)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sdq_engines.formats import PRECISIONS, PrecisionName
from sdq_engines.package.layout import ENGINES, TEXT_ENCODER

__all__ = [
    "EXTRA_CHANNELS",
    "NEGATIVE_OUTPUT",
    "SCHEMA_VERSION",
    "SIZE_INPUT",
    "TEXT_OUTPUT",
    "CallDefaults",
    "EngineEntry",
    "FileEntry",
    "KernelCounts",
    "Manifest",
    "ModelIO",
    "Precision",
    "SamplerInfo",
    "ShapeProfile",
    "SourceInfo",
    "TextInfo",
]

#: Raised when a reader of the previous version would misread the package.
SCHEMA_VERSION = 1

#: The prologue's input for the image's size: original size, crop's corner and target size, FP32 [n, 6].
SIZE_INPUT = "time_ids"

#: A text encoder's output for each token, [n, L, D], and the one that stands in its place for negative prompts where
#: they are not encoded the same (`export --clip-skip`).
TEXT_OUTPUT, NEGATIVE_OUTPUT = "text_embeddings", "negative_text_embeddings"

#: The denoiser's input for `ModelIO.extra_channels`, [batch, extra, h, w], the same in every step.
EXTRA_CHANNELS = "extra_channels"

Precision = Literal["fp32", "fp16"] | PrecisionName


_Length = Annotated[int, Field(gt=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class FileEntry(_Strict):
    """One file of the package: its size in bytes and its SHA-256 in hexadecimal."""

    size: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class ModelIO(_Strict):
    """Shapes that the runtime needs before it opens a graph."""

    latent_shape: tuple[_Length, _Length, _Length]
    """(channels, height, width) of one image's latents."""
    image_size: tuple[_Length, _Length]
    """(height, width) in pixels."""
    prologue_outputs: list[str]
    """Names of the prologue's outputs, which are inputs of the denoiser under the same names."""
    prologue_inputs: list[str] = Field(default_factory=lambda: ["text_embeddings"])
    """Names of the prologue's inputs: outputs of the text encoders, and `time_ids` where the model is told the size."""
    force_zeros_for_empty_prompt: bool = False
    """Without a negative prompt the unconditional half sees zeros in place of the empty prompt's embeddings (SDXL)."""
    size_multiple: int | None = Field(default=None, ge=1)
    """The graphs take any height and width in pixels that are multiples of this; none: `image_size` alone."""
    size_limit: int | None = Field(default=None, ge=1)
    """The most that a free height or width in pixels may be; none: no limit."""
    extra_channels: int = Field(default=0, ge=0)
    """Channels that an inpainting denoiser takes beside the latents: 1 of the mask, then C of the masked image."""


class TextInfo(_Strict):
    """How a prompt becomes token ids."""

    component: str = TEXT_ENCODER
    """The text encoder that takes them."""
    tokenizer: str
    """Path of tokenizer.json, relative to the package."""
    max_length: int = Field(gt=0)
    """Tokens that a chunk of a prompt is padded or cut to, begin and end marks included."""
    chunks: int = Field(default=1, ge=1)
    """How many chunks a prompt is padded or cut to."""
    clip_skip: int = Field(default=0, ge=0)
    """Layers at the encoder's end that prompts are not passed through; negative prompts are, as in diffusers."""
    pad_token_id: int
    bos_token_id: int
    eos_token_id: int
    written_out: dict[str, str] = Field(default_factory=dict)
    """Token of a textual inversion of several vectors -> what a prompt has in its place, a token for each vector."""


class SamplerInfo(_Strict):
    """The sampler compiled into the denoiser graph; its numbers are in sampler.safetensors."""

    scheduler: str
    """Class name in diffusers, e.g. DDIMScheduler."""
    config: dict[str, Any]
    prediction_type: str
    num_inference_steps: int = Field(gt=0)
    num_calls: int = Field(gt=0)
    """T: model calls in one full run (PNDM makes one more than its steps)."""
    history: int = Field(ge=0)
    """H: state slots beside the latents."""
    stochastic: bool
    """Whether each step takes fresh noise."""
    guidance_scale: float
    """The default when the caller names none."""
    order: int = Field(default=1, ge=1)
    """Model calls per step where diffusers counts them so (Heun: 2); a run from an image starts at a multiple of it."""


class CallDefaults(_Strict):
    """What a call takes where the caller names nothing: the defaults of diffusers' pipelines of the same family."""

    image_strength: float = Field(gt=0, le=1)
    """Of a run from an image."""
    inpaint_strength: float = Field(gt=0, le=1)
    """Of a run from an image and a mask."""


class SourceInfo(_Strict):
    """The checkpoint that this package was made from."""

    model: str
    revision: str | None
    sha256: str
    """Over all its parts that are read: weights, configurations, tokenizers."""
    license: str
    """Its identifier or first line, as the source states it; "unknown" where it states none."""
    changes: str
    """What was changed, in a sentence, as most model licences ask."""


Size = tuple[int, int]
"""(height, width) in pixels."""


class ShapeProfile(_Strict):
    """Images per call, and their sizes, for which an engine is built."""

    batch_min: int = Field(default=1, ge=1)
    batch_opt: int = Field(default=1, ge=1)
    batch_max: int = Field(default=4, ge=1)
    size_min: Size | None = None
    """Least height and least width; the three sizes are given together, none is the package's `image_size` alone."""
    size_opt: Size | None = None
    size_max: Size | None = None

    def sizes(self, io: ModelIO) -> tuple[Size, Size, Size]:
        """The least, the one that it is tuned for, and the most."""
        if self.size_min is None or self.size_opt is None or self.size_max is None:
            return io.image_size, io.image_size, io.image_size
        return self.size_min, self.size_opt, self.size_max

    def takes(self, size: Size, io: ModelIO) -> bool:
        """Whether images of this size may be asked for."""
        low, _, high = self.sizes(io)
        return all(a <= n <= b for a, n, b in zip(low, size, high, strict=True))


class KernelCounts(_Strict):
    """What the compiled denoiser computes with, read from the builder or the compiled model, not from the request."""

    quantized_layers: int
    """Layers of the canonical graph that are quantized."""
    int8: int
    """Those whose kernel takes INT8 x INT8."""
    fp8: int
    """Those whose kernel takes FP8 x FP8."""
    int4: int
    """Those whose kernel takes INT4 weights."""
    fallback: list[str]
    """Names of the quantized layers that run in floating point instead."""


class EngineEntry(_Strict):
    """One backend's compiled form of the package."""

    backend: str
    version: str
    """Of the backend's library."""
    target: str
    """What it was built for: a GPU architecture such as "sm_89", "any of sm_89, sm_120", or a CPU instruction set."""
    profile: ShapeProfile
    components: dict[str, str]
    """Component -> file that the backend loads, relative to the package."""
    options: dict[str, Any] = Field(default_factory=dict)
    kernels: KernelCounts | None = None
    build_seconds: float
    peak_memory_bytes: int
    """Of the process that built it."""
    bytes_on_disk: int


class Manifest(_Strict):
    """manifest.json: written last, so that a package with a manifest is whole."""

    kind: Literal["sdq-package"] = "sdq-package"
    schema_version: int = SCHEMA_VERSION
    name: str
    family: str
    precision: Precision
    io: ModelIO
    text: list[TextInfo]
    sampler: SamplerInfo
    defaults: CallDefaults
    source: SourceInfo
    components: dict[str, str]
    """Component -> canonical ONNX file, relative to the package; in the order in which a prompt passes through them."""
    full_precision: list[str] = Field(default_factory=list)
    """Components that overflow in FP16: every engine computes them in FP32, or in BF16 where its build asks for it."""
    tools: dict[str, str]
    """Package -> version that wrote this one."""
    files: dict[str, FileEntry]
    """Every file but the manifest itself, by POSIX path relative to the package."""
    engines: dict[str, EngineEntry] = Field(default_factory=dict)
    fidelity: dict[str, Any] = Field(default_factory=dict)
    """Measured figures: parity per criterion and step, and whatever an evaluation added."""

    @property
    def is_quantized(self) -> bool:
        """Whether the denoiser's weights are quantized."""
        return self.precision in PRECISIONS

    @property
    def bytes_without_engines(self) -> int:
        """Bytes of what ships to every machine: all files but the engines'."""
        return sum(entry.size for entry in self.files_without_engines.values())

    @property
    def files_without_engines(self) -> dict[str, FileEntry]:
        """What an export wrote: all files but the engines'."""
        return {name: entry for name, entry in self.files.items() if not name.startswith(f"{ENGINES}/")}
