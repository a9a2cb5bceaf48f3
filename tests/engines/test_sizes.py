"""Image sizes: what is written on the command line, what a profile means for graphs, and what is refused."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from sdq_deploy.cli.main import run
from sdq_engines.backends.profiles import extents, fixed_size
from sdq_engines.errors import SdqError
from sdq_engines.lowering.fix_dims import FixDims
from sdq_engines.package.schema import ModelIO, ShapeProfile
from sdq_engines.package.store import Package
from sdq_engines.sizes import parse_size, profile_of_sizes

FREE = ModelIO(latent_shape=(4, 64, 64), image_size=(512, 512), prologue_outputs=[], size_multiple=64)
ONE = FREE.model_copy(update={"size_multiple": None})


def test_a_size_is_width_by_height() -> None:
    assert parse_size("768x512") == (512, 768)
    for wrong in ("768", "x512", "768*512", "-8x8", "0x64", "64x64x3", "1e3x64"):
        with pytest.raises(SdqError, match="WIDTHxHEIGHT"):
            parse_size(wrong)


def test_sizes_span_a_profile_that_is_tuned_for_the_first() -> None:
    profile = profile_of_sizes(ShapeProfile(batch_max=2), [(512, 768), (768, 512), (640, 640)])
    assert profile.sizes(FREE) == ((512, 512), (512, 768), (768, 768))
    assert profile.batch_max == 2
    assert profile.takes((640, 512), FREE)
    assert not profile.takes((832, 512), FREE)
    same = profile_of_sizes(ShapeProfile(), [])
    assert same == ShapeProfile()
    assert same.sizes(FREE) == ((512, 512),) * 3


def test_extents_of_the_free_dimensions() -> None:
    profile = profile_of_sizes(ShapeProfile(batch_min=1, batch_opt=2, batch_max=4), [(512, 768), (768, 512)])
    denoiser = extents("denoiser", profile, FREE)
    assert denoiser["batch"] == (1, 2, 4)
    assert denoiser["2*batch"] == (2, 4, 8)
    assert denoiser["height"] == (64, 64, 96)
    assert denoiser["width"] == (64, 96, 96)
    encoder = extents("vae_encoder", profile, FREE)
    assert encoder["image_height"] == (512, 512, 768)
    assert encoder["batch"] == (1, 1, 4)
    assert extents("prologue", profile, FREE)["batch"] == (1, 2, 8)
    assert set(extents("denoiser", ShapeProfile(), ONE)) == {"batch", "2*batch"}


def test_only_what_is_of_one_size_is_fixed() -> None:
    def sizes(*wanted: tuple[int, int]) -> list[dict[str, int]]:
        found = fixed_size("denoiser", profile_of_sizes(ShapeProfile(), wanted), FREE)
        return [item.sizes for item in found if isinstance(item, FixDims)]

    assert sizes() == [{"height": 64, "width": 64, "image_height": 512, "image_width": 512}]
    assert sizes((512, 512), (512, 768)) == [{"height": 64, "image_height": 512}]
    assert sizes((512, 512), (768, 768)) == []
    assert fixed_size("denoiser", ShapeProfile(), ONE) == []


def test_names_their_multiples_and_fractions_become_numbers() -> None:
    shapes: dict[str, list[int | str]] = {
        "x": ["batch", 4, "height", "width"],
        "half": ["batch", 4, "height/2", "width/2"],
        "large": ["batch", 4, "8*height", "8*width"],
        "rows": ["batch", "height*width", 4],
    }
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in shapes.items()}
    nodes = [helper.make_node("Relu", ["x"], [name]) for name in ("half", "large", "rows")]
    graph = helper.make_graph(nodes, "g", [values["x"]], [values["half"], values["large"], values["rows"]])
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))
    assert FixDims({"height": 8, "width": 16})(model).modified
    found = {value.name: value.shape for value in (*model.graph.inputs, *model.graph.outputs)}
    assert found["rows"] is None
    dims = {name: [dim if isinstance(dim, int) else dim.value for dim in shape] for name, shape in found.items()
            if shape is not None}  # fmt: skip
    assert dims == {"x": ["batch", 4, 8, 16], "half": ["batch", 4, 4, 8], "large": ["batch", 4, 64, 128]}
    assert not FixDims({"height": 8, "width": 16})(model).modified
    onnx.shape_inference.infer_shapes(ir.to_proto(model))


def test_a_size_that_the_package_does_not_take_is_one_sentence(
    copy: Package, capsys: pytest.CaptureFixture[str], tmp_path: object
) -> None:
    def refused(*arguments: str) -> str:
        with pytest.raises(SystemExit) as caught:
            run(list(arguments))
        assert caught.value.code == 1
        return " ".join(capsys.readouterr().err.split())

    folder = str(copy.folder)
    said = refused("build", folder, "--engine", "openvino", "--size", "128x64")
    assert "make images of 64x64 only; 128x64 was asked for" in said
    assert f"sdq-deploy export RUN --out {folder} --dynamic-size" in said
    assert "WIDTHxHEIGHT" in refused("build", folder, "--engine", "openvino", "--size", "large")
    assert "cannot honour height=128" in refused("run", folder, "red", "--height", "128", "--out", f"{folder}.png")
    assert "needs graphs whose size is free" in refused(
        "export", "shapes-64", "--out", f"{folder}-new", "--size", "64x64"
    )


def test_the_packages_own_size_is_always_taken(copy: Package) -> None:
    from sdq_engines import Pipeline

    pipeline = Pipeline.from_package(copy, "onnxruntime")
    plain = pipeline("red", seed=1).latents
    assert np.array_equal(pipeline("red", seed=1, height=64, width=64).latents, plain)
    assert np.array_equal(pipeline("red", seed=1, width=64).latents, plain)
