"""Whether a model is the one that something was made from."""

from __future__ import annotations

from collections.abc import Mapping

from sdq_engines.errors import SdqError
from sdq_export.source import Source

__all__ = ["require_same_model"]


def require_same_model(source: Source, sha256: str, parts: Mapping[str, str], what: str, hint: str) -> None:
    """Refuse a model that is not the one which these hashes were taken of.

    Args:
        source: the model that is here.
        sha256: of the other, over all parts.
        parts: of the other, part by part, so that the sentence can name those that differ; may be empty.
        what: begins the sentence, e.g. "The run r was not trained from m".
        hint: what to do.

    Raises:
        SdqError: the hashes differ.
    """
    if source.sha256 == sha256:
        return
    differing = sorted(part for part in {*source.hashes, *parts} if source.hashes.get(part) != parts.get(part))
    named = ", ".join(differing) if parts else "the model"
    raise SdqError(f"{what}: the hash of {named} is not the same.", hint)
