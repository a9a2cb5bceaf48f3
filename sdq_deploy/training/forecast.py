"""What a training will take, from the architecture alone: `sdq-deploy train --dry-run`.

The checkpoint's components are made of its configurations as fake tensors, which have shapes and no memory, and one
forward is traced: layers, floating-point operations and what autograd keeps are counted, not guessed. Weights are not
read, so a model of any size is forecast in seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from sdq_deploy.models import resolve_model
from sdq_deploy.training.context import TrainingContext, TrainingSettings
from sdq_deploy.training.run import make_accelerator
from sdq_export.conditioning import Conditioning
from sdq_export.quantspec import QuantSpec
from sdq_export.source import Source, load_source
from sdq_export.stepping import StepDenoiser

__all__ = ["ASSUMED_TFLOPS", "Forecast", "forecast"]

#: Sustained, of a training on one current data-centre GPU in BF16; times scale with it.
ASSUMED_TFLOPS = 150.0

_FP32, _ADAM = 4, 8


@dataclass(frozen=True)
class Forecast:
    """One training, foreseen. Bytes are of one process; floating-point operations count a multiplication and an
    addition as two.

    Attributes:
        model, method, precision: what is trained, how, to what.
        parameters: of the denoiser.
        quantized_weights: bits -> number of weight sites.
        quantized_share: of the denoiser's parameters, those in a weight site.
        activation_sites, scales_per_site: what is quantized of the activations.
        kept: layers that stay in floating point, precomputed ones not among them.
        sensitive: layers that will be chosen for distillation and freezing, of all weight sites.
        latents, dataset_bytes: of the serial dataset.
        train_steps, batch_size: of the fit; over all processes.
        trainable_bytes: parameters that learn, their gradients and AdamW's moments.
        frozen_bytes: the teacher's weights, and the student's that do not learn.
        activation_bytes: what autograd keeps of one batch, quantizers included.
        flops_per_step, collect_flops: of one iteration; of the whole collection.
        assumed_tflops: what the seconds below are reckoned with.
    """

    model: str
    method: str
    precision: str
    parameters: int
    quantized_weights: dict[int, int]
    quantized_share: float
    activation_sites: int
    scales_per_site: int
    kept: tuple[str, ...]
    sensitive: int
    latents: int
    dataset_bytes: int
    train_steps: int
    batch_size: int
    trainable_bytes: int
    frozen_bytes: int
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
    loaded = load_source(resolve_model(settings.model), settings.revision)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        source = _Sketch(loaded.folder, loaded.model, loaded.revision)
        source.family.check_source(source)
        context = TrainingContext(settings, source, make_accelerator(settings.recipe, cpu=True), _no_progress())
    plan, recipe = context.plan, settings.recipe
    with mode:
        spec = context.spec
        prompt = source.family.encode_prompts(source, ["a prompt"])
        denoiser = StepDenoiser(source.denoiser, torch.as_tensor(plan.timesteps))
        shape = source.family.latent_shape(source)
        flops = _flops(denoiser, shape, prompt)
        kept_bytes = _activations(denoiser, shape, prompt, spec, recipe.fit.gradient_checkpointing)
    passes = 2 if recipe.sampling.guidance_scale != 1 else 1
    share = max(1, recipe.fit.batch_size // context.accelerator.num_processes)
    trainable, frozen = _state(denoiser, spec, settings)
    prompts = recipe.collect.num_prompts
    latents = (
        prompts * min(recipe.collect.steps_per_prompt, plan.calls) + recipe.collect.validation_prompts * plan.calls
    )
    trains = recipe.method in ("s2p", "efficientdm")
    return Forecast(
        model=settings.model,
        method=recipe.method,
        precision=spec.precision,
        parameters=_count(denoiser.model),
        quantized_weights=dict(sorted(Counter(site.bits for site in spec.weights).items())),
        quantized_share=sum(_weight(denoiser, site.layer).numel() for site in spec.weights) / _count(denoiser.model),
        activation_sites=len(spec.activations),
        scales_per_site=spec.activations[0].num_groups if spec.activations else 0,
        kept=tuple(_kept(denoiser, spec)),
        sensitive=min(recipe.sensitivity.top_k, len(spec.weights)) if recipe.method == "s2p" else 0,
        latents=latents,
        dataset_bytes=_dataset_bytes(latents, prompts, recipe.collect.validation_prompts, shape, passes, prompt),
        train_steps=recipe.fit.max_train_steps if trains else 0,
        batch_size=recipe.fit.batch_size,
        trainable_bytes=trainable,
        frozen_bytes=frozen,
        activation_bytes=passes * share * kept_bytes,
        flops_per_step=passes * share * flops * _forwards(settings) if trains else 0,
        collect_flops=passes * flops * plan.calls * (prompts + recipe.collect.validation_prompts),
    )


class _Sketch(Source):
    """A checkpoint whose models are made of their configurations; under fake tensors they take no memory."""

    def _model(self, kind: Any, name: str) -> Any:
        folder = self.folder / name
        if hasattr(kind, "config_class"):
            made = kind(kind.config_class.from_pretrained(folder, local_files_only=True))
        else:
            made = kind.from_config(kind.load_config(folder, local_files_only=True))
        return made.eval().requires_grad_(False)


def _no_progress() -> Any:
    from rich.progress import Progress

    return Progress(disable=True)


def _inputs(denoiser: StepDenoiser, shape: tuple[int, int, int], prompt: Conditioning) -> tuple[Any, ...]:
    return torch.randn(1, *shape), torch.zeros(1, dtype=torch.int64), prompt


def _flops(denoiser: StepDenoiser, shape: tuple[int, int, int], prompt: Conditioning) -> int:
    """Of one forward of one sample."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        denoiser(*_inputs(denoiser, shape, prompt))
    return int(counter.get_total_flops())


def _activations(
    denoiser: StepDenoiser, shape: tuple[int, int, int], prompt: Conditioning, spec: QuantSpec, checkpointing: bool
) -> int:
    """Bytes that autograd keeps of one sample's forward; under gradient checkpointing also the largest block's."""
    denoiser.model.requires_grad_(True).train()
    blocks: list[int] = []

    def checkpointed(module: nn.Module, *arguments: Any) -> Any:
        with _saved() as inside, _quantizer_bytes(denoiser, spec) as quantizers:
            output = module(*arguments)
        blocks.append(inside() + quantizers())
        # what a checkpoint keeps instead: its inputs
        kept.append(sum(each.numel() * each.element_size() for each in arguments if isinstance(each, Tensor)))
        return output

    kept: list[int] = []
    if checkpointing:
        denoiser.model.enable_gradient_checkpointing(checkpointed)
    with _saved() as outside, _quantizer_bytes(denoiser, spec) as quantizers:
        denoiser(*_inputs(denoiser, shape, prompt))
    if not blocks:
        return outside() + quantizers()
    # the outer count has not seen what the inner ones took
    return outside() + sum(kept) + max(blocks)


@contextmanager
def _saved() -> Iterator[Callable[[], int]]:
    """Count the bytes that autograd saves in the block, tensors of one storage once; parameters are not among them."""
    seen: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        origin = tensor if tensor._base is None else tensor._base
        if not isinstance(origin, nn.Parameter):
            storage = tensor.untyped_storage()
            seen[storage._cdata] = storage.nbytes()
            alive.append(tensor)  # so that no other storage gets the same address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(seen.values())


@contextmanager
def _quantizer_bytes(denoiser: StepDenoiser, spec: QuantSpec) -> Iterator[Callable[[], int]]:
    """Bytes that fake quantization adds: the rounded copy of each site's tensor, FP32."""
    total = [0]

    def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        total[0] += _FP32 * inputs[0].numel()

    handles = [
        denoiser.model.get_submodule(site.consumers[0]).register_forward_pre_hook(look) for site in spec.activations
    ]
    try:
        yield lambda: total[0]
    finally:
        for handle in handles:
            handle.remove()


def _state(denoiser: StepDenoiser, spec: QuantSpec, settings: TrainingSettings) -> tuple[int, int]:
    """(trainable, frozen) bytes: everything of the student learns in ours, the adapters alone in EfficientDM."""
    everything = _count(denoiser.model)
    teacher = _FP32 * everything
    if settings.recipe.method == "s2p":
        return everything * (2 * _FP32 + _ADAM), teacher
    if settings.recipe.method == "efficientdm":
        rank = settings.recipe.efficientdm.rank
        adapters = sum(
            rank * (weight.shape[0] + weight[0].numel())
            for weight in (_weight(denoiser, site.layer) for site in spec.weights)
        )
        return adapters * (2 * _FP32 + _ADAM), teacher + _FP32 * everything
    return 0, 2 * teacher


def _forwards(settings: TrainingSettings) -> int:
    """Forwards that one sample's iteration costs: forward, backward (two), recomputation, and the teacher for ILD."""
    fit = settings.recipe.fit
    teaches = settings.recipe.method == "s2p" and (fit.ild_weight > 0 or fit.pipeline != "serial-to-parallel")
    return 3 + int(fit.gradient_checkpointing) + int(teaches)


def _kept(denoiser: StepDenoiser, spec: QuantSpec) -> list[str]:
    sites = spec.weight_sites
    return [layer for layer in denoiser.family.quantizable_layers(denoiser.model) if layer not in sites]


def _dataset_bytes(
    latents: int, prompts: int, validation: int, shape: tuple[int, int, int], passes: int, prompt: Conditioning
) -> int:
    """What the model saw and answered for each latent, noise and result for each prompt, and the prompts."""
    values = shape[0] * shape[1] * shape[2]
    text = sum(tensor.numel() for tensor in prompt.tensors.values())
    count = prompts + validation
    return _FP32 * (latents * values * (1 + passes) + count * (2 * values + text)) + 16 * latents


def _weight(denoiser: StepDenoiser, layer: str) -> Tensor:
    weight: Tensor = denoiser.model.get_parameter(f"{layer}.weight")
    return weight


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
