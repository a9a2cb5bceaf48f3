"""What a training will take, from the architecture alone: `sdq-deploy train --dry-run`.

The checkpoint's components are made of its configurations as fake tensors, which have shapes and no memory, and one
forward is traced: layers, floating-point operations and what autograd keeps are counted, not guessed. Weights are not
read, so a model of any size is forecast in seconds.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sdq_deploy.adapters.file import open_adapter
from sdq_deploy.adapters.names import layer_names
from sdq_deploy.models import open_model
from sdq_deploy.recipes.schema import Fit, OptimizerState
from sdq_deploy.training.context import TrainingContext, TrainingSettings
from sdq_deploy.training.counting import count, forward_flops, layer_weight, saved_bytes
from sdq_deploy.training.device_state import device_state
from sdq_deploy.training.run import make_accelerator
from sdq_export.conditioning import Conditioning
from sdq_export.conversion import configuration
from sdq_export.quantspec import QuantSpec
from sdq_export.single_file import is_single_file, read_header
from sdq_export.sketch import Sketch
from sdq_export.source import Source
from sdq_export.stepping import StepDenoiser

__all__ = ["ASSUMED_TFLOPS", "Forecast", "forecast"]

#: Sustained, of a training on one current data-centre GPU in BF16; times scale with it.
ASSUMED_TFLOPS = 150.0

_FP32 = 4


@dataclass(frozen=True)
class Forecast:
    """One training, foreseen. Bytes are of one process; floating-point operations count a multiplication and an
    addition as two.

    Attributes:
        model, method, precision: what is trained, how, to what.
        parameters: of the denoiser.
        quantized_weights: number format -> number of weight sites.
        quantized_share: of the denoiser's parameters, those in a weight site.
        activation_sites, activation_formats, scales_per_site: what is quantized of the activations.
        kept: layers that stay in floating point, precomputed ones not among them.
        sensitive: layers that will be chosen for distillation and freezing, of all weight sites.
        latents, dataset_bytes: of the serial dataset.
        train_steps, batch_size: of the fit; over all processes.
        dataset_memory_bytes: of the dataset, in the host's memory: what says where each latent is, and one batch.
        trainable_bytes: parameters that learn, their gradients and AdamW's moments.
        optimizer_bytes, optimizer_state: of these, the moments, and what they are kept in.
        frozen_bytes: the teacher's weights, and the student's that do not learn.
        teacher_bytes: of these, the teacher's; 0 where the dataset answers for it.
        activation_bytes: what autograd keeps of one batch, quantizers included.
        flops_per_step, collect_flops: of one iteration; of the whole collection.
        assumed_tflops: what the seconds below are reckoned with.
    """

    model: str
    method: str
    precision: str
    parameters: int
    quantized_weights: dict[str, int]
    quantized_share: float
    activation_sites: int
    activation_formats: tuple[str, ...]
    scales_per_site: int
    kept: tuple[str, ...]
    sensitive: int
    latents: int
    dataset_bytes: int
    dataset_memory_bytes: int
    train_steps: int
    batch_size: int
    trainable_bytes: int
    optimizer_bytes: int
    optimizer_state: OptimizerState
    frozen_bytes: int
    teacher_bytes: int
    activation_bytes: int
    flops_per_step: int
    collect_flops: int
    assumed_tflops: float = ASSUMED_TFLOPS

    @property
    def memory_bytes(self) -> int:
        """Of one process, the framework's own and fragmentation not counted."""
        return self.trainable_bytes + self.frozen_bytes + self.activation_bytes

    @property
    def seconds_per_step(self) -> float:
        """At `assumed_tflops`, on one device."""
        return self.flops_per_step / (self.assumed_tflops * 1e12)

    @property
    def collect_seconds(self) -> float:
        """Of the whole collection, likewise."""
        return self.collect_flops / (self.assumed_tflops * 1e12)


def forecast(settings: TrainingSettings) -> Forecast:
    """Foresee a training; nothing is written, no weight is read.

    Args:
        settings: the training.

    Raises:
        SdqError: the model is not there or not supported.
    """
    with _configuration(settings) as folder:
        source = Sketch(folder, settings.model, settings.revision)
        if settings.loras:
            names = layer_names(source)
            for lora in settings.loras:
                open_adapter(lora.path, names)  # what does not fit is said now
        return _forecast(settings, source)


@contextlib.contextmanager
def _configuration(settings: TrainingSettings) -> Iterator[Path]:
    """A folder with the model's configurations; that of a single file is temporary. Adapters do not change them."""
    if is_single_file(settings.model):
        with configuration(read_header(Path(settings.model)), settings.from_file) as folder:
            yield folder
    else:
        yield open_model(settings.model, settings.revision).folder


def _forecast(settings: TrainingSettings, source: Source) -> Forecast:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        source.family.check()
        context = TrainingContext(settings, source, make_accelerator(settings.recipe, cpu=True), _no_progress())
    plan, recipe = context.plan, settings.recipe
    with mode:
        spec = context.spec
        prompt = source.family.encode_prompts(["a prompt"])
        denoiser = StepDenoiser(source.denoiser, torch.as_tensor(plan.timesteps))
        shape = source.family.latent_shape
        flops = forward_flops(denoiser, shape, prompt)
        kept_bytes = saved_bytes(denoiser, shape, prompt, spec, recipe.fit.gradient_checkpointing)
    passes = recipe.sampling.guidance.rows
    share = max(1, recipe.fit.batch_size // context.accelerator.num_processes)
    with mode:
        state = device_state(denoiser, spec, recipe)
    prompts = recipe.collect.num_prompts
    latents = (
        prompts * min(recipe.collect.steps_per_prompt, plan.calls) + recipe.collect.validation_prompts * plan.calls
    )
    quantized = sum(layer_weight(denoiser, site.layer).numel() for site in spec.weights)
    loop = context.method.loop(recipe)
    return Forecast(
        model=settings.model,
        method=recipe.method,
        precision=spec.precision,
        parameters=count(denoiser.model),
        quantized_weights=dict(sorted(Counter(site.format.title for site in spec.weights).items())),
        quantized_share=quantized / count(denoiser.model),
        activation_sites=len(spec.activations),
        activation_formats=tuple(sorted({site.format.title for site in spec.activations})),
        scales_per_site=spec.activations[0].num_groups if spec.activations else 0,
        kept=tuple(_kept(denoiser, spec)),
        sensitive=context.method.sensitive_layers(recipe, spec),
        latents=latents,
        dataset_bytes=_dataset_bytes(latents, prompts, recipe.collect.validation_prompts, shape, passes, prompt),
        dataset_memory_bytes=_dataset_memory(latents, share, shape, passes, prompt),
        train_steps=loop.max_train_steps if loop else 0,
        batch_size=recipe.fit.batch_size,
        trainable_bytes=state.trainable,
        optimizer_bytes=state.moments,
        optimizer_state=recipe.fit.optimizer_state,
        frozen_bytes=state.student + state.teacher,
        teacher_bytes=state.teacher,
        activation_bytes=passes * share * kept_bytes,
        flops_per_step=passes * share * flops * _forwards(loop) if loop else 0,
        collect_flops=passes * flops * plan.calls * (prompts + recipe.collect.validation_prompts),
    )


def _no_progress() -> Any:
    from rich.progress import Progress

    return Progress(disable=True)


def _forwards(fit: Fit) -> int:
    """Forwards that one sample's iteration costs: forward, backward (two), recomputation, and the teacher for ILD."""
    teaches = fit.ild_weight > 0 or fit.pipeline != "serial-to-parallel"
    return 3 + int(fit.gradient_checkpointing) + int(teaches)


def _kept(denoiser: StepDenoiser, spec: QuantSpec) -> list[str]:
    sites = spec.weight_sites
    return [layer for layer in denoiser.network.quantizable_layers(denoiser.model) if layer not in sites]


def _dataset_bytes(
    latents: int, prompts: int, validation: int, shape: tuple[int, int, int], passes: int, prompt: Conditioning
) -> int:
    """What the model saw and answered for each latent, noise and result for each prompt, and the prompts."""
    values = shape[0] * shape[1] * shape[2]
    text = sum(tensor.numel() for tensor in prompt.tensors.values())
    count = prompts + validation
    return _FP32 * (latents * values * (1 + passes) + count * (2 * values + text)) + 16 * latents


def _dataset_memory(latents: int, share: int, shape: tuple[int, int, int], passes: int, prompt: Conditioning) -> int:
    """Step, prompt and place in the order of each latent; a batch's latents, answers and prompts, read from disk."""
    values = shape[0] * shape[1] * shape[2]
    text = sum(tensor.numel() for tensor in prompt.tensors.values())
    return 3 * 8 * latents + _FP32 * share * (values * (1 + passes) + text)
