"""A single file becomes a diffusers folder, part by part, by the code of diffusers' `from_single_file`.

diffusers leaves out what it does not know and fills in what it does not find; here both are refused, by names.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdq_engines.errors import SdqError
from sdq_engines.files import atomic_write_json, atomic_write_text, sha256_file
from sdq_engines.places import cache_folder
from sdq_export.families import Family
from sdq_export.file_parts import load_part
from sdq_export.hub import unavailable
from sdq_export.published import write_configuration
from sdq_export.single_file import FromFile, Header, read_header
from sdq_export.source import Source

__all__ = ["configuration", "convert_file", "converted_folder", "family_of_file", "file_identity"]

_CONFIGURATION = ["*.json", "*.txt", "*.model"]
#: diffusers' word for an architecture -> the published configuration that has it; inpainting or not.
_PUBLISHED = {
    "v1": ("sd14", False),
    "inpainting": ("sd14", True),
    "v2": ("sd21", False),
    "xl_base": ("sdxl", False),
    "xl_inpaint": ("sdxl", True),
    "sd3": ("sd3", False),
}
_OPTIONAL = ("text_encoder_3", "tokenizer_3")


def converted_folder(path: Path, options: FromFile) -> Path:
    """The file as a diffusers folder in the cache, made if it is not there.

    Raises:
        SdqError: it cannot be converted.
    """
    folder = cache_folder() / "models" / file_identity(path, options)[:32]
    if (folder / "model_index.json").is_file():
        return folder
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        convert_file(path, options, temporary)
        try:
            os.replace(temporary, folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    except OSError as error:
        raise SdqError(
            f"The file {path} could not be converted into {folder.parent}: {error.strerror or error}.",
            "SDQ_CACHE_DIR names another place for the cache.",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def family_of_file(path: Path, options: FromFile) -> type[Family]:
    """The family of the model in a file.

    Raises:
        SdqError: it is of none that is supported, or its configuration cannot be had.
    """
    with configuration(read_header(path), options) as folder:
        return Source(folder, str(path), None).kind_of_family


def file_identity(path: Path, options: FromFile) -> str:
    """Hash of all that the converted model depends on, in hexadecimal."""
    header = read_header(path.expanduser())
    with configuration(header, options) as folder:
        texts = [f"{name} {sha256_file(folder / name)}" for name in _relative(folder)]
        lacking = [part for part in Source(folder, str(path), None).weighted_parts if not header.keys_of(part)]
    vae = [sha256_file(options.vae_from)] if options.vae_from else []
    weights = [sha256_file(each) for part in lacking for each in _weights_of_config(options, part)]
    return hashlib.sha256(json.dumps([sha256_file(path.expanduser()), texts, vae, weights]).encode()).hexdigest()


def convert_file(path: Path, options: FromFile, folder: Path) -> None:
    """Write a diffusers folder of a single file; one part is in memory at a time, stored as the file stores it.

    Args:
        path: the file.
        options: where its configuration is, and its VAE.
        folder: does not exist yet.

    Raises:
        SdqError: a part is missing, or is of another architecture than its configuration.
    """
    header = read_header(path.expanduser())
    vae = read_header(options.vae_from) if options.vae_from else None
    with configuration(header, options) as config:
        index = json.loads((config / "model_index.json").read_text("utf-8"))
        source = Source(config, str(path), None)
        said: list[str] = []
        shutil.copytree(config, folder, dirs_exist_ok=True)
        for part in source.weighted_parts:
            own = vae if part == "vae" and vae is not None else header
            keys = own.keys_of(part) or (list(own.shapes) if own is vae else [])
            if keys:
                model: Any = load_part(source, part, own, keys)
                model.save_pretrained(folder / part, safe_serialization=True)
            else:
                _take_from_config(options, part, folder, path, said)
        if index.get(_OPTIONAL[0]) == [None, None]:
            said.append("It is without its third text encoder, as the pipeline may be.")
    atomic_write_text(folder / "NOTICE", _notice(path, header, options, said))
    atomic_write_json(folder / "model_index.json", index)


@contextmanager
def configuration(header: Header, options: FromFile) -> Iterator[Path]:
    """A temporary diffusers folder that has the model's configuration and tokenizers, and no weights.

    Raises:
        SdqError: it cannot be had.
    """
    with tempfile.TemporaryDirectory(prefix="sdq-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        given = None if options.config is None else _given(options.config)
        if given is None or not (given / "model_index.json").is_file():
            _infer(header, folder, given)
        if given is not None:
            for name in _relative(given):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(given / name, folder / name)
        has_third = bool(header.keys_of(_OPTIONAL[0]) or _weights_of_config(options, _OPTIONAL[0]))
        index = _simplified_index(folder, () if has_third else _OPTIONAL)
        _require_tokenizers(header, folder, index)
        yield folder


def _given(config: str) -> Path:
    """The folder that --config names, or the files of a hub id."""
    folder = Path(config).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or config.count("/") != 1:
        raise SdqError(
            f"--config takes a diffusers folder or a hub id, and {config} is neither.",
            "Give a diffusers folder of the same architecture, or a folder that has its tokenizer/.",
        )
    return _from_hub(config)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[f"*/{each}" for each in _CONFIGURATION] + ["*.json"]))
    except Exception as error:  # The hub client raises a dozen types for "not there" and "no network" alike.
        hint = "Check the name, or download it elsewhere and give the folder: --config FOLDER"
        raise unavailable(f"The configuration {name}", error, hint) from error


def _infer(header: Header, folder: Path, given: Path | None) -> None:
    """The published configuration of the file's architecture, from here, or from the hub where the user gave none."""
    from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS, infer_diffusers_model_type

    try:
        kind = infer_diffusers_model_type(header.hollow())
    except (KeyError, AttributeError, UnboundLocalError, IndexError) as error:
        raise _unknown(header) from error
    if not (header.keys_of("unet") or (kind.startswith("sd3") and header.keys_of("transformer"))):
        raise _unknown(header)
    name, inpainting = _PUBLISHED.get(kind, (None, False))
    if name is not None:
        write_configuration(name, folder, inpainting=inpainting)
    elif given is not None:
        raise SdqError(
            f"The configuration of {header.path} ({kind}) cannot be inferred, and --config has no model_index.json.",
            "Give a whole diffusers folder of the same architecture with --config.",
        )
    if given is not None:
        return
    hub = DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]
    try:
        found = _from_hub(hub)
    except SdqError as error:
        raise SdqError(
            f"The file {header.path} holds no tokenizer, and {hub}, which has it, is not to be had. {error.message}",
            "Give a diffusers folder of the same architecture, or a folder that has its tokenizer/: --config FOLDER",
        ) from error
    for path in _relative(found):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(found / path, folder / path)


def _unknown(header: Header) -> SdqError:
    some = ", ".join(list(header.shapes)[:3]) or "none"
    return SdqError(
        f"The file {header.path} is not a whole Stable Diffusion model: its keys are {some}, ...",
        "Give the file of a whole model, or the diffusers folder that this part belongs to.",
    )


def _simplified_index(folder: Path, without: tuple[str, ...]) -> dict[str, Any]:
    """model_index.json without the parts that no single file has, and without those named; their folders go too."""
    path = folder / "model_index.json"
    try:
        index: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SdqError(f"The model_index.json of --config is not valid JSON: {error}.", "Give another.") from error
    dropped = [name for name in ("safety_checker", "feature_extractor", "image_encoder", *without) if name in index]
    for name in dropped:
        shutil.rmtree(folder / name, ignore_errors=True)
    index |= {name: [None, None] for name in dropped}
    path.write_text(json.dumps(index, indent=2), "utf-8")
    return index


def _require_tokenizers(header: Header, folder: Path, index: dict[str, Any]) -> None:
    for part, named in index.items():
        if (
            part.startswith("tokenizer")
            and isinstance(named, list)
            and all(named)
            and not any((folder / part).glob("*"))
        ):
            raise SdqError(
                f"The configuration for {header.path} has no {part}/, and a single file holds no vocabulary.",
                f"Give a folder that has it: --config FOLDER, with FOLDER/{part}/",
            )


def _take_from_config(options: FromFile, part: str, folder: Path, path: Path, said: list[str]) -> None:
    """A part that the file lacks, where the user's configuration folder has it.

    Raises:
        SdqError: it has not.
    """
    if weights := _weights_of_config(options, part):
        for each in [*weights, *sorted(weights[0].parent.glob("*.json"))]:
            shutil.copyfile(each, folder / part / each.name)
        said.append(f"Its {part} is that of {options.config}, for the file holds none.")
        return
    hint = (
        "Give the file of a VAE: --vae-from FILE"
        if part == "vae"
        else f"Give a diffusers folder that has it: --config FOLDER, with the weights of {part}/"
    )
    raise SdqError(f"The file {path} holds no {part}.", hint)


def _notice(path: Path, header: Header, options: FromFile, said: list[str]) -> str:
    ema = any(key.startswith("model_ema.") for key in header.shapes)
    sentences = [
        f"This model was converted by sdq-deploy from the single file {path.name}.",
        "The file does not say under which licence it may be used.",
        *([f"Its VAE is that of {options.vae_from.name}."] if options.vae_from else []),
        *(["It holds averaged (EMA) weights too; those beside them were taken, as diffusers does."] if ema else []),
        *said,
    ]
    return "\n".join(sentences) + "\n"


def _weights_of_config(options: FromFile, part: str) -> list[Path]:
    if options.config is None:
        return []
    return sorted((Path(options.config).expanduser() / part).glob("*.safetensors"))


def _relative(folder: Path) -> list[str]:
    """Files of a configuration, their paths relative to its folder; indices of sharded weights are none of it."""
    found = {path for each in _CONFIGURATION for path in [*folder.glob(each), *folder.glob(f"*/{each}")]}
    names = (path.relative_to(folder).as_posix() for path in found if path.is_file())
    return sorted(name for name in names if ".safetensors" not in name and ".bin.index" not in name)
