"""`sdq-deploy build`: engines for a package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdq_deploy.cli.options import JsonOption, PackageArgument
from sdq_deploy.cli.package_output import print_engine, stage_shower
from sdq_deploy.cli.shared import print_json
from sdq_deploy.display.consoles import new_status

if TYPE_CHECKING:
    from sdq_engines.package.schema import ShapeProfile
    from sdq_engines.package.store import Package

__all__ = ["build"]


def build(
    package: PackageArgument,
    engine: Annotated[
        list[str],
        typer.Option("--engine", help="The engine: auto, tensorrt, tensorrt-rtx, openvino or onnxruntime; repeatable."),
    ],
    batch_min: Annotated[int, typer.Option(min=1, help="The fewest images of a call.")] = 1,
    batch_opt: Annotated[int, typer.Option(min=1, help="The images of a call that the engine is tuned for.")] = 1,
    batch_max: Annotated[int, typer.Option(min=1, help="The most images of a call.")] = 4,
    size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WIDTHxHEIGHT",
            help="An image size; repeatable. The engine takes every size from the least to the most of these, and is "
            "tuned for the first. If not given, the package's own; others need an export with --dynamic-size.",
        ),
    ] = None,
    fp32: Annotated[
        list[str] | None,
        typer.Option(
            "--fp32",
            help="A part of the package that is computed in FP32 throughout; repeatable. For NVIDIA engines for "
            "example vae_decoder, for openvino the denoiser, whose long attention is in BF16 otherwise.",
        ),
    ] = None,
    bf16: Annotated[
        list[str] | None,
        typer.Option(
            "--bf16",
            help="A part of the package that NVIDIA engines compute in BF16, for example text_encoder_3; repeatable.",
        ),
    ] = None,
    sm: Annotated[
        list[int] | None,
        typer.Option(
            "--sm",
            help="An NVIDIA architecture that a tensorrt-rtx engine is for, for example 89 (Ada) or 120 (Blackwell); "
            "repeatable. If not given, every one from 80 on that can compute the package.",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Add engines to a package. Needs no torch, so it runs on the machine that will use them.

    Example: sdq-deploy build package --engine tensorrt-rtx --batch-max 4 --size 512x512 --size 768x512
    """
    from sdq_engines.backends.registry import backend, check_engine_name
    from sdq_engines.build import check_options, choose_engine
    from sdq_engines.package.schema import ShapeProfile
    from sdq_engines.package.store import open_package
    from sdq_engines.sizes import parse_size, profile_of_sizes

    for name in engine:
        check_engine_name(name)
    checked = open_package(package)
    names = list(dict.fromkeys(choose_engine(name, checked.manifest.precision) for name in engine))
    _check_components([*(fp32 or []), *(bf16 or [])], list(checked.manifest.components))
    profile = ShapeProfile(batch_min=batch_min, batch_opt=batch_opt, batch_max=batch_max)
    profile = profile_of_sizes(profile, [parse_size(text) for text in size or []])
    options = {name: value for name, value in (("fp32", fp32), ("bf16", bf16), ("sm", sm)) if value}
    check_options(options, names)
    for name in names:
        honoured = {option: value for option, value in options.items() if option in backend(name).build_options}
        checked = _build_one(checked, name, profile, honoured)
        if not json:
            print_engine(name, checked.manifest.engines[name].model_dump())
    if json:
        print_json({name: checked.manifest.engines[name].model_dump(mode="json") for name in names})


def _build_one(package: Package, name: str, profile: ShapeProfile, options: dict[str, Any]) -> Package:
    from sdq_engines.build import build_engine

    with new_status(f"{name}: starting") as status:
        show = stage_shower(status, name)
        return build_engine(package, name, profile, options, lambda part, stage: show(f"{stage} {part}"))


def _check_components(names: list[str], known: list[str]) -> None:
    from sdq_engines.errors import SdqError

    for name in names:
        if name not in known:
            raise SdqError(f"There is no component {name!r}.", f"Components: {', '.join(known)}.")
