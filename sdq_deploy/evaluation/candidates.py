"""What is compared: packages, training runs and plain models, found, described and hashed before any image is made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from sdq_deploy.models import EMBEDDED, open_model
from sdq_deploy.run_models import open_run_model
from sdq_deploy.training.folder import RunFolder
from sdq_engines.errors import SdqError
from sdq_engines.files import folder_kind, sha256_file
from sdq_engines.package.layout import ENGINES
from sdq_engines.package.store import open_package
from sdq_engines.runtime.pipeline import Pipeline
from sdq_export.checkpoint import CHECKPOINT_FOLDER, SamplerSettings, SourceRef, load_checkpoint
from sdq_export.single_file import FromFile, is_single_file
from sdq_export.source import Source
from sdq_export.text_settings import TextSettings

__all__ = ["Candidate", "digest", "find_reference", "open_candidates"]

#: What the floating-point model is called among the candidates.
REFERENCE = "FP"

Kind = Literal["package", "run", "model"]


@dataclass(frozen=True)
class Candidate:
    """One way to make images. Picklable: worker processes load it themselves.

    Attributes:
        name: unique in the evaluation.
        path: the folder, or a model's hub id or name.
        source: the floating-point checkpoint it was made from; a model's is itself.
        model_folder: of a run or model, where that checkpoint is on this machine.
        sampler: what it was made for; None for a model, which takes any.
        image_size: (height, width) in pixels.
        latent_shape: (C, h, w).
        identity: hash of everything that its images depend on but prompts, seeds and sampler.
        engine: of a package.
        precision: e.g. w4a8; "fp32" for a model.
        num_bytes: a package's size without engines, a run's checkpoint's; None for a model.
        text: how it reads prompts; None for a model, which takes any way.
    """

    name: str
    kind: Kind
    path: str
    source: SourceRef
    sampler: SamplerSettings | None
    image_size: tuple[int, int]
    latent_shape: tuple[int, int, int]
    identity: str
    model_folder: str = ""
    engine: str | None = None
    precision: str = "fp32"
    num_bytes: int | None = None
    text: TextSettings | None = None

    @property
    def images_by(self) -> str:
        """What makes its images, for people."""
        if self.kind == "package":
            return f"package, {self.engine}"
        return "torch, fake quantization" if self.kind == "run" else "torch, FP32"


def open_candidates(
    texts: Sequence[str], engine: str = "auto", reference: str | None = None, from_file: FromFile | None = None
) -> list[Candidate]:
    """Find every candidate that the user named, each as PATH, MODEL or NAME=PATH.

    Args:
        texts: what the user named.
        engine: of packages.
        reference: the floating-point model, if the user named it: a run whose model it is finds it there.
        from_file: how models that are single files are converted.

    Raises:
        SdqError: none is given, one cannot be opened, or two have one name.
    """
    if not texts:
        raise SdqError("There is nothing to evaluate.", "Give packages, runs or models: sdq-deploy evaluate package")
    named = [_split_name(text) for text in texts]
    names = [name or short for (name, _), short in zip(named, _short_names([path for _, path in named]), strict=True)]
    for name in names:
        if name == REFERENCE:
            raise SdqError(f"{name!r} is the reference's name.", "Give the candidate another: evaluate NAME=PATH")
        if names.count(name) > 1:
            raise SdqError(f"Two candidates are named {name!r}.", "Give them names: evaluate NAME=PATH OTHER=PATH")
    return [_open(name, path, engine, reference, from_file) for name, (_, path) in zip(names, named, strict=True)]


def _split_name(text: str) -> tuple[str | None, str]:
    name, found, path = text.partition("=")
    if not found or Path(text).exists() or not name.strip() or "/" in name:
        return None, text
    return name.strip(), path


def _short_names(paths: Sequence[str]) -> list[str]:
    """The last part of each path, or as many as tell them apart."""
    parts = [Path(path).resolve().parts if Path(path).exists() else tuple(path.split("/")) for path in paths]
    names = []
    for own in parts:
        length = 1
        while length < len(own) and sum(other[-length:] == own[-length:] for other in parts) > 1:
            length += 1
        names.append("/".join(own[-length:]).lstrip("/"))
    return names


def _open(name: str, path: str, engine: str, reference: str | None, from_file: FromFile | None) -> Candidate:
    folder = Path(path)
    if folder_kind(folder) == "package" or (folder / "manifest.json").is_file():
        return _open_package(name, folder, engine)
    if folder_kind(folder) == "run" or (folder / "quant.json").is_file():
        return _open_run(name, folder, reference, from_file)
    return _open_model(name, path, from_file=from_file)


def _open_package(name: str, folder: Path, engine: str) -> Candidate:
    # Loading is the only way to know which engine works here; it checks every hash first.
    pipeline = Pipeline.from_package(open_package(folder), engine)
    manifest, entry = pipeline.manifest, pipeline.session.entry
    own = f"{ENGINES}/{pipeline.engine}/"
    files = {
        path: file.sha256
        for path, file in manifest.files.items()
        if not path.startswith(f"{ENGINES}/") or path.startswith(own)
    }
    sampler = manifest.sampler
    return Candidate(
        name=name,
        kind="package",
        path=str(folder),
        source=SourceRef(model=manifest.source.model, revision=manifest.source.revision, sha256=manifest.source.sha256),
        sampler=SamplerSettings(
            scheduler=sampler.scheduler,
            config=sampler.config,
            num_inference_steps=sampler.num_inference_steps,
            guidance_scale=sampler.guidance_scale,
        ),
        image_size=manifest.io.image_size,
        latent_shape=manifest.io.latent_shape,
        identity=digest("package", files, pipeline.engine, entry.version, entry.profile.model_dump(), entry.options),
        engine=pipeline.engine,
        precision=manifest.precision,
        num_bytes=manifest.bytes_without_engines,
        text=TextSettings(
            prompt_chunks=max(text.chunks for text in manifest.text),
            clip_skip=max(text.clip_skip for text in manifest.text),
        ),
    )


def _open_run(name: str, folder: Path, reference: str | None, from_file: FromFile | None) -> Candidate:
    RunFolder(folder).require_finished()
    checkpoint = load_checkpoint(folder)
    inner = folder / CHECKPOINT_FOLDER if (folder / CHECKPOINT_FOLDER).is_dir() else folder
    files = {file.name: sha256_file(file) for file in sorted(inner.iterdir()) if file.is_file()}
    source = _model_of_run(folder, checkpoint.info.source, reference, from_file)
    return Candidate(
        name=name,
        kind="run",
        path=str(folder),
        source=checkpoint.info.source,
        sampler=checkpoint.info.sampler,
        image_size=source.family.image_size,
        latent_shape=source.family.latent_shape,
        identity=digest("run", files, source.hashes),
        model_folder=str(source.folder),
        precision=checkpoint.info.spec.precision,
        num_bytes=sum(file.stat().st_size for file in inner.iterdir() if file.is_file()),
        text=checkpoint.info.text,
    )


def _model_of_run(folder: Path, trained_from: SourceRef, reference: str | None, from_file: FromFile | None) -> Source:
    """The reference where it is the run's own model, which may have been moved; else the model where it was."""
    if reference is not None:
        named = open_model(reference, from_file=from_file)
        if named.sha256 == trained_from.sha256:
            return named
    try:
        return open_run_model(folder, trained_from)
    except SdqError as error:
        raise SdqError(error.message, "Name the model that it was trained from: --reference MODEL") from error


def _open_model(name: str, model: str, revision: str | None = None, from_file: FromFile | None = None) -> Candidate:
    source = open_model(model, revision, from_file if is_single_file(model) else None)
    return Candidate(
        name=name,
        kind="model",
        path=model,
        source=SourceRef(model=model, revision=revision, sha256=source.sha256),
        sampler=None,
        image_size=source.family.image_size,
        latent_shape=source.family.latent_shape,
        identity=digest("model", source.hashes),
        model_folder=str(source.folder),
    )


def digest(*parts: Any) -> str:
    """A hash of these JSON values."""
    # The program's version too: another one may compute otherwise.
    content = json.dumps([metadata.version("sdq-deploy"), *parts], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def find_reference(
    candidates: Sequence[Candidate], reference: str | None = None, from_file: FromFile | None = None
) -> Candidate:
    """The floating-point model that all are held against: the one named, else the one they were made from.

    Raises:
        SdqError: they were made from different models, their model is not what it was, or image sizes differ.
    """
    if reference is not None:
        found = _open_model(REFERENCE, reference, from_file=from_file)
    else:
        found = _common_source(candidates, from_file)
    for candidate in candidates:
        if (candidate.image_size, candidate.latent_shape) != (found.image_size, found.latent_shape):
            raise SdqError(
                f"{candidate.name} makes images of {_pixels(candidate.image_size)} pixels, the reference "
                f"{found.path} of {_pixels(found.image_size)}; they cannot be compared.",
                "Give the model that it was made from with --reference.",
            )
    return found


def _common_source(candidates: Sequence[Candidate], from_file: FromFile | None) -> Candidate:
    quantized = [candidate for candidate in candidates if candidate.kind != "model"]
    if not quantized:
        raise SdqError(
            "Models alone do not say what to compare them with.", "Name the floating-point model: --reference MODEL"
        )
    first = quantized[0]
    for other in quantized[1:]:
        if other.source.sha256 != first.source.sha256:
            raise SdqError(
                f"{first.name} and {other.name} were made from different models "
                f"({first.source.model} and {other.source.model}; their hashes differ).",
                "Name the one to compare both with: --reference MODEL",
            )
    run = next((each for each in quantized if each.kind == "run"), None)
    if run is not None and run.source.model != EMBEDDED and not run.source.revision:
        found = _open_model(REFERENCE, run.model_folder)
    else:
        found = _open_model(REFERENCE, first.source.model, first.source.revision, from_file)
    if found.source.sha256 != first.source.sha256:
        raise SdqError(
            f"{first.name} was made from a {first.source.model} that had another hash than the one here.",
            "Name the model that it was made from: --reference MODEL",
        )
    return found


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"
