"""The parts of an evaluation alone: shards, the store, limits, names, cases and the page's data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sdq_deploy.evaluation.candidates import open_candidates
from sdq_deploy.evaluation.cases import choose_cases, image_uri
from sdq_deploy.evaluation.gates import parse_limits
from sdq_deploy.evaluation.generation import latent_errors
from sdq_deploy.evaluation.metrics import PSNR_CAP
from sdq_deploy.evaluation.plots import Series, line_plot
from sdq_deploy.evaluation.prompts import prompts_of_file, prompts_of_split
from sdq_deploy.evaluation.scoring import FeatureSpace, fidelity_scorer, score
from sdq_deploy.evaluation.store import ImageStore, shards_of
from sdq_engines.errors import SdqError


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


def test_shards_hold_every_image_once_and_trace_the_first() -> None:
    prompts, seeds = [f"prompt {i}" for i in range(10)], list(range(100, 110))
    shards = shards_of(prompts, seeds, 4, traced=5)
    assert [(shard.first, len(shard.prompts), shard.traced) for shard in shards] == [(0, 4, 4), (4, 4, 1), (8, 2, 0)]
    assert [seed for shard in shards for seed in shard.seeds] == seeds
    # More images later leave the shards that are full as they were.
    longer = shards_of([*prompts, "more"], [*seeds, 110], 4, traced=5)
    assert longer[:2] == shards[:2]
    assert longer[2].fingerprint("x") != shards[2].fingerprint("x")


def test_a_shard_is_whole_only_for_what_it_was_made_from(tmp_path: Path) -> None:
    (shard,) = shards_of(["a", "b"], [1, 2], 2, traced=2)
    store = ImageStore(tmp_path, "w4a8")
    assert not store.is_whole(shard, "mine")
    made, errors = images(2), np.array([[0.1, 0.2], [0.3, 0.4]])
    store.write(shard, "mine", made, errors)
    assert store.is_whole(shard, "mine")
    assert not store.is_whole(shard, "another")
    assert np.array_equal(store.read_images([0, 1]), made)
    assert np.array_equal(store.read_errors([shard]), errors)
    store.image_path(1).unlink()
    assert not store.is_whole(shard, "mine")


def test_a_shard_under_way_is_not_whole(tmp_path: Path) -> None:
    """Written again and interrupted, it must not pass for the old one: some of its images are new."""
    (shard,) = shards_of(["a", "b"], [1, 2], 2, traced=0)
    store = ImageStore(tmp_path, "w4a8")
    store.write(shard, "old", images(2))
    with pytest.raises(AttributeError):
        store.write(shard, "new", [images(1)[0], None])  # type: ignore[arg-type]
    assert not store.is_whole(shard, "old")
    assert not store.is_whole(shard, "new")


def test_names_that_differ_have_folders_that_differ(tmp_path: Path) -> None:
    names = ["w4a8", "a/package", "a:package", "a package", "a-package", "..", "ä", "ö"]
    folders = {ImageStore(tmp_path, name).folder for name in names}
    assert len(folders) == len(names)
    assert all(folder.parent == tmp_path for folder in folders)


def test_identical_images_score_the_cap(tmp_path: Path) -> None:
    shards = shards_of(["p"] * 5, list(range(5)), 5, traced=0)
    a, b = ImageStore(tmp_path, "a"), ImageStore(tmp_path, "b")
    a.write(shards[0], "", images(5))
    b.write(shards[0], "", images(5))
    space = FeatureSpace("feature_fid", 3, lambda batch: batch.mean(axis=(1, 2)), kept=True)
    found = score(a, b, 5, [fidelity_scorer()], [space], batch_size=2)
    assert found.values["psnr"].tolist() == [PSNR_CAP] * 5
    assert found.values["ssim"] == pytest.approx(1.0)
    assert found.moments["feature_fid"].count == 5
    np.testing.assert_allclose(found.features["feature_fid"], images(5).mean(axis=(1, 2)), rtol=1e-6)


def test_latent_errors_are_relative_and_by_step() -> None:
    wanted = np.ones((2, 3, 4, 2, 2), np.float32)
    found = wanted.copy()
    found[1, 2] *= 1.5
    np.testing.assert_allclose(latent_errors(found, wanted), [[0, 0, 0], [0, 0, 0.5]])


def test_limits() -> None:
    assert parse_limits(None) == {}
    assert parse_limits("psnr=30, ssim = 0.95") == {"psnr": 30.0, "ssim": 0.95}
    with pytest.raises(SdqError, match="names no figure"):
        parse_limits("")


def test_prompt_sets(tmp_path: Path) -> None:
    split = prompts_of_split("held_out", 3)
    assert split.contents is not None
    assert len(split) == len(split.contents) == 3
    assert split.sha256 != prompts_of_split("validation", 3).sha256
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle on a blue background\na cat\n", encoding="utf-8")
    cycled = prompts_of_file(path, 5, first_seed=7, shapes=False)
    assert cycled.prompts[::2] == ("a red circle on a blue background",) * 3
    assert cycled.seeds == (7, 8, 9, 10, 11)
    assert cycled.contents is None
    with pytest.raises(SdqError, match="'a cat' names no shape"):
        prompts_of_file(path, None, first_seed=0, shapes=True)


def test_captions_of_a_file_say_what_scenes_say(tmp_path: Path) -> None:
    """What a caption's words name is what its scene holds."""
    split = prompts_of_split("held_out", 200)
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(split.prompts), encoding="utf-8")
    assert prompts_of_file(path, None, 0, shapes=True).contents == split.contents


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["same=shapes-64", "same=shapes-64"], "Two candidates are named 'same'"),
        (["FP=shapes-64"], "'FP' is the reference's name"),
        ([], "There is nothing to evaluate"),
    ],
)
def test_candidates_need_names_of_their_own(texts: list[str], message: str) -> None:
    with pytest.raises(SdqError, match=message):
        open_candidates(texts)


def test_the_worst_of_each_candidate_are_shown_and_the_first() -> None:
    psnr = {"a": np.arange(100.0), "b": np.arange(100.0)[::-1]}
    cases = choose_cases(psnr, 10)
    assert set(range(8)) <= set(cases)
    assert {95, 96, 97, 98, 99} <= set(cases)
    assert len(cases) == 13


def test_large_images_are_made_small_for_the_page() -> None:
    large = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    assert image_uri(large).startswith("data:image/jpeg;base64,")
    assert len(image_uri(large)) < 120_000
    assert image_uri(images(1)[0]).startswith("data:image/png;base64,")


def test_a_plot_has_a_line_a_series_and_puts_greater_values_higher() -> None:
    svg = line_plot([Series("<a>", [1, 2, 3], [0.01, 0.1, 1.0]), Series("b", [1, 2], [0.5, 0.5])], "x", "y", True)
    assert svg.count("<polyline") == 2
    assert "&lt;a&gt;" in svg
    assert "<a>" not in svg
    points = svg.split('<polyline points="')[1].split('"')[0].split()
    heights = [float(point.split(",")[1]) for point in points]
    assert heights[0] > heights[1] > heights[2]
    # logarithmic: equal factors are equal distances
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)
