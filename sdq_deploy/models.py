"""Names of models that need no path."""

from __future__ import annotations

from pathlib import Path

__all__ = ["EMBEDDED", "resolve_model"]

#: The model that ships with the project.
EMBEDDED = "shapes-64"


def resolve_model(model: str) -> str | Path:
    """The folder of the embedded model for its name; any other path or hub id as it is."""
    if model != EMBEDDED:
        return model
    from sdq_deploy.shapes64 import model_path

    return model_path()
