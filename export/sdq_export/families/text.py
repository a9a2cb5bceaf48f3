"""Text encoders as the pipelines use them: the module that is captured gives what the denoiser is told, no more."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["LastHiddenState"]


class LastHiddenState(nn.Module):
    """CLIP's text model: ``input_ids`` int64 [n, L] to its normalized last hidden state [n, L, D]."""

    def __init__(self, text_encoder: Any) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        return (self.text_encoder(input_ids, return_dict=False)[0],)
