"""Load a source checkpoint: a local diffusers folder or a hub id, safetensors only."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from sdq_engines.errors import SdqError
from sdq_export.configs import check_config, read_json
from sdq_export.embeddings import Embedding, check_embeddings, learn
from sdq_export.families import Family, family_of_checkpoint
from sdq_export.families.shift import settle_shift
from sdq_export.hub import fetch_checkpoint
from sdq_export.inpainting import remember_whole_mask
from sdq_export.loading import load_model, load_tokenizer, naming
from sdq_export.model_index import part_class, repair, scheduler_class
from sdq_export.quantspec import QuantSpec
from sdq_export.sampler import make_scheduler
from sdq_export.shortcuts import split_shortcuts
from sdq_export.skeleton import load_skeleton
from sdq_export.source_files import SourceFiles, identity_of
from sdq_export.text_settings import TextSettings

__all__ = ["Source", "load_source"]

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

_COPIED_BYTES = 256 << 20
"""A larger part is read from disk a second time rather than copied in memory."""


class Source:
    """A checkpoint in diffusers' layout. Parts load on first use: torch, FP32, eval, on the CPU.

    Args:
        folder: the local folder.
        model: what the user named, a path or a hub id.
        revision: the hub's revision, if any.

    Raises:
        SdqError: its pipeline is of no supported family, or model_index.json is not valid JSON.
    """

    def __init__(self, folder: Path, model: str, revision: str | None) -> None:
        self.folder, self.model, self.revision = folder, model, revision
        self.splits_shortcuts = False
        self.text = TextSettings()
        self.embeddings: tuple[Embedding, ...] = ()
        self.index: dict[str, Any] = read_json(folder, "model_index.json", model)
        self.kind_of_family = family_of_checkpoint(folder, model, self.index)
        self.files = SourceFiles(folder, self.kind_of_family.parts)
        self._parts: dict[str, Any] = {}

    @property
    def family(self) -> Family:
        """What differs between families, for this checkpoint."""
        return self.kind_of_family(self)

    @cached_property
    def hashes(self) -> dict[str, str]:
        """Part -> hash over the files of it that are read, model_index.json among them (`source_files`)."""
        return self.files.hashes()

    @cached_property
    def sha256(self) -> str:
        """One hash over all parts, in hexadecimal."""
        return identity_of(self.hashes)

    @property
    def weighted_parts(self) -> list[str]:
        """The parts that have weights: denoiser, VAE, text encoders."""
        return self.files.weighted

    def part(self, name: str) -> Any:
        """A model or tokenizer of the family's `parts`, loaded once.

        Raises:
            SdqError: its files are damaged, or of another class than the family supports.
        """
        if name not in self._parts:
            kind = self.kind(name)
            if name in self.weighted_parts:
                self._parts[name] = self._model(kind, name)
            else:
                self._parts[name] = load_tokenizer(kind, self.folder, name, self.model)
            learn(self.embeddings, self.family.encoders, self, name, self._parts[name])
            if name == self.family.denoiser:
                self._repair(self._parts[name])
                if self.family.network.extra_channels(self._parts[name]):
                    remember_whole_mask(self._parts[name], self.vae)
                if self.splits_shortcuts:
                    self._parts[name] = split_shortcuts(self._parts[name])
        return self._parts[name]

    def own(self, name: str) -> Any:
        """A model of the family's `parts` for the caller to change and to drop.

        A copy; of a large model the loaded one itself, which is read from disk again when it is next asked for, so
        that two are not in memory at once.
        """
        part = self.part(name)
        if sum(parameter.nbytes for parameter in part.parameters()) <= _COPIED_BYTES:
            return copy.deepcopy(part)
        return self._parts.pop(name)

    @cached_property
    def skeleton(self) -> Any:
        """The denoiser's architecture and configuration without its weights, which are not read for it."""
        name = self.family.denoiser
        with naming(f"The {name} of {self.model}"):
            model = load_skeleton(self.kind(name), self.folder / name)
        self._repair(model)
        return split_shortcuts(model) if self.splits_shortcuts else model

    def release(self, name: str) -> None:
        """Forget a loaded part, and with it its memory; it is read again when it is asked for."""
        self._parts.pop(name, None)

    def with_split_shortcuts(self) -> Source:
        """This checkpoint with its denoiser's shortcuts split (`sdq_export.shortcuts`); loaded other parts are shared.

        Raises:
            SdqError: the denoiser is no UNet.
        """
        if self.splits_shortcuts:
            return self
        split = copy.copy(self)
        split._parts = {name: part for name, part in self._parts.items() if name != self.family.denoiser}
        split.splits_shortcuts = True
        split.__dict__.pop("skeleton", None)
        _ = split.skeleton  # refuses what is no UNet
        return split

    @property
    def told(self) -> str:
        """How prompts are read, for what depends on it."""
        return f"{self.text!r} {[(each.name, each.sha256) for each in self.embeddings]}"

    def with_text(self, text: TextSettings, embeddings: Sequence[Embedding] = ()) -> Source:
        """This checkpoint with prompts read as `text` says, and `embeddings` in its tokenizers and text encoders.

        Raises:
            SdqError: an embedding does not fit.
        """
        told = copy.copy(self)
        told.text, told.embeddings = text, (*self.embeddings, *embeddings)
        told._parts = dict(self._parts)
        if embeddings:
            for encoder in self.family.encoders:
                for part in (encoder.component, encoder.tokenizer):
                    told._parts.pop(part, None)
            check_embeddings(told.embeddings, told.family.encoders, told, told.family.pipeline)
        return told

    def for_spec(self, spec: QuantSpec | None) -> Source:
        """This checkpoint with the layers that the sites of `spec` name."""
        return self.with_split_shortcuts() if spec is not None and spec.splits_shortcuts else self

    @property
    def denoiser(self) -> Any:
        """The denoiser, e.g. diffusers' UNet2DConditionModel."""
        return self.part(self.family.denoiser)

    @property
    def vae(self) -> Any:
        """diffusers' AutoencoderKL."""
        return self.part("vae")

    @cached_property
    def scheduler(self) -> Any:
        """The scheduler that the checkpoint names, with its settings as the pipeline's constructor leaves them."""
        kind = scheduler_class(self.index, self.model)
        with naming(f"The scheduler of {self.model} (scheduler/scheduler_config.json)"):
            found = kind.from_pretrained(self.folder / "scheduler", local_files_only=True)
        return settle_shift(self.family, self._repair(self.skeleton, found))

    def scheduler_named(self, name: str | None) -> Any:
        """The scheduler of a command's name, with the checkpoint's noise schedule; None is the checkpoint's own.

        Its settings are as the pipeline's constructor leaves them too, as if the checkpoint had come with it.

        Raises:
            SdqError: there is none of that name.
        """
        if name is None:
            return self.scheduler
        return settle_shift(self.family, self._repair(self.skeleton, make_scheduler(name, self.scheduler.config)))

    def pipeline(self, scheduler: Any, kind: str | None = None) -> Any:
        """diffusers' own pipeline of these parts, silent; `kind` is its class, by default the family's."""
        import diffusers

        made = getattr(diffusers, kind or self.family.pipeline)(
            **{part: self.part(part) for part in self.family.parts},
            scheduler=copy.deepcopy(scheduler),  # the constructor may change its settings
            **self.family.pipeline_options,
        )
        made.set_progress_bar_config(disable=True)
        return made

    @cached_property
    def license_file(self) -> Path | None:
        """The licence that travels with the package, if the checkpoint brings one."""
        return next(iter(sorted(self.folder.glob("LICENSE*"))), None)

    def kind(self, name: str) -> Any:
        """The class that model_index.json names for a part.

        Raises:
            SdqError: the family does not support it.
        """
        return part_class(self.index, self.kind_of_family, name, self.model)

    def _model(self, kind: Any, name: str) -> Any:
        files, variant = self.files.weights(name), self.files.variant(name)
        return load_model(kind, self.folder, name, self.model, files, variant)

    def _repair(self, denoiser: Any, scheduler: Any = None) -> Any:
        return repair(self.index, self.family.denoiser, self.family.pipeline_options, scheduler, denoiser)


def load_source(model: str | Path, revision: str | None = None, named: str | None = None) -> Source:
    """Find a checkpoint and check that it can be used, before any weight is read.

    Args:
        model: a local folder in diffusers' layout, or a hub id such as "CompVis/stable-diffusion-v1-4".
        revision: branch, tag or commit on the hub.
        named: what the user called it, where `model` was made of that.

    Raises:
        SdqError: it does not exist, is no diffusers folder, is another pipeline, or holds pickles only.
    """
    folder = Path(model).expanduser()
    if not folder.exists():
        folder = fetch_checkpoint(str(model), revision)
    if not (folder / "model_index.json").is_file():
        raise SdqError(
            f"{model} is not a diffusers folder: it has no model_index.json.",
            "Give the folder that has it, or the model as one .safetensors file.",
        )
    source = Source(folder.resolve(), named or str(model), revision)
    for part in source.family.parts:
        kind = source.kind(part)
        if part in source.weighted_parts:
            _check_weights(source, part)
            check_config(kind, source.folder, f"{part}/config.json", source.model)
    scheduler = scheduler_class(source.index, source.model)
    check_config(scheduler, source.folder, "scheduler/scheduler_config.json", source.model)
    return source


def _check_weights(source: Source, part: str) -> None:
    if source.files.weights(part):
        return
    pickles = [file.name for file in (source.folder / part).glob("*") if file.suffix in _PICKLES]
    if pickles:
        raise SdqError(
            f"The {part} of {source.model} comes as a pickle ({pickles[0]}), "
            "and loading a pickle can run any code; safetensors are wanted.",
            "Convert it where you trust it: load it with diffusers and save_pretrained(..., safe_serialization=True).",
        )
    raise SdqError(f"{source.model} has no {part}/*.safetensors.", f"Get the folder {part}/ with its weights.")
