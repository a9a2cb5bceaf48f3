"""Textual inversions: a name that a prompt may use, and the vectors that a text encoder reads in its place.

Files are safetensors, in the forms that diffusers' `load_textual_inversion` reads. A name of several vectors becomes
the tokens name, name_1, name_2, ... in the tokenizer, as there; prompts name the first, the runtime adds the others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sdq_engines.errors import SdqError
from sdq_export.parts import Parts

__all__ = ["Embedding", "check_embeddings", "learn", "packed", "parse_embedding", "read_embedding", "unpacked"]

#: Keys of files with vectors for several text encoders: kohya's, and those of diffusers' trainers.
_OF_ENCODERS = {
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "text_encoders_0": "text_encoder",
    "text_encoders_1": "text_encoder_2",
}


_FORMS = "See docs/prompts.md for the forms that are read."


@dataclass(frozen=True, eq=False)
class Embedding:
    """One file: what its name stands for."""

    name: str
    path: Path
    sha256: str
    """Of the file."""
    vectors: dict[str, Tensor]
    """Text encoder -> FP32 [k, D]; under "" where the file does not say for which, and so has them for one."""

    def of(self, component: str) -> Tensor | None:
        """FP32 [k, D] for a text encoder."""
        return self.vectors.get(component, self.vectors.get("") if component == "text_encoder" else None)

    @property
    def tokens(self) -> list[str]:
        """The tokens that its vectors belong to."""
        count = len(next(iter(self.vectors.values())))
        return [self.name, *(f"{self.name}_{index}" for index in range(1, count))]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Embedding) and (self.name, self.sha256) == (other.name, other.sha256)

    def __hash__(self) -> int:
        return hash((self.name, self.sha256))


class ReadsEmbeddings(Protocol):
    """A text encoder, by the folders of its weights and of its tokenizer."""

    @property
    def component(self) -> str:
        """Of its weights."""

    @property
    def tokenizer(self) -> str:
        """Of its tokenizer."""


def parse_embedding(text: str) -> Embedding:
    """Read `NAME=FILE`.

    Raises:
        SdqError: it is something else, or see `read_embedding`.
    """
    name, equals, file = text.partition("=")
    if not equals or not name or not file:
        raise SdqError(
            f"--embedding takes NAME=FILE, and {text!r} is not that.",
            "For example --embedding my-style=style.safetensors",
        )
    return read_embedding(name, Path(file).expanduser())


def read_embedding(name: str, path: Path) -> Embedding:
    """Read a file of vectors.

    Raises:
        SdqError: a name with white space; a file that is not there, is no safetensors, or holds something else.
    """
    if not name or any(letter.isspace() for letter in name):
        raise SdqError(f"The embedding's name {name!r} is not one word.", "Prompts name it by one word: NAME=FILE.")
    if not path.is_file():
        raise SdqError(f"The embedding {path} does not exist.", "Give a .safetensors file: NAME=FILE.")
    if path.suffix != ".safetensors":
        raise SdqError(
            f"The embedding {path} is no .safetensors file; loading a pickle can run any code.",
            "Convert it where you trust it: safetensors.torch.save_file({'emb_params': vectors}, FILE).",
        )
    from safetensors import SafetensorError
    from safetensors.torch import load

    content = path.read_bytes()
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise SdqError(f"The embedding {path} cannot be read: {error}.", "Get the file again.") from error
    vectors = {component: _checked(tensor, path) for component, tensor in _by_encoder(tensors, path).items()}
    if len({len(each) for each in vectors.values()}) != 1:
        counts = ", ".join(f"{component}: {len(each)}" for component, each in vectors.items())
        raise SdqError(f"The embedding {path} has different numbers of vectors ({counts}).", "Get the file again.")
    return Embedding(name, path, hashlib.sha256(content).hexdigest(), vectors)


def check_embeddings(
    embeddings: Sequence[Embedding], encoders: Iterable[ReadsEmbeddings], checkpoint: Parts, pipeline: str
) -> None:
    """Load the tokenizers, which adds the names to them, and hold the vectors' widths against the encoders'.

    Args:
        embeddings: all of the checkpoint's.
        encoders: its text encoders.
        checkpoint: brings tokenizers and configurations.
        pipeline: diffusers' pipeline.

    Raises:
        SdqError: an embedding that does not fit the model, or a name that stands for something already.
    """
    if pipeline == "StableDiffusion3Pipeline":
        raise SdqError(
            f"{checkpoint.model} is a {pipeline}, whose prompts take no embeddings, as in diffusers.",
            "Leave --embedding out.",
        )
    for encoder in encoders:
        width = _width(checkpoint.folder, encoder.component)
        for embedding in embeddings:
            found = embedding.of(encoder.component)
            if found is None or found.shape[1] != width:
                has = "none" if found is None else f"vectors of width {found.shape[1]}"
                raise SdqError(
                    f"The embedding {embedding.path} has {has} for the {encoder.component} of {checkpoint.model}, "
                    f"which takes width {width}.",
                    "It was made for another model family.",
                )
        checkpoint.part(encoder.tokenizer)


def learn(
    embeddings: Sequence[Embedding], encoders: Iterable[ReadsEmbeddings], checkpoint: Parts, name: str, part: Any
) -> None:
    """Give a tokenizer or text encoder that was just loaded the names or the vectors of the embeddings.

    Args:
        embeddings: all of the checkpoint's.
        encoders: its text encoders.
        checkpoint: brings a text encoder's tokenizer.
        name: of the part.
        part: it.

    Raises:
        SdqError: a name that the tokenizer has already.
    """
    for encoder in encoders if embeddings else ():
        if name == encoder.tokenizer:
            for embedding in embeddings:
                _add_names(part, embedding)
        if name == encoder.component:
            tokenizer = checkpoint.part(encoder.tokenizer)
            for embedding in embeddings:
                vectors = embedding.of(name)
                assert vectors is not None
                _add_vectors(part, [tokenizer.convert_tokens_to_ids(token) for token in embedding.tokens], vectors)


def _add_names(tokenizer: Any, embedding: Embedding) -> None:
    vocabulary = tokenizer.get_vocab()
    for token in [*embedding.tokens, f"{embedding.name}_1"]:
        if token in vocabulary:
            raise SdqError(
                f"The embedding's name {embedding.name!r} is taken: the tokenizer has {token!r} already.",
                "Give it another name: NAME=FILE.",
            )
    tokenizer.add_tokens(embedding.tokens)


def packed(embeddings: Sequence[Embedding]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All of them as the tensors and the notes of one safetensors file; `unpacked` reads it."""
    tensors: dict[str, Tensor] = {}
    notes: dict[str, str] = {}
    for index, embedding in enumerate(embeddings):
        notes[str(index)] = json.dumps([embedding.name, embedding.path.name, embedding.sha256])
        tensors |= {f"{index}.{component}": each.contiguous() for component, each in embedding.vectors.items()}
    return tensors, notes


def unpacked(path: Path) -> list[Embedding]:
    """The embeddings of a file that was written from `packed`.

    Raises:
        SdqError: it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            notes = {int(index): json.loads(note) for index, note in (file.metadata() or {}).items() if index.isdigit()}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        found = []
        for index, (name, original, sha256) in sorted(notes.items()):
            start = f"{index}."
            own = {key[len(start) :]: tensor for key, tensor in tensors.items() if key.startswith(start)}
            found.append(Embedding(name, path.with_name(original), sha256, own))
    except (OSError, SafetensorError, ValueError) as error:
        raise SdqError(f"The embeddings in {path} are damaged: {error}.", "Train the run again.") from error
    return found


@torch.no_grad()
def _add_vectors(encoder: Any, ids: list[int], vectors: Tensor) -> None:
    rows = encoder.get_input_embeddings().weight.shape[0]
    if max(ids) >= rows:
        encoder.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        encoder.requires_grad_(False)
    encoder.get_input_embeddings().weight[ids] = vectors


def _width(folder: Path, component: str) -> int:
    config = json.loads((folder / component / "config.json").read_text(encoding="utf-8"))
    return int(config["hidden_size"])


def _by_encoder(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    if tensors and set(tensors) <= set(_OF_ENCODERS) and len(tensors) == len({_OF_ENCODERS[key] for key in tensors}):
        return {_OF_ENCODERS[key]: tensor for key, tensor in tensors.items()}
    if len(tensors) == 1:
        return {"": next(iter(tensors.values()))}
    keys = ", ".join(sorted(tensors)[:5]) or "nothing"
    raise SdqError(
        f"The embedding {path} holds {keys}; one tensor, or clip_l and clip_g, are wanted.",
        _FORMS,
    )


def _checked(tensor: Tensor, path: Path) -> Tensor:
    """FP32 [k, D]."""
    vectors = tensor.float()
    vectors = vectors[None] if vectors.ndim == 1 else vectors
    if vectors.ndim != 2 or not vectors.numel():
        raise SdqError(f"The embedding {path} is a tensor {list(tensor.shape)}; rows of vectors are wanted.", _FORMS)
    if not torch.isfinite(vectors).all():
        raise SdqError(f"The embedding {path} holds NaN or infinity.", "Get the file again.")
    return vectors
