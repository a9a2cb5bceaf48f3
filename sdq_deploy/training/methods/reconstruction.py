"""Method ptq-reconstruction: learned rounding, block by block, towards the teacher's outputs (docs/methods.md).

After Li et al., "BRECQ" (2021), and its use on diffusion models in Li et al., "Q-Diffusion" (2023): a block's inputs
are those of the network quantized so far, its targets the floating-point block's outputs in the teacher. Rounding
variables and the block's activation scales learn together; weight scales stay.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sdq_deploy.recipes.schema import Reconstruction
from sdq_deploy.training.context import TrainingContext
from sdq_deploy.training.curves import draw_curves
from sdq_deploy.training.dataset import load_split
from sdq_deploy.training.fit import learning_rate_factor
from sdq_deploy.training.log import TrainingLog, read_log
from sdq_deploy.training.memory import peak_bytes, reset_peak
from sdq_deploy.training.method import Stage, TrainingMethod
from sdq_deploy.training.methods.blocks import (
    Block,
    BlockInputs,
    block_inputs,
    block_outputs,
    find_blocks,
    pick_samples,
    run_block,
)
from sdq_deploy.training.methods.checks import check_reconstruction
from sdq_deploy.training.methods.rounding import (
    begin_rounding,
    finish_rounding,
    rounding_beta,
    rounding_regularizer,
)
from sdq_deploy.training.prompts import stable_seed
from sdq_deploy.training.result import write_result
from sdq_deploy.training.resume import drop_resume, read_resume, write_resume
from sdq_deploy.training.sensitivity import spread_rows
from sdq_deploy.training.stages import DATA
from sdq_deploy.training.student import Student
from sdq_deploy.training.trajectory import trajectory_snr

__all__ = ["METHOD", "BlockFit", "Reconstructing", "block_error", "reconstruct"]

#: Iterations between two records of the log.
LOG_EVERY = 50


def reconstruct(context: TrainingContext, inputs: str) -> dict[str, Any]:
    """Stage fit: reconstruct every block, from the resume point if there is one.

    Args:
        context: the training.
        inputs: hash of all that the result depends on; a resume point made from other inputs is ignored.

    Returns:
        Every block's error before and after, and the peak of memory in bytes.
    """
    reset_peak(context.device)
    work = Reconstructing(context, inputs)
    work.run()
    draw_curves(read_log(context.folder.log), context.folder.curves)
    drop_resume(context.folder.fit)
    return {"blocks": work.figures, "peak_memory_bytes": peak_bytes(context.device)}


def block_error(output: Tensor, target: Tensor) -> Tensor:
    """The squared error summed over channels (dimension 1), averaged over everything else, as BRECQ counts it."""
    return (output.float() - target.float()).square().sum(dim=1).mean()


class BlockFit:
    """The optimization of one block.

    Args:
        student: whose block it is; its quantizers are changed in place.
        block: which.
        settings: of the recipe.
        seed: of the batches, with the block's name.
    """

    def __init__(self, student: Student, block: Block, settings: Reconstruction, seed: int) -> None:
        self.student, self.block, self.settings, self.seed = student, block, settings, seed
        self.iteration = 0
        student.denoiser.requires_grad_(False)
        self.rounding = [
            begin_rounding(student.weight_quantizers[layer], student.weight(layer)) for layer in block.layers
        ]
        self.scales = [student.activation_quantizers[name].log_scale.requires_grad_(True) for name in block.activations]
        self.optimizer = torch.optim.Adam(
            [
                {"params": self.rounding, "lr": settings.rounding_lr},
                {"params": self.scales, "lr": settings.activation_scale_lr},
            ]
        )

    def step(self, inputs: BlockInputs, targets: Tensor) -> dict[str, float]:
        """One iteration on a batch of samples; returns its loss and its error alone."""
        settings, device = self.settings, self.rounding[0].device
        # The rounding's rate stays, the scales' falls along a cosine, as Q-Diffusion does.
        falling = learning_rate_factor(self.iteration, settings.iterations, 0)
        self.optimizer.param_groups[1]["lr"] = settings.activation_scale_lr * falling
        rows = self._rows(len(targets))
        output = run_block(self.student.denoiser, self.block, inputs.rows(rows, device))
        error = block_error(output, targets[rows].to(device))
        loss = error
        beta = rounding_beta(
            self.iteration, settings.iterations, settings.warmup, settings.beta_start, settings.beta_end
        )
        if beta is not None:
            regularizers = [rounding_regularizer(variables, beta) for variables in self.rounding]
            loss = error + settings.regularizer * torch.stack(regularizers).sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.iteration += 1
        return {"loss": loss.item(), "loss_output": error.item(), "lr_weights": settings.rounding_lr}

    def finish(self) -> None:
        """Fix what was learned."""
        for layer in self.block.layers:
            finish_rounding(self.student.weight_quantizers[layer], self.student.weight(layer))
        for scale in self.scales:
            scale.requires_grad_(False)

    def state_dict(self) -> dict[str, Any]:
        """For the resume point."""
        learned = [parameter.detach() for parameter in (*self.rounding, *self.scales)]
        return {"iteration": self.iteration, "learned": learned, "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from a resume point."""
        self.iteration = saved["iteration"]
        for parameter, value in zip((*self.rounding, *self.scales), saved["learned"], strict=True):
            parameter.copy_(value)
        self.optimizer.load_state_dict(saved["optimizer"])

    def _rows(self, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(stable_seed(self.seed, self.block.name, self.iteration))
        return torch.randperm(count, generator=generator)[: self.settings.batch_size]


class Reconstructing:
    """The state of one reconstruction: the student, its finished blocks, and the one under way."""

    def __init__(self, context: TrainingContext, inputs: str) -> None:
        self.context, self.inputs, self.settings = context, inputs, context.recipe.reconstruction
        self.folder = context.folder.fit
        self.folder.mkdir(parents=True, exist_ok=True)
        self.student = Student(
            context.source.denoiser, context.timesteps, context.spec, load_file(context.folder.scales)
        )
        self.student.denoiser.to(context.device).requires_grad_(False)
        data, self.held_out = (load_split(context.folder.dataset, name) for name in ("training", "validation"))
        self.samples = pick_samples(data, spread_rows(data, self.settings.samples))
        self.blocks = find_blocks(context.teacher, context.spec, self.samples)
        self.figures: list[dict[str, Any]] = []
        self.start_db: float | None = None
        self.under_way: dict[str, Any] | None = None

    def run(self) -> None:
        """All blocks from here to the last, then the result: the better of start and end."""
        self._load_resume()
        total, each = len(self.blocks) * self.settings.iterations, self.settings.iterations
        done = len(self.figures) * each + (self.under_way["iteration"] if self.under_way else 0)
        with TrainingLog(self.context.folder.log, done, True) as log, self.context.bar("fit", total, done) as advance:
            if self.start_db is None:
                self.start_db = self._measure(0)
                log.write(0, {"trajectory_snr_db": self.start_db})
            for block in self.blocks[len(self.figures) :]:
                self._reconstruct(block, log, advance)
            log.write(total, {"trajectory_snr_db": self._measure(total)})

    def _reconstruct(self, block: Block, log: TrainingLog, advance: Any) -> None:
        context, settings = self.context, self.settings
        targets = block_outputs(context.teacher, block, block_inputs(context.teacher, block, self.samples))
        inputs = block_inputs(self.student.denoiser, block, self.samples)
        # By rounding to nearest: what it would be without reconstruction.
        before = float(block_error(block_outputs(self.student.denoiser, block, inputs), targets))
        work = BlockFit(self.student, block, settings, context.seed)
        if self.under_way is not None:
            work.load_state_dict(self.under_way)
            self.under_way = None
        first = len(self.figures) * settings.iterations
        while work.iteration < settings.iterations:
            record = work.step(inputs, targets)
            if work.iteration % LOG_EVERY == 0:
                log.write(first + work.iteration, record)
            advance()
            if work.iteration % settings.checkpoint_every == 0 and work.iteration < settings.iterations:
                self._save_resume(work)
        work.finish()
        after = float(block_error(block_outputs(self.student.denoiser, block, inputs), targets))
        self.figures.append({"block": block.name, "before": before, "after": after})
        self._save_resume(None)

    def _measure(self, iterations: int) -> float:
        """Sample the held-out prompts, and keep the state if it is the better one."""
        snr = trajectory_snr(self.context, self.student.denoiser, self.held_out)
        if self.start_db is None or snr > self.start_db:
            start = snr if self.start_db is None else self.start_db
            result = {"start_db": start, "best_db": snr, "best_step": iterations}
            write_result(self.folder, self.student.tensors(), result)
        return snr

    def _save_resume(self, work: BlockFit | None) -> None:
        layers = [layer for block in self.blocks[: len(self.figures)] for layer in block.layers]
        sites = [name for block in self.blocks[: len(self.figures)] for name in block.activations]
        saved = {
            "start_db": self.start_db,
            "figures": self.figures,
            "weights": {layer: self.student.weight(layer).detach() for layer in layers},
            "scales": {name: self.student.activation_quantizers[name].log_scale.detach() for name in sites},
            "under_way": None if work is None else work.state_dict(),
        }
        write_resume(self.folder, self.inputs, saved)

    @torch.no_grad()
    def _load_resume(self) -> None:
        saved = read_resume(self.folder, self.inputs)
        if saved is None:
            return
        self.start_db, self.figures, self.under_way = saved["start_db"], saved["figures"], saved["under_way"]
        for layer, weight in saved["weights"].items():
            self.student.weight(layer).copy_(weight)
        for name, scale in saved["scales"].items():
            self.student.activation_quantizers[name].log_scale.copy_(scale)


def _inputs(context: TrainingContext) -> Any:
    settings = context.recipe.reconstruction.model_dump(mode="json", exclude={"checkpoint_every"})
    return [context.recipe.method, settings, context.seed]


METHOD = TrainingMethod(
    name="ptq-reconstruction",
    fit=Stage("fit", reconstruct, _inputs, DATA),
    groups=lambda recipe: recipe.reconstruction.groups,
    check=check_reconstruction,
)
