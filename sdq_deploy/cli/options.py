"""Options that several commands take, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "AssignmentsOption",
    "ClipSkipOption",
    "ConfigOption",
    "CpuOption",
    "EmbeddingOption",
    "JsonOption",
    "NegativePrompt2Option",
    "NegativePrompt3Option",
    "PackageArgument",
    "Prompt2Option",
    "Prompt3Option",
    "PromptChunksOption",
    "RevisionOption",
    "VaeFromOption",
    "WeightingOption",
]

PackageArgument = Annotated[Path, typer.Argument(help="The package's folder.", show_default=False)]

ConfigOption = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="FOLDER|ID",
        help="Where the configuration of a MODEL in one file comes from: a diffusers folder or hub id, or a folder "
        "that has only tokenizer/.",
        show_default=False,
    ),
]
VaeFromOption = Annotated[
    Path | None,
    typer.Option(
        "--vae-from",
        metavar="FILE",
        help="Take the VAE of a MODEL in one file from this other file.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for programs to read.")]

RevisionOption = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub id.")]

AssignmentsOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe; repeatable.")
]

CpuOption = Annotated[bool, typer.Option("--cpu", help="Stay on the CPU although there is a GPU.")]

# How prompts are read: docs/prompts.md.

PromptChunksOption = Annotated[
    int | None,
    typer.Option(
        "--prompt-chunks",
        metavar="N",
        help="Take prompts of up to N chunks of 75 tokens. Every image then pays for all N. "
        "If not given, one chunk, or for a RUN as many as it was trained with.",
        show_default=False,
    ),
]

ClipSkipOption = Annotated[
    int | None,
    typer.Option(
        "--clip-skip",
        metavar="N",
        help="Leave out the last N layers of the CLIP text encoders, as diffusers' clip_skip does. "
        "If not given, none, or for a RUN as many as it was trained with.",
        show_default=False,
    ),
]

EmbeddingOption = Annotated[
    list[str] | None,
    typer.Option(
        "--embedding",
        metavar="NAME=FILE",
        help="Let NAME in a prompt stand for a textual inversion, the vectors of FILE (.safetensors); repeatable.",
        show_default=False,
    ),
]

Prompt2Option = Annotated[
    str | None,
    typer.Option("--prompt-2", help="What a second text encoder reads in place of the prompt.", show_default=False),
]

Prompt3Option = Annotated[
    str | None,
    typer.Option("--prompt-3", help="What a third text encoder reads in place of the prompt.", show_default=False),
]

NegativePrompt2Option = Annotated[
    str | None,
    typer.Option(
        "--negative-prompt-2",
        help="What a second text encoder reads in place of --negative-prompt.",
        show_default=False,
    ),
]

NegativePrompt3Option = Annotated[
    str | None,
    typer.Option(
        "--negative-prompt-3",
        help="What a third text encoder reads in place of --negative-prompt.",
        show_default=False,
    ),
]

WeightingOption = Annotated[
    str | None,
    typer.Option(
        "--weighting",
        help="a1111: read weights in prompts, (word:1.2), as AUTOMATIC1111's web UI does. "
        "If not given, a prompt is taken literally.",
        show_default=False,
    ),
]
