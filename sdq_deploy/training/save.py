"""Stage save: the best state as a quantized checkpoint."""

from __future__ import annotations

from safetensors.torch import load_file

from sdq_deploy.training.context import TrainingContext
from sdq_deploy.training.result import BEST, read_result
from sdq_export.checkpoint import CHECKPOINT_FOLDER, CheckpointInfo, save_checkpoint

__all__ = ["save"]


def save(context: TrainingContext) -> None:
    """Write RUN/checkpoint from the fit's best state."""
    result = read_result(context.folder.fit)
    notes = {
        "method": context.recipe.method,
        "trajectory_snr_db": {"start": result["start_db"], "best": result["best_db"]},
        "best_step": result["best_step"],
        "measured": context.folder.read_status()["stages"]["fit"].get("measured", {}),
        "recipe": context.recipe.model_dump(mode="json"),
        "seed": context.seed,
    }
    info = CheckpointInfo(
        spec=context.spec,
        sampler=context.sampler_settings,
        source=context.source_ref,
        text=context.text,
        notes=notes,
    )
    with context.bar("save", 1) as advance:
        tensors = load_file(context.folder.fit / BEST)
        save_checkpoint(context.folder.path / CHECKPOINT_FOLDER, info, tensors, context.source.embeddings)
        advance()
