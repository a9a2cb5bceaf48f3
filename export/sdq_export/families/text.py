"""Text encoders as the pipelines use them: the module that is captured gives what the denoiser is told, no more.

With `skip`, diffusers' `clip_skip`, prompts are embedded by an earlier layer, and one more output, the last one, is
what negative prompts are embedded as: diffusers passes them through all layers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["LastHiddenState", "PenultimateAndPooled", "PenultimateHiddenState"]


class LastHiddenState(nn.Module):
    """CLIP's text model or T5's: ``input_ids`` int64 [n, L] to its normalized last hidden state [n, L, D].

    Args:
        text_encoder: of transformers.
        skip: of CLIP's, how many layers to leave out before the normalization.
    """

    def __init__(self, text_encoder: Any, skip: int = 0) -> None:
        super().__init__()
        self.text_encoder, self.skip = text_encoder, skip

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        if not self.skip:
            return (self.text_encoder(input_ids, return_dict=False)[0],)
        output = self.text_encoder(input_ids, output_hidden_states=True)
        model = getattr(self.text_encoder, "text_model", self.text_encoder)
        return model.final_layer_norm(output.hidden_states[-1 - self.skip]), output.last_hidden_state


class PenultimateHiddenState(nn.Module):
    """CLIP's text model: ``input_ids`` int64 [n, L] to the input of its last layer [n, L, D], not normalized.

    Args:
        text_encoder: of transformers.
        skip: how many more layers to leave out.
    """

    def __init__(self, text_encoder: Any, skip: int = 0) -> None:
        super().__init__()
        self.text_encoder, self.skip = text_encoder, skip

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        hidden = self.text_encoder(input_ids, output_hidden_states=True).hidden_states
        return (hidden[-2 - self.skip], hidden[-2]) if self.skip else (hidden[-2],)


class PenultimateAndPooled(nn.Module):
    """CLIP's text model with projection: the same [n, L, D], and the projected end mark of the last layer [n, P].

    Args:
        text_encoder: of transformers.
        skip: how many more layers to leave out of the first.
    """

    def __init__(self, text_encoder: Any, skip: int = 0) -> None:
        super().__init__()
        self.text_encoder, self.skip = text_encoder, skip

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        output = self.text_encoder(input_ids, output_hidden_states=True)
        hidden, pooled = output.hidden_states, output.text_embeds
        return (hidden[-2 - self.skip], pooled, hidden[-2]) if self.skip else (hidden[-2], pooled)
