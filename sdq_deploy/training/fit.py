"""Stage fit: parallel training with inter-layer distillation and selective freezing (docs/quantization.md).

The best state is chosen by the student's own sampling of held-out prompts, the initialization among the candidates,
so training never returns less than it began with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sdq_deploy.recipes.schema import Fit, Freezing
from sdq_deploy.sharing import await_files
from sdq_deploy.training.batches import Batch, make_source
from sdq_deploy.training.context import TrainingContext
from sdq_deploy.training.curves import draw_curves
from sdq_deploy.training.dataset import load_split
from sdq_deploy.training.ema import MovingAverage
from sdq_deploy.training.freezing import FreezingTracker
from sdq_deploy.training.log import TrainingLog, read_log
from sdq_deploy.training.losses import distillation_loss, layer_outputs, output_loss, step_weights
from sdq_deploy.training.memory import peak_bytes, reset_peak, state_bytes
from sdq_deploy.training.optimizer import make_optimizer, optimizer_bytes
from sdq_deploy.training.result import write_result
from sdq_deploy.training.resume import drop_resume, read_resume, write_resume
from sdq_deploy.training.student import Student, parameter_groups
from sdq_deploy.training.teacher import fit_teacher
from sdq_deploy.training.trajectory import trajectory_snr
from sdq_engines.errors import SdqError
from sdq_export.conditioning import Conditioning
from sdq_export.guidance import ModelOutputs, predict_outputs
from sdq_export.stepping import StepDenoiser

__all__ = ["FitPlan", "Fitting", "Schedule", "fit", "full_training", "learning_rate_factor"]

Schedule = Literal["cosine", "linear"]


@dataclass(frozen=True)
class FitPlan:
    """What a method makes of the fit.

    Attributes:
        recipe: steps, batches, losses and what else the fit goes by.
        freezing: of oscillating weights.
        student: its state at the start.
        groups: AdamW's, each with its `peak_lr` and `name`.
        sensitive: layers under inter-layer distillation and freezing.
        schedule: how the learning rates fall.
    """

    recipe: Fit
    freezing: Freezing
    student: Student
    groups: list[dict[str, Any]]
    sensitive: list[str]
    schedule: Schedule = "cosine"


def full_training(context: TrainingContext) -> FitPlan:
    """Ours: every parameter of the student learns, by the recipe as it is."""
    recipe = context.recipe
    await_files([context.folder.scales, context.folder.sensitivity])
    student = Student(context.source.denoiser, context.timesteps, context.spec, load_file(context.folder.scales))
    sensitive: list[str] = json.loads(context.folder.sensitivity.read_text(encoding="utf-8"))["sensitive"]
    return FitPlan(recipe.fit, recipe.freezing, student, parameter_groups(student, recipe.fit), sensitive)


def fit(
    context: TrainingContext, inputs: str, make_plan: Callable[[TrainingContext], FitPlan] = full_training
) -> dict[str, Any]:
    """Train the student, from the resume point if there is one, and leave its best state in the fit folder.

    Args:
        context: the training.
        inputs: hash of all that the fit depends on; a resume point made from other inputs is ignored.
        make_plan: the method.

    Returns:
        What was measured: memory beside that of full training.
    """
    fitting = Fitting(context, inputs, make_plan(context))
    fitting.run()
    if context.accelerator.is_main_process:
        draw_curves(read_log(context.folder.log), context.folder.curves)
        drop_resume(context.folder.fit)
    return fitting.memory()


def learning_rate_factor(step: int, total: int, warmup: int, schedule: Schedule = "cosine") -> float:
    """Linear warm-up, then a cosine or a line to 0 at `total`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2


class _Trainee(nn.Module):
    """What accelerate prepares: mixed precision and gradient exchange wrap this, measuring calls the denoiser bare."""

    def __init__(self, denoiser: StepDenoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, latents: Tensor, steps: Tensor, conditioning: Conditioning) -> Tensor:
        output: Tensor = self.denoiser(latents, steps, conditioning)
        return output


class Fitting:
    """The state of one fit: student, optimizer, what is known of oscillation, and the best state so far."""

    def __init__(self, context: TrainingContext, inputs: str, plan: FitPlan) -> None:
        self.context, self.inputs, self.plan, self.recipe = context, inputs, plan, plan.recipe
        self.accelerator, self.folder = context.accelerator, context.folder.fit
        self.folder.mkdir(parents=True, exist_ok=True)
        self.student = plan.student
        self.student.denoiser.to(context.device)
        self.scale_start = self._scale_levels()
        if self.recipe.gradient_checkpointing:
            self.student.denoiser.enable_gradient_checkpointing()
        reset_peak(context.device)
        optimizer = make_optimizer(plan.groups, self.recipe, context.device)
        self.trainee, self.optimizer = self.accelerator.prepare(_Trainee(self.student.denoiser), optimizer)
        self.sensitive = plan.sensitive
        context.release_teacher()  # that of the other stages
        self.teacher = fit_teacher(
            context.source.denoiser, context.timesteps, context.device, self.recipe, len(self.sensitive)
        )
        self.freezing = FreezingTracker(self.student, self.sensitive, plan.freezing)
        self.average = MovingAverage(self.student.denoiser, self.recipe.ema_decay)
        self.training, self.held_out = (load_split(context.folder.dataset, name) for name in ("training", "validation"))
        self.source = make_source(context, self.training, self.recipe.pipeline)
        self.step_weights = step_weights(context.plan, self.recipe.step_weighting).to(context.device)
        self.step = 0
        self.result: dict[str, Any] = {}

    def run(self) -> None:
        """All steps from here to the recipe's last."""
        total = self.recipe.max_train_steps
        self._load_resume()
        with (
            TrainingLog(self.context.folder.log, self.step, self.accelerator.is_main_process) as log,
            self.context.bar("fit", total, self.step) as advance,
        ):
            if not self.result:
                log.write(0, self._validate())
            while self.step < total:
                record = self._train_step()
                if self.step % self.recipe.validate_every == 0 or self.step == total:
                    record |= self._validate()
                log.write(self.step, record)
                advance()
                if self.step % self.recipe.checkpoint_every == 0 and self.step < total:
                    self._save_resume()

    def _train_step(self) -> dict[str, float]:
        """One iteration; returns what the log wants of it."""
        batch = self.source.batch(self.step)
        recipe = self.recipe
        factor = learning_rate_factor(self.step, recipe.max_train_steps, recipe.warmup_steps, self.plan.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        outputs, losses = self._losses(batch)
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(losses["loss"])
        norm = self.accelerator.clip_grad_norm_(self.trainee.parameters(), self.recipe.max_grad_norm)
        self.optimizer.step()
        self.source.observe(self.step, outputs.detach())
        self.step += 1
        self.freezing.after_step(self.step, self.recipe.max_train_steps)
        self.average.update()
        reduced = {name: float(self.accelerator.reduce(loss.detach(), "mean")) for name, loss in losses.items()}
        return reduced | {"gradient_norm": float(norm)} | self._describe()

    def _losses(self, batch: Batch) -> tuple[ModelOutputs, dict[str, Tensor]]:
        """The student's outputs and the losses on them; the teacher runs only where the dataset does not answer."""
        layers = self.sensitive if self.recipe.ild_weight > 0 else []
        target = batch.target
        features: dict[str, Tensor] = {}
        if target is None:
            target, features = self._teach(batch, layers)
        elif layers:
            with self.accelerator.autocast():
                _, features = self._teach(batch, layers)
        with layer_outputs(self.student.denoiser, layers) as hidden:
            outputs = predict_outputs(self.trainee, batch.latents, batch.steps, batch.conditioning, batch.empty)
        guidance, weights = self.context.recipe.sampling.guidance, self.step_weights[batch.steps]
        losses = {"loss_output": output_loss(outputs, target, self.recipe.loss, guidance, weights)}
        losses["loss"] = losses["loss_output"]
        if layers:
            losses["loss_ild"] = distillation_loss(hidden, features)
            losses["loss"] = losses["loss_output"] + self.recipe.ild_weight * losses["loss_ild"]
        return outputs, losses

    @torch.no_grad()
    def _teach(self, batch: Batch, layers: list[str]) -> tuple[ModelOutputs, dict[str, Tensor]]:
        assert self.teacher is not None, "teacher_is_asked says when"
        with layer_outputs(self.teacher, layers) as hidden:
            outputs = predict_outputs(self.teacher, batch.latents, batch.steps, batch.conditioning, batch.empty)
        return outputs, dict(hidden)

    def _validate(self) -> dict[str, float]:
        """Sample the held-out prompts; keep the state if it is the best so far."""
        with self.average.applied():
            snr = trajectory_snr(self.context, self.student.denoiser, self.held_out)
            if not self.result:
                self.result = {"start_db": snr, "best_db": -math.inf, "best_step": 0}
            if snr > self.result["best_db"]:
                self.result |= {"best_db": snr, "best_step": self.step}
                if self.accelerator.is_main_process:
                    write_result(self.folder, self.student.tensors(), self.result)
        return {"trajectory_snr_db": snr, **self.memory()}

    def memory(self) -> dict[str, Any]:
        """In bytes: trainable state and peak, beside the trainable state of training every parameter with FP32 moments;
        the optimizer's share of the first as it is (0 before the first step)."""
        student = self.student
        adapters = {id(parameter) for parameter in student.adapter_parameters()}
        every = [parameter for parameter in student.denoiser.parameters() if id(parameter) not in adapters]
        return {
            "trainable_state_bytes": state_bytes(
                (p for p in student.denoiser.parameters() if p.requires_grad), self.recipe.optimizer_state
            ),
            "optimizer_state_bytes": optimizer_bytes(self.optimizer),
            "full_training_state_bytes": state_bytes(every),
            "peak_memory_bytes": peak_bytes(self.context.device),
        }

    def _describe(self) -> dict[str, float]:
        weights, activations = self._scale_levels()
        oscillating, frozen = self.freezing.fractions()
        rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
        return {
            "lr_weights": max((rate for name, rate in rates.items() if "scales" not in name), default=0.0),
            "lr_scales": max((rate for name, rate in rates.items() if "scales" in name), default=0.0),
            "weight_scale_ratio": math.exp(weights - self.scale_start[0]) if self.step else 1.0,
            "activation_scale_ratio": math.exp(activations - self.scale_start[1]) if self.step else 1.0,
            "oscillating": oscillating,
            "frozen": frozen,
        }

    @torch.no_grad()
    def _scale_levels(self) -> tuple[float, float]:
        """Mean logarithm of the weight scales and of the activation scales."""
        levels = []
        for quantizers in (self.student.weight_quantizers, self.student.activation_quantizers):
            logs = [quantizer.log_scale.flatten() for quantizer in quantizers.values()]
            levels.append(float(torch.cat(logs).mean()) if logs else 0.0)
        return levels[0], levels[1]

    def _save_resume(self) -> None:
        """Write all that continuing needs, whole or not at all."""
        state = self.source.state()
        pipeline = None if state is None else self.accelerator.gather(state.contiguous()).cpu()
        if not self.accelerator.is_main_process:
            return
        saved = {
            "step": self.step,
            "result": self.result,
            "student": self.student.denoiser.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "freezing": self.freezing.state_dict(),
            "average": self.average.state_dict(),
            "pipeline": pipeline,
        }
        write_resume(self.folder, self.inputs, saved)

    def _load_resume(self) -> None:
        saved = read_resume(self.folder, self.inputs)
        self._check_agreement(0 if saved is None else saved["step"])
        if saved is None:
            return
        self.step, self.result = saved["step"], saved["result"]
        self.student.denoiser.load_state_dict(saved["student"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.freezing.load_state_dict(saved["freezing"])
        self.average.load_state_dict(saved["average"])
        if saved["pipeline"] is not None:
            self.source.restore(saved["pipeline"])

    def _check_agreement(self, step: int) -> None:
        """All processes continue from the same step.

        Raises:
            SdqError: they do not see the same resume point.
        """
        steps = self.accelerator.gather(torch.tensor([step], device=self.context.device)).tolist()
        if len(set(steps)) > 1:
            raise SdqError(
                f"The processes see different resume points, of the steps {', '.join(map(str, sorted(set(steps))))}.",
                "Every node must see the same run folder; where it does, start again in a minute.",
            )
