"""Runs that begin from an image: against a loop written out here, and what callers may hand in."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdq_engines import Pipeline
from sdq_engines.backends.onnxruntime import OnnxRuntimeComponent, open_session
from sdq_engines.errors import SdqError
from sdq_engines.package.store import Package
from sdq_engines.runtime.loop import StepEvent
from sdq_engines.runtime.noise import NoiseStream
from sdq_engines.runtime.pictures import mask_pixels, one_each, open_picture, pixels
from sdq_engines.runtime.sampler import SamplerTables

PROMPT = "a red circle on the left of a blue square"
ENGINES = ["onnxruntime", "openvino"]


@pytest.fixture
def package(full: Package) -> Package:
    return full


def photo(seed: int = 0, size: tuple[int, int] = (64, 64)) -> Image.Image:
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def mask() -> np.ndarray:
    made = np.zeros((64, 64), bool)
    made[10:40, 20:60] = True
    return made


def by_hand(package: Package, image: Image.Image, painted: np.ndarray | None, first: int, seed: int) -> np.ndarray:
    """The whole run with plain calls, following docs/package-format.md to the letter, guidance 3."""
    graph = {
        name: OnnxRuntimeComponent(open_session(package.component(name)), "cpu") for name in package.manifest.components
    }
    text = Pipeline.from_package(package, "onnxruntime").prompts
    feeds = graph["prologue"].run(text.encode(["", PROMPT]))
    tables = SamplerTables.load(package.path("sampler.safetensors"), package.manifest.sampler)
    stream, shape = NoiseStream(seed), (4, 8, 8)
    moments = graph["vae_encoder"].run(
        {"images": (np.asarray(image, np.float32) / 127.5 - 1).transpose(2, 0, 1)[None]}
    )["latent_moments"]
    clean = moments[:, :4] + moments[:, 4:] * stream.normal(shape)
    noise = stream.normal(shape)
    if painted is not None:
        stream.normal(shape)  # of the masked image, which this denoiser does not take
    feeds["latents"] = tables.noising[first, 0] * clean + tables.noising[first, 1] * noise
    feeds["history"] = np.zeros((1, 1, *shape), np.float32)
    feeds["guidance_scale"] = np.float32(3)
    for step in range(first, 4):
        feeds |= {"step": np.int64(step), "coefficients": tables.coefficients[first, step]}
        feeds["noise"] = stream.normal(shape)[None]
        out = graph["denoiser"].run({name: np.asarray(value, getattr(value, "dtype", None)) for name, value in
                                     feeds.items()})  # fmt: skip
        feeds |= {"latents": out["latents_out"], "history": out["history_out"]}
        if painted is not None:
            keep, add = tables.noising[step + 1] if step < 3 else (1, 0)
            outside = (keep * clean + add * noise).astype(np.float32)
            feeds["latents"] = np.where(painted[::8, ::8], feeds["latents"], outside)
    return feeds["latents"]


def relative(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.linalg.norm(left - right) / np.linalg.norm(right))


@pytest.mark.parametrize("painted", [None, mask()], ids=["image", "image and mask"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_from_an_image_equals_the_steps_by_hand(
    package: Package, engine: str, painted: np.ndarray | None
) -> None:
    pipeline = Pipeline.from_package(package, engine)
    made = pipeline(PROMPT, image=photo(), mask_image=painted, strength=0.5, seed=5, guidance_scale=3.0)
    wanted = by_hand(package, photo(), painted, first=2, seed=5)
    assert relative(made.latents, wanted) < (1e-5 if engine == "onnxruntime" else 2e-2)
    if painted is not None:  # the original comes back where nothing is painted
        other = pipeline(PROMPT, image=photo(), mask_image=painted, strength=0.5, seed=5, guidance_scale=1.0).latents
        kept = ~painted[::8, ::8]
        assert np.array_equal(other[..., kept], made.latents[..., kept])
        assert not np.allclose(other[..., ~kept], made.latents[..., ~kept])


@pytest.mark.parametrize("engine", ENGINES)
def test_images_and_masks_go_with_their_prompts(package: Package, engine: str) -> None:
    pipeline = Pipeline.from_package(package, engine)
    images = [photo(1), photo(2), photo(3)]
    many = pipeline([PROMPT, "green", "star"], image=images, seed=9, num_images_per_prompt=2).latents
    for index in (1, 2, 5):
        prompt = [PROMPT, "green", "star"][index // 2]
        alone = pipeline(prompt, image=images[index // 2], seed=9 + index).latents
        assert relative(alone[0], many[index]) < 1e-2
    one = pipeline([PROMPT, "green"], image=photo(1), seed=9).latents
    assert relative(one[0], many[0]) < 1e-2


def test_strength_chooses_the_steps_and_the_callback_counts_them(package: Package) -> None:
    pipeline = Pipeline.from_package(package, "onnxruntime")
    for strength, steps in ((0.25, 1), (0.3, 1), (0.74, 2), (0.75, 3), (1.0, 4), (None, 3)):
        heard: list[StepEvent] = []
        pipeline(PROMPT, image=photo(), strength=strength, seed=0, callback=heard.append)
        assert [(event.step, event.num_steps) for event in heard] == [(index, steps) for index in range(steps)]
    heard = []
    pipeline(PROMPT, image=photo(), mask_image=mask(), seed=0, callback=heard.append)
    assert len(heard) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": 0.5}, "strength was given without an image"),
        ({"mask_image": mask()}, "mask_image was given without an image"),
        ({"image": photo(), "strength": 0.0}, "strength is 0; it is more than 0 and at most 1"),
        ({"image": photo(), "strength": 1.5}, "strength is 1.5"),
        ({"image": photo(), "strength": 0.1}, "0.1 of 4 steps leaves no step"),
        ({"image": [photo(), photo()]}, "2 images were given for 1 prompts"),
        ({"image": photo(), "mask_image": [mask()] * 3}, "3 mask_images were given for 1 prompts"),
        ({"image": 7}, "image is a int; a PIL image, an array or a file's path is wanted"),
        ({"image": np.zeros((3, 64, 64))}, r"array \[3, 64, 64\]; \[H, W, 3\] or \[H, W\] is wanted.*\n.*transpose"),
        ({"image": np.zeros((0, 64, 3))}, "image has no pixels: 0x64x3"),
        ({"image": np.full((64, 64, 3), 2.0)}, "values from 2 to 2 of float64; 0 to 1 is wanted"),
        ({"image": np.full((64, 64, 3), np.nan)}, "from nan to nan of float64"),
        ({"image": np.full((64, 64, 3), -1)}, "from -1 to -1 of int64, which may mean several things"),
        ({"image": np.ones((64, 64, 3), np.int64)}, "from 1 to 1 of int64, which may mean"),
        ({"image": np.full((64, 64), 200, np.uint16)}, "from 200 to 200 of uint16, which may mean"),
        ({"image": np.full((64, 64), "a")}, "image is an array of <U1"),
        ({"image": Image.new("I", (64, 64), 70000)}, "from 70000 to 70000 of int32"),
        ({"image": Image.new("F", (64, 64), 17.0)}, "from 17 to 17 of float32; 0 to 1"),
        ({"image": photo(), "mask_image": np.zeros((8, 8, 3), np.uint8)}, r"array \[8, 8, 3\]; \[H, W\] is wanted"),
        ({"image": photo(), "mask_image": np.full((8, 8), 1.5)}, "mask_image has values from 1.5 to 1.5"),
        ({"image": "nowhere.png"}, "image: there is no file nowhere.png"),
        ({"image": Path(__file__)}, "is not an image that can be read"),
        ({"image": photo(), "padding_mask_crop": 8}, "cannot honour padding_mask_crop"),
    ],
)
def test_what_cannot_be_an_image_is_one_sentence(package: Package, arguments: dict[str, Any], message: str) -> None:
    pipeline = Pipeline.from_package(package, "onnxruntime")
    with pytest.raises(SdqError) as caught:
        pipeline(PROMPT, **arguments)
    assert re.search(message, str(caught.value)), caught.value


def test_values_that_can_mean_one_thing_only_are_taken(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(0, 65536, 1024, dtype=np.uint16), (64, 1))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    Image.fromarray(ramp).save(tmp_path / "ramp.tif")
    wanted = 2 * (ramp / 65535) - 1
    big_endian = Image.frombytes("I;16B", (64, 64), ramp.astype(">u2").tobytes())
    for given in (
        tmp_path / "ramp.png",
        tmp_path / "ramp.tif",
        ramp,
        big_endian,
        ramp / 65535,
        (ramp // 257).astype(int),
    ):
        made = pixels(open_picture(given, "image"), (64, 64))
        assert np.abs(made - wanted).max() < 2 / 255
        assert mask_pixels(open_picture(given, "mask_image"), (64, 64)).mean() == pytest.approx(0.5, abs=1 / 64)
    grey = np.asarray(photo())[..., 0]
    assert np.array_equal(
        pixels(open_picture(grey[..., None], "image"), (64, 64)), pixels(Image.fromarray(grey), (64, 64))
    )
    several = np.stack([np.asarray(photo(seed)) for seed in range(2)])
    assert [np.array_equal(a, b) for a, b in zip(one_each(several, 2, "image"), several, strict=True)] == [True, True]


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32, np.float16, np.uint16, bool])
def test_a_mask_of_zeros_and_ones_paints_where_it_is_one(dtype: type) -> None:
    painted = mask_pixels(open_picture(mask().astype(dtype), "mask_image"), (64, 64))[0]
    assert np.array_equal(painted, mask())
    if dtype in (np.uint8, np.float32, bool):
        assert np.array_equal(
            mask_pixels(open_picture(Image.fromarray(mask().astype(dtype)), "mask_image"), (64, 64))[0], mask()
        )


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L"])
@pytest.mark.parametrize("least", [0, 1])
def test_an_image_of_zeros_and_ones_is_a_mask_in_any_mode(mode: str, least: int) -> None:
    values = np.maximum(mask().astype(np.uint8), np.uint8(least))
    painted = mask_pixels(Image.fromarray(values).convert(mode), (64, 64))[0]
    assert np.array_equal(painted, values)


def test_what_may_not_be_meant_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert not mask_pixels(Image.new("L", (64, 64)), (64, 64)).any()
        assert "nothing is painted" in caplog.text
        caplog.clear()
        pixels(Image.new("RGBA", (64, 64), (9, 9, 9, 255)), (64, 64))
        assert not caplog.text
        pixels(Image.new("RGBA", (64, 64), (9, 9, 9, 100)), (64, 64))
        assert "transparent in places" in caplog.text


def test_a_package_of_before_says_how_to_get_an_encoder(built: Callable[[str], Package], package: Package) -> None:
    old = Pipeline.from_package(built("w4a8"), "onnxruntime")
    with pytest.raises(SdqError, match="has no VAE encoder, so it cannot start from an image") as refused:
        old(PROMPT, image=photo())
    assert refused.value.hint.startswith("Export it again: sdq-deploy export RUN --out")
    entry = package.manifest.engines["openvino"]
    parts = {name: file for name, file in entry.components.items() if name != "vae_encoder"}
    engines = {"openvino": entry.model_copy(update={"components": parts})}
    other = Package(package.folder, package.manifest.model_copy(update={"engines": engines}))
    with pytest.raises(SdqError, match=r"openvino engine of .* was built without the VAE encoder") as refused:
        Pipeline.from_package(other, "openvino")(PROMPT, image=photo())
    assert "sdq-deploy build" in refused.value.hint


def test_an_image_of_another_size_is_resized_and_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        made = pixels(photo(size=(90, 40)), (64, 48))
    assert "The image is 90x40; it was resized to 48x64" in caplog.text
    assert made.shape == (3, 64, 48)
    assert made.min() >= -1
    assert made.max() <= 1
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        exact = pixels(photo(), (64, 64))
    assert not caplog.text
    assert np.allclose(exact.transpose(1, 2, 0), np.asarray(photo(), np.float32) / 127.5 - 1, atol=1e-6)


def test_masks_are_cut_at_half(tmp_path: Path) -> None:
    grey = np.repeat(np.array([[0, 127, 128, 255]], np.uint8), 4, axis=0)
    assert mask_pixels(Image.fromarray(grey), (4, 4))[0, 0].tolist() == [0, 0, 1, 1]
    coloured = Image.new("RGBA", (4, 4), (255, 255, 255, 0))
    assert mask_pixels(coloured, (4, 4)).all()
    assert mask_pixels(open_picture(np.eye(4, dtype=bool), "mask_image"), (4, 4))[0].tolist() == np.eye(4).tolist()


def test_a_file_is_turned_as_the_camera_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (30, 20)).save(tmp_path / "photo.jpg", exif=exif)
    assert open_picture(tmp_path / "photo.jpg", "image").size == (20, 30)
    assert open_picture(str(tmp_path / "photo.jpg"), "image").size == (20, 30)


def test_a_damaged_file_is_one_sentence(tmp_path: Path) -> None:
    photo().save(tmp_path / "photo.png")
    content = (tmp_path / "photo.png").read_bytes()
    (tmp_path / "photo.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(SdqError, match="is not an image that can be read"):
        open_picture(tmp_path / "photo.png", "image")


def test_an_image_on_the_command_line(package: Package, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sdq_deploy.cli.main import run

    photo().save(tmp_path / "photo.png")
    Image.fromarray(mask()).save(tmp_path / "mask.png")
    out = tmp_path / "out.png"
    arguments = ["run", str(package.folder), PROMPT, "--engine", "onnxruntime", "--seed", "5", "--out", str(out)]
    with pytest.raises(SystemExit) as caught:
        run([*arguments, "--image", str(tmp_path / "photo.png"), "--mask", str(tmp_path / "mask.png"),
             "--strength", "0.5"])  # fmt: skip
    assert caught.value.code == 0, capsys.readouterr().err
    wanted = Pipeline.from_package(package, "onnxruntime")(
        PROMPT, image=photo(), mask_image=mask(), strength=0.5, seed=5
    )
    found, wanted_pixels = (np.asarray(each, np.float32) for each in (Image.open(out), wanted.images[0]))
    assert relative(found, wanted_pixels) < 2e-2
    with pytest.raises(SystemExit) as caught:
        run([*arguments, "--mask", str(tmp_path / "mask.png")])
    assert caught.value.code == 1
    assert "mask_image was given without an image" in capsys.readouterr().err
