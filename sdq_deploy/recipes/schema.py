"""What a recipe may say: one pydantic model per section, every value bounded.

Values marked (choice) are this project's, not the paper's; the recipe files carry them, with the reason.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sdq_engines.formats import PrecisionName
from sdq_engines.guidance import Guidance

__all__ = [
    "Calibrate",
    "Collect",
    "EfficientDM",
    "Fit",
    "Freezing",
    "Method",
    "OptimizerState",
    "PerBits",
    "Pipeline",
    "Ptq",
    "PtqAlgorithm",
    "Quantization",
    "Recipe",
    "Reconstruction",
    "Sampling",
    "Sensitivity",
    "Text",
]

OptimizerState = Literal["fp32", "8bit"]
Pipeline = Literal["serial-to-parallel", "parallel", "serial"]

#: How integers and scales are found; docs/methods.md describes each.
Method = Literal["s2p", "ptq", "ptq-reconstruction", "efficientdm"]
PtqAlgorithm = Literal["search", "max", "mse", "percentile", "smoothquant", "awq", "svdquant"]

#: Scheduler names; "default" is the checkpoint's own.
Scheduler = Literal["default", "ddim", "pndm", "euler", "euler-ancestral", "dpmpp-2m", "lcm", "flow-euler"]
Rate = Annotated[float, Field(ge=0, le=1)]
Bits = Literal[4, 8]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Sampling(_Section):
    """The inference that the student has to reproduce."""

    scheduler: Scheduler
    num_inference_steps: int = Field(ge=1, le=1000)
    guidance_scale: float = Field(ge=0, le=100)
    """1 or less runs the model on the prompt alone, as in diffusers."""

    @property
    def guidance(self) -> Guidance:
        """By that scale."""
        return Guidance.classifier_free(self.guidance_scale)


class Quantization(_Section):
    """Which tensors are quantized, and to how many bits."""

    precision: PrecisionName
    keep: tuple[str, ...]
    """Globs over layer paths that stay in floating point, beside the time path and the prologue."""
    bits: dict[str, Bits] = Field(default_factory=dict)
    """Glob over layer paths -> weight bits, overriding the precision's; the last that fits decides."""
    groups: int = Field(ge=0)
    """Scale groups of the activations; 0 for one per step, at most 50."""
    split_shortcuts: bool = False
    """Quantize the two halves of a concatenated skip input apart (Q-Diffusion)."""
    block_size: Literal[16, 32, 64, 128]
    """Of w4a16's Linear weights, along the input."""


class Collect(_Section):
    """The serial dataset."""

    num_prompts: int = Field(ge=1)
    """Prompts to take from the list, which is cycled with other seeds when shorter."""
    validation_prompts: int = Field(ge=1)
    """Held out for the choice of the sensitive layers and of the best state; the last of the list."""
    steps_per_prompt: int = Field(ge=1)
    """Randomly chosen steps whose latents are kept, per prompt."""
    prompts_per_shard: int = Field(ge=1)
    """Prompts sampled together and written as one shard: what is lost at most when collection is killed."""


class Calibrate(_Section):
    """Initial scales."""

    search_points: int = Field(ge=1, le=1000)
    search_power: float = Field(gt=0, le=8)
    samples_per_step: int = Field(ge=1)
    """Latents per step that the activation scales are computed from."""
    smoothing: tuple[Rate, ...] = ()
    """Migration strengths to try at each site, beside none; empty smooths nothing."""


class Sensitivity(_Section):
    """The choice of the sensitive layers."""

    top_k: int = Field(ge=0)
    samples: int = Field(ge=1)
    """Held-out latents that each layer is judged on."""


class PerBits(_Section):
    """A value for 4-bit weights and one for 8-bit weights."""

    w4: Rate
    w8: Rate

    def of(self, bits: int) -> float:
        """The value for `bits`."""
        return self.w4 if bits == 4 else self.w8


class Fit(_Section):
    """Training."""

    pipeline: Pipeline
    max_train_steps: int = Field(ge=0)
    batch_size: int = Field(ge=1)
    """Over all processes; each latent counts once, whatever the guidance."""
    loss: Literal["guided", "separate"]
    """What the output loss compares: the guided output, as the sampler uses it, or both model outputs by themselves."""
    step_weighting: float = Field(ge=0, le=2)
    """0: the output loss of all steps counts alike; 1: by what the sampler makes of it in the final latents."""
    ild_weight: float = Field(ge=0)
    """lambda of the inter-layer distillation."""
    weight_lr: PerBits
    weight_scale_lr: PerBits
    """Relative to the scale, which is learned as its logarithm; so is the next."""
    activation_scale_lr: Rate
    weight_decay: Rate
    betas: tuple[Rate, Rate]
    warmup_steps: int = Field(ge=0)
    max_grad_norm: float = Field(gt=0)
    ema_decay: float = Field(ge=0, lt=1)
    """0 keeps no moving average of the parameters."""
    validate_every: int = Field(ge=1)
    """Steps between two samplings of the validation prompts."""
    checkpoint_every: int = Field(ge=1)
    """Steps between two resume points."""
    gradient_checkpointing: bool
    mixed_precision: Literal["no", "bf16", "fp16"]
    """Of the layers under training; fake quantization and all measuring stay in FP32."""
    optimizer_state: OptimizerState = "fp32"
    """What AdamW's moments are kept in; 8bit needs the extra 8bit (bitsandbytes)."""
    offload_teacher: bool = False
    """Keep the teacher's weights on the CPU while the student trains; a layer's are on the device while it computes."""


class Freezing(_Section):
    """Selective freezing of oscillating weights."""

    enabled: bool
    momentum: Annotated[float, Field(gt=0, le=1)]
    threshold_start: Rate
    threshold_end: Rate

    @model_validator(mode="after")
    def _falling(self) -> Freezing:
        if self.threshold_end > self.threshold_start:
            raise ValueError(
                f"threshold_end {self.threshold_end} must be at most threshold_start {self.threshold_start}"
            )
        return self


class Text(_Section):
    """How prompts are read; export and evaluation then read them alike (docs/prompts.md)."""

    prompt_chunks: int = Field(default=1, ge=1, le=16)
    """Chunks of 75 tokens that a prompt may have."""
    clip_skip: int = Field(default=0, ge=0)
    """Layers at the end of the CLIP text encoders that prompts are not passed through."""


class Ptq(_Section):
    """Method ptq: quantization without training."""

    algorithm: PtqAlgorithm = "search"
    percentiles: tuple[Annotated[float, Field(gt=50, le=100)], ...] = (99.9, 99.99, 99.999, 99.9999)
    """Share of the activations' magnitudes to hold, in percent; the best by held-out trajectory stays."""
    alphas: tuple[Rate, ...] = (0.25, 0.5, 0.75)
    """SmoothQuant's migration strengths; the best by held-out trajectory stays."""
    awq_points: int = Field(default=20, ge=1)
    """AWQ's candidates for the exponent of the activations' magnitude."""


class Reconstruction(_Section):
    """Method ptq-reconstruction: learned rounding, block by block. Defaults are Q-Diffusion's."""

    iterations: int = Field(default=20_000, ge=1)
    """Per block."""
    batch_size: int = Field(default=32, ge=1)
    samples: int = Field(default=1024, ge=1)
    """Latents of the serial dataset that blocks are reconstructed on, spread over steps and prompts."""
    groups: int = Field(default=1, ge=0)
    """Scale groups of the activations: 1 as published; 0 for one per step."""
    rounding_lr: float = Field(default=1e-3, gt=0, le=1)
    activation_scale_lr: Rate = 4e-4
    """Relative to the scale."""
    regularizer: float = Field(default=0.01, ge=0)
    beta_start: float = Field(default=20.0, gt=0)
    beta_end: float = Field(default=2.0, gt=0)
    warmup: float = Field(default=0.2, ge=0, lt=1)
    """Share of the iterations before the regularizer sets in."""
    checkpoint_every: int = Field(default=1000, ge=1)
    """Iterations between two resume points."""


class EfficientDM(_Section):
    """Method efficientdm: what differs from the section fit, whose steps, batch and precision it shares."""

    rank: int = Field(default=32, ge=1)
    adapter_lr: float = Field(default=4e-4, gt=0, le=1)
    """Of a layer's adapter, in units of the layer's mean weight scale (scale-aware optimization)."""
    weight_scale_lr: Rate = 1e-4
    """Relative to the scale, as the next."""
    activation_scale_lr: Rate = 1e-3
    weight_decay: Rate = 0.01
    betas: tuple[Rate, Rate] = (0.9, 0.999)


class Recipe(_Section):
    """All settings of one training."""

    method: Method = "s2p"
    sampling: Sampling
    quantization: Quantization
    collect: Collect
    calibrate: Calibrate
    sensitivity: Sensitivity
    fit: Fit
    freezing: Freezing
    text: Text = Text()
    ptq: Ptq = Ptq()
    reconstruction: Reconstruction = Reconstruction()
    efficientdm: EfficientDM = EfficientDM()
