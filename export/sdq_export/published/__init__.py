"""Published configurations of Stable Diffusion, without weights and vocabularies: `sd14`, `sd21`, `sdxl`, `sd3`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["published", "write_configuration"]


def published(name: str) -> dict[str, Any]:
    """A published configuration: "pipeline" (diffusers' class), "settings", "components" (with their _class_name)."""
    tree: dict[str, Any] = json.loads((Path(__file__).parent / f"{name}.json").read_text("utf-8"))
    return tree


def write_configuration(name: str, folder: Path, *, inpainting: bool = False) -> None:
    """Write a published configuration in diffusers' layout: no weights, and no tokenizers, of which only settings are
    known.

    Args:
        name: of the configuration.
        folder: becomes a diffusers folder.
        inpainting: nine channels into the UNet, and the inpainting pipeline.
    """
    import diffusers
    import torch
    import transformers

    tree = published(name)
    index: dict[str, Any] = {"_class_name": tree["pipeline"], **tree["settings"]}
    for part, settings in tree["components"].items():
        library, kind = settings.pop("_class_name")
        index[part] = [library, kind]
        loaded = getattr({"diffusers": diffusers, "transformers": transformers}[library], kind)
        if inpainting and part == "unet":
            settings["in_channels"] = 9
        if "Tokenizer" in kind:
            continue
        if library == "transformers":
            loaded.config_class(**settings, architectures=[kind]).save_pretrained(folder / part)
            continue
        with torch.device("meta") if issubclass(loaded, torch.nn.Module) else _nothing():
            loaded.from_config(settings).save_config(folder / part)
    if inpainting:
        index["_class_name"] = tree["pipeline"].replace("Pipeline", "InpaintPipeline")
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()
