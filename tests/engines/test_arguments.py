"""What a caller may hand in for numbers and texts: what can only mean one thing is taken, the rest is one sentence."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sdq_engines import Pipeline
from sdq_engines.arguments import LARGEST, as_number, as_pair, as_text, as_texts, as_whole, as_wholes
from sdq_engines.backends.base import Session
from sdq_engines.errors import SdqError
from sdq_engines.package.store import Package, open_package
from sdq_engines.runtime.wording import negative_wordings, prompt_wordings

Built = Callable[[str], Package]


@pytest.mark.parametrize(
    "value", [7, np.int64(7), np.uint8(7), 7.0, np.float32(7), "7", " 7 ", np.array(7), np.str_("7")]
)
def test_whole_numbers(value: Any) -> None:
    found = as_whole(value, "seed")
    assert (type(found), found) == (int, 7)


@pytest.mark.parametrize(
    "value",
    [7.5, "7.0", "seven", True, np.True_, None, [7], float("nan"), float("inf"), 7j, b"7", "9" * 40, "--7", "²"],
)
def test_what_is_no_whole_number(value: Any) -> None:
    with pytest.raises(SdqError, match=r"^seed is .* a whole number is wanted"):
        as_whole(value, "seed")


@pytest.mark.parametrize("value", [5, 5.0, "5", np.float16(5), np.int8(5), np.array(5.0), "5e0"])
def test_numbers(value: Any) -> None:
    found = as_number(value, "guidance_scale")
    assert (type(found), found) == (float, 5.0)


@pytest.mark.parametrize("value", [1e39, -1e39, "1e39", np.float64(3.5e38), 10**40])
def test_numbers_that_are_too_large_for_fp32(value: Any) -> None:
    with pytest.raises(SdqError, match=r"^guidance_scale is .*, which is too large: numbers are computed in FP32"):
        as_number(value, "guidance_scale")
    with pytest.raises(SdqError, match=r"^target_size is .*, which is too large"):
        as_pair((64, 10**39), "target_size")
    assert np.isfinite(np.float32(as_number(LARGEST, "guidance_scale")))


@pytest.mark.parametrize(
    "value", [float("nan"), float("-inf"), np.float32("inf"), "nan", "five", True, [5, 6], 10**400]
)
def test_what_is_no_number(value: Any) -> None:
    with pytest.raises(SdqError, match=r"^guidance_scale is .* one finite number is wanted"):
        as_number(value, "guidance_scale")


def test_rows_of_numbers_come_from_anything_with_an_order() -> None:
    for row in ([1, 2], (1, 2), np.array([1, 2]), np.array([1.0, 2.0]), range(1, 3), iter(["1", "2"])):
        assert as_wholes(row, "seed") == [1, 2]
    for row in ({1, 2}, {1: 2}, np.ones((1, 2)), b"12"):
        with pytest.raises(SdqError, match="seed is"):
            as_wholes(row, "seed")
    with pytest.raises(SdqError, match=r"seed\[1\] is 2.5"):
        as_wholes([1, 2.5], "seed")
    assert as_pair(np.array([64, 32]), "target_size") == (64, 32)
    for pair in (64, [64], "64", None):
        with pytest.raises(SdqError, match="is not two numbers"):
            as_pair(pair, "target_size")


def test_texts() -> None:
    assert type(as_text(np.str_("a"), "prompt")) is str
    assert as_texts(np.array(["a", "b"]), "prompt") == ["a", "b"]
    assert as_texts(("a",), "prompt") == ["a"]
    # UTF-8 that was read as ASCII, and a character in two halves, can only mean one thing
    assert as_text("caf\udcc3\udca9", "prompt") == "café"
    assert as_text("\ud83d\udd34", "prompt") == "🔴"
    for value in (None, 7, b"a", ["a"], np.array([["a"]])):
        with pytest.raises(SdqError, match=r"^prompt is .* text is wanted"):
            as_text(value, "prompt")
    for value in ("caf\udce9", "\ud83d alone"):
        with pytest.raises(SdqError, match="prompt is no text: its character"):
            as_text(value, "prompt")
    with pytest.raises(SdqError, match=r"prompt\[1\] is None"):
        as_texts(["a", None], "prompt")


def test_a_call_takes_numpy_and_answers_the_rest_in_one_sentence(built: Built) -> None:
    pipeline = Pipeline.from_package(built("w4a8"), "onnxruntime")
    plain = pipeline("a red circle", seed=7, guidance_scale=3.0, height=64).latents
    for seed in (np.int64(7), 7.0, "7", np.array([7])):
        made = pipeline(np.str_("a red circle"), seed=seed, guidance_scale=np.float32(3), height=64.0)  # type: ignore[arg-type]
        assert np.array_equal(made.latents, plain)
        assert all(type(number) is int for number in made.seeds)
    many: dict[str, Any] = {"num_images_per_prompt": np.int32(2), "num_inference_steps": 4.0, "eta": 0.0}
    assert pipeline("a red circle", seed=7, guidance_scale=3, **many).seeds == [7, 8]
    nothing: dict[str, Any] = {
        "guidance_rescale": np.float32(0), "eta": np.float64(0), "clip_skip": np.int64(0), "return_dict": np.True_
    }  # fmt: skip
    assert np.array_equal(pipeline("a red circle", seed=7, guidance_scale=3, **nothing).latents, plain)
    assert np.array_equal(
        pipeline("a", seed=1, guidance_scale=-2.0).latents, pipeline("a", seed=1, guidance_scale=1).latents
    )
    wrong: list[dict[str, Any]] = [
        {"prompt": None}, {"prompt": "caf\udce9"}, {"prompt": []}, {"prompt": {"a"}}, {"negative_prompt": [None]},
        {"seed": True}, {"seed": [1.5]}, {"seed": "x"}, {"num_images_per_prompt": 1.5}, {"num_images_per_prompt": None},
        {"guidance_scale": float("nan")}, {"guidance_scale": [5, 6]}, {"guidance_scale": True}, {"height": "big"},
        {"num_inference_steps": True}, {"scheduler": 3}, {"strength": "much", "image": np.zeros((64, 64, 3), np.uint8)},
        {"target_size": 64}, {"prompt_weighting": "compel"}, {"prompt_2": "a"}, {"negative_prompt_3": "a"},
        {"guidance_scale": 1e39}, {"callback": 5}, {"clip_skip": np.int64(1)}, {"eta": np.float32(0.5)},
        {"prompt": "(red:1" + 39 * "0" + ")", "prompt_weighting": True},
        {"prompt": 14 * "(" + "red" + 14 * ":1000)", "prompt_weighting": True},
    ]  # fmt: skip
    for arguments in wrong:
        with pytest.raises(SdqError):
            pipeline(**{"prompt": "a red circle", "seed": 7, **arguments})


@pytest.mark.parametrize("folder", [None, 5, b"package", ["package"]])
def test_a_folder_that_is_none_is_one_sentence(folder: Any) -> None:
    with pytest.raises(SdqError, match=r"^folder is .*; the path of a folder is wanted"):
        Pipeline.load(folder)
    with pytest.raises(SdqError, match=r"^folder is .*; the path of a folder is wanted"):
        open_package(folder)


class Watched(Pipeline):
    """A pipeline that knows which of the prologue's outputs are still held."""

    def __init__(self, package: Package, session: Session) -> None:
        super().__init__(package, session)
        self.made: list[weakref.ref[Any]] = []

    def prologue(self, inputs: Any) -> Any:
        """As ever, each text's first output remembered."""
        outputs = super().prologue(inputs)
        self.made.append(weakref.ref(next(iter(outputs.values()))))
        return outputs

    def held(self) -> int:
        """Texts whose outputs are in memory."""
        return sum(reference() is not None for reference in self.made)


def test_a_call_holds_the_texts_of_one_batch(built: Built) -> None:
    pipeline = Watched.from_package(built("w4a8"), "onnxruntime")
    most = pipeline.session.entry.profile.batch_max
    prompts = [f"a red circle number {index}" for index in range(2 * most + 1)]
    held: list[int] = []
    many = pipeline(prompts, seed=3, guidance_scale=3, callback=lambda event: held.append(pipeline.held()))
    assert len(pipeline.made) == len(prompts) + 1, "each text is computed once, the negative one too"
    assert max(held) == most + 1
    assert pipeline.held() == 0
    last = pipeline(prompts[-1], seed=3 + 2 * most, guidance_scale=3)
    assert np.array_equal(many.latents[-1:], last.latents)


def test_a_prompt_that_cannot_be_read_is_said_before_anything_is_made(built: Built) -> None:
    pipeline = Watched.from_package(built("w4a8"), "onnxruntime")
    prompts = ["a red circle"] * 8 + ["<lora:x:1>"]
    with pytest.raises(SdqError, match="it loads an adapter"):
        pipeline(prompts, seed=3, prompt_weighting=True)
    assert pipeline.made == []


def test_each_text_encoder_reads_its_own_text(caplog: pytest.LogCaptureFixture) -> None:
    two = ["text_encoder", "text_encoder_2"]

    def texts(prompt: Any, second: Any) -> list[tuple[str, ...]]:
        return [wording.texts for wording in prompt_wordings(prompt, {"prompt_2": second}, two)]

    assert texts(["a", "b"], None) == [("a", "a"), ("b", "b")]
    assert texts(["a", "b"], "c") == [("a", "c"), ("b", "c")]
    assert texts(["a", "b"], ["c", ""]) == [("a", "c"), ("b", "")]
    assert texts("a", "") == [("a", "a")]  # as in diffusers: prompt_2 or prompt
    with pytest.raises(SdqError, match="3 prompt 2s were given for 2 prompts"):
        texts(["a", "b"], ["c", "d", "e"])
    with pytest.raises(SdqError, match="prompt_3 was given, and this package's model has no text_encoder_3"):
        prompt_wordings("a", {"prompt_3": "b"}, two)
    none = negative_wordings(None, {"negative_prompt_2": None}, two, 2)
    assert [(each.texts, each.given) for each in none] == [(("", ""), False)] * 2
    with caplog.at_level(logging.WARNING):
        negative_wordings(None, {"negative_prompt_2": "b"}, two, 1, sees_zeros=True)
    assert "negative_prompt_2 changes nothing" in caplog.text
