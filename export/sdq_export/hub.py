"""A checkpoint on the Hugging Face hub, fetched: what its family reads, and no more."""

from __future__ import annotations

from pathlib import Path

from sdq_engines.errors import SdqError
from sdq_export.configs import read_json
from sdq_export.families import family_of_checkpoint, parts_named

__all__ = ["fetch_checkpoint", "unavailable"]

_ABOUT = ["model_index.json", "LICENSE*", "NOTICE*", "README.md", "scheduler/*.json"]
_PART = ("*.json", "*.txt", "*.model", "*.safetensors")


def fetch_checkpoint(model: str, revision: str | None) -> Path:
    """The folder of a hub id's files in the hub's own cache.

    Raises:
        SdqError: it is no hub id, is not to be had, or is of no supported family.
    """
    looks_like_id = model.count("/") == 1 and not model.startswith((".", "/", "~"))
    if not looks_like_id:
        raise SdqError(
            f"The model {model} does not exist.", "Give a diffusers folder, a hub id (owner/name), or shapes-64."
        )
    from huggingface_hub import snapshot_download

    def fetch(patterns: list[str]) -> Path:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))

    try:
        folder = fetch(_ABOUT)
        if not (folder / "model_index.json").is_file():
            return folder
        # a hub repository may also hold the whole model as one file, and parts of other pipelines
        index = read_json(folder, "model_index.json", model)
        family_of_checkpoint(folder, model, index)
        return fetch([*_ABOUT, *(f"{part}/{pattern}" for part in parts_named(index) for pattern in _PART)])
    except SdqError:
        raise
    except Exception as error:  # The hub client raises a dozen types for "not there" and "no network" alike.
        raise unavailable(
            f"The model {model}", error, "Check the name, or download it elsewhere and give the folder."
        ) from error


def unavailable(what: str, error: Exception, hint: str) -> SdqError:
    """What the hub client could not get, with the first line of its reason."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return SdqError(f"{what} is neither a local folder nor to be had from the hub: {reason}", hint)
