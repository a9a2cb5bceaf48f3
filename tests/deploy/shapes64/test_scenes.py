"""Scenes, captions, splits and the tokenizer's view of them."""

from __future__ import annotations

import numpy as np
import pytest

from sdq_deploy.shapes64 import calibration_prompts, held_out_pairs, model_path, render, validation_pairs
from sdq_deploy.shapes64.captions import VOCABULARY, contents_of
from sdq_deploy.shapes64.scenes import COLOURS, EXTENT, IMAGE_SIZE, Scene, Split, sample_scene

_SPLITS: tuple[Split, ...] = ("train", "calibration", "validation", "held_out")


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [sample_scene("train", index) for index in range(600)]


def test_a_scene_depends_on_its_split_and_index_alone() -> None:
    for split in _SPLITS:
        first, again = sample_scene(split, 7), sample_scene(split, 7)
        assert first == again
        np.testing.assert_array_equal(render(first), render(again))
    assert len({sample_scene(split, 7).caption for split in _SPLITS}) == len(_SPLITS)


def test_scenes_are_drawn_as_they_were_when_the_model_was_trained() -> None:
    """The trained weights depend on these scenes: a change of the generator must be a decision."""
    first = "a green square above a large cyan triangle on a white to gray gradient background"
    assert sample_scene("train", 0).caption == first
    assert sample_scene("held_out", 0).caption == "a green ring on a plain white background"
    assert render(sample_scene("held_out", 0)).mean() == pytest.approx(234.06, abs=0.5)


def test_no_caption_is_in_two_splits() -> None:
    captions = {split: {sample_scene(split, index).caption for index in range(150)} for split in _SPLITS}
    for split in _SPLITS:
        others = set().union(*(captions[other] for other in _SPLITS if other != split))
        assert not captions[split] & others


def test_prompt_lists_come_from_their_splits_in_order() -> None:
    held_out, validation = held_out_pairs(40), validation_pairs(40)
    assert [pair.prompt for pair in held_out] == [sample_scene("held_out", index).caption for index in range(40)]
    assert held_out_pairs(10) == held_out[:10]
    assert not {pair.seed for pair in held_out} & {pair.seed for pair in validation}
    assert calibration_prompts(3) == [sample_scene("calibration", index).caption for index in range(3)]


def test_the_number_of_shapes_is_weighted(scenes: list[Scene]) -> None:
    counts = np.bincount([len(scene.objects) for scene in scenes], minlength=4)[1:] / len(scenes)
    np.testing.assert_allclose(counts, [0.45, 0.38, 0.17], atol=0.06)


def test_shapes_are_distinct_inside_the_picture_and_apart(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert len(scene.contents) == len(scene.objects)
        for item in scene.objects:
            reach = 0.98 * item.radius
            assert reach <= item.x <= IMAGE_SIZE - reach, scene
            assert reach <= item.y <= IMAGE_SIZE - reach, scene
        for i, a in enumerate(scene.objects):
            for b in scene.objects[:i]:
                apart = max(abs(a.x - b.x), abs(a.y - b.y))
                assert apart >= 0.98 * (a.radius + b.radius), scene
    assert EXTENT >= 1.0


def test_shapes_have_the_colours_of_their_names(scenes: list[Scene]) -> None:
    for scene in scenes[:200]:
        image = render(scene).astype(int)
        for item in scene.objects:
            # Every kind covers this point but the ring, which has a hole there and colour beside it.
            aside = 0.75 * item.radius if item.kind == "ring" else 0.0
            pixel = image[int(item.y), int(item.x + aside)]
            nearest = min(COLOURS, key=lambda name: float(np.abs(np.subtract(COLOURS[name], pixel)).sum()))
            assert nearest == item.colour, scene.caption


def test_a_caption_names_what_is_drawn(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert contents_of(scene.caption) == scene.contents


def test_relations_hold_in_the_picture(scenes: list[Scene]) -> None:
    checks = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
    seen = set()
    for scene in scenes:
        if scene.relation in checks:
            axis, sign = checks[scene.relation]
            first, second = ((item.x, item.y)[axis] for item in scene.objects)
            assert sign * (first - second) > 0, scene.caption
            seen.add(scene.relation)
    assert seen == set(checks)


def test_every_caption_fits_the_tokenizer_one_token_per_word(scenes: list[Scene]) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_path() / "tokenizer" / "tokenizer.json"))
    for word in VOCABULARY:
        assert len(tokenizer.encode(word, add_special_tokens=False).ids) == 1, word
    end = tokenizer.token_to_id("<|endoftext|>")
    for scene in scenes:
        ids = tokenizer.encode(scene.caption, add_special_tokens=False).ids
        assert len(ids) == len(scene.caption.replace(",", " ,").split()) <= 30
        assert end not in ids  # which is also the unknown token
        assert set(scene.caption.replace(",", " ,").split()) <= set(VOCABULARY)
