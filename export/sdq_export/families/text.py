"""Text encoders as the pipelines use them: the module that is captured gives what the denoiser is told, no more."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["LastHiddenState", "PenultimateAndPooled", "PenultimateHiddenState"]


class LastHiddenState(nn.Module):
    """CLIP's text model or T5's: ``input_ids`` int64 [n, L] to its normalized last hidden state [n, L, D]."""

    def __init__(self, text_encoder: Any) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        return (self.text_encoder(input_ids, return_dict=False)[0],)


class PenultimateHiddenState(nn.Module):
    """CLIP's text model: ``input_ids`` int64 [n, L] to the input of its last layer [n, L, D], not normalized."""

    def __init__(self, text_encoder: Any) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        return (self.text_encoder(input_ids, output_hidden_states=True).hidden_states[-2],)


class PenultimateAndPooled(nn.Module):
    """CLIP's text model with projection: the same [n, L, D], and the projected end mark of the last layer [n, P]."""

    def __init__(self, text_encoder: Any) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        output = self.text_encoder(input_ids, output_hidden_states=True)
        return output.hidden_states[-2], output.text_embeds
