"""How prompts are read beyond the checkpoint's own way: in how many chunks, and how many layers are left out."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from sdq_engines.errors import SdqError

__all__ = ["MOST_CHUNKS", "TextSettings", "text_settings"]

#: A denoiser's attention to the prompt costs as much for every chunk, used or not.
MOST_CHUNKS = 16


class TextSettings(BaseModel):
    """The same for training and export: what the denoiser is told of a prompt depends on it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt_chunks: int = Field(default=1, ge=1, le=MOST_CHUNKS)
    """Chunks of a prompt, each of as many tokens as a CLIP text encoder takes (77), marks included."""
    clip_skip: int = Field(default=0, ge=0)
    """Layers at the end of the CLIP text encoders that prompts are not passed through; diffusers' `clip_skip`."""


def text_settings(trained: TextSettings | None, prompt_chunks: int | None, clip_skip: int | None) -> TextSettings:
    """What an export was asked for, else what a training recorded, else the checkpoint's own way.

    Args:
        trained: of the run that is exported; None for a model.
        prompt_chunks: may differ from the training's, since keys and values are each token's own.
        clip_skip: may not, since the scales were learned for those embeddings.

    Raises:
        SdqError: a number out of range, or another clip_skip than the training's.
    """
    own = trained or TextSettings()
    chunks = own.prompt_chunks if prompt_chunks is None else prompt_chunks
    if not 1 <= chunks <= MOST_CHUNKS:
        raise SdqError(f"--prompt-chunks takes 1 to {MOST_CHUNKS}, not {chunks}.", "For example --prompt-chunks 3")
    skip = own.clip_skip if clip_skip is None else clip_skip
    if skip < 0:
        raise SdqError(f"--clip-skip takes 0 or more layers, not {skip}.", "For example --clip-skip 1")
    if trained is not None and skip != trained.clip_skip:
        raise SdqError(
            f"The run was trained with clip_skip {trained.clip_skip}; its scales hold for no other embeddings.",
            "Leave --clip-skip out, or train again with it.",
        )
    return TextSettings(prompt_chunks=chunks, clip_skip=skip)
