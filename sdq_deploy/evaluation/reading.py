"""How prompts are read in an evaluation: by all candidates in the same way, models among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sdq_deploy.evaluation.candidates import Candidate, digest
from sdq_engines.errors import SdqError
from sdq_export.text_settings import TextSettings

__all__ = ["read_alike"]


def read_alike(candidates: Sequence[Candidate], reference: Candidate) -> tuple[list[Candidate], Candidate]:
    """The candidates and the reference, with the models among them reading prompts as the packages and runs do.

    Raises:
        SdqError: packages or runs differ in chunks or skipped layers.
    """
    own = [candidate for candidate in candidates if candidate.text is not None]
    for other in own[1:]:
        if other.text != own[0].text:
            raise SdqError(
                f"{own[0].name} and {other.name} do not read prompts alike: {_said(own[0])} and {_said(other)}.",
                "Evaluate them apart.",
            )
    text = own[0].text if own else None
    if text is None or text == TextSettings():
        return list(candidates), reference
    return [_told(candidate, text) for candidate in candidates], _told(reference, text)


def _told(candidate: Candidate, text: TextSettings) -> Candidate:
    if candidate.text is not None:
        return candidate
    return replace(candidate, text=text, identity=digest(candidate.identity, text.model_dump()))


def _said(candidate: Candidate) -> str:
    text = candidate.text or TextSettings()
    return f"{text.prompt_chunks} chunk(s) and clip_skip {text.clip_skip}"
