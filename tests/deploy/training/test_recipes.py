"""Recipes: precedence, and one report of all mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdq_deploy.recipes import available_recipes, load_recipe, parse_assignments
from sdq_deploy.recipes.load import read_recipe, recipe_from, with_overrides
from sdq_engines.errors import SdqError


@pytest.mark.parametrize("name", available_recipes())
@pytest.mark.parametrize("precision", ["w8a8", "w4a8", "w4a16"])
def test_shipped_recipes_are_valid_for_every_precision(name: str, precision: str) -> None:
    assert load_recipe(name, {"quantization.precision": precision}).quantization.precision == precision


def test_overrides_win_over_the_precision_and_that_over_the_file() -> None:
    plain = load_recipe("shapes-64").fit.max_train_steps
    assert load_recipe("shapes-64", {"quantization.precision": "w8a8"}).fit.max_train_steps < plain
    chosen = load_recipe("shapes-64", {"quantization.precision": "w8a8", "fit.max_train_steps": 7})
    assert chosen.fit.max_train_steps == 7


def test_a_recorded_recipe_can_change_its_precision() -> None:
    """What `train --resume --precision` does: the other precision's table counts, what was set stays set."""
    recorded = with_overrides(read_recipe("shapes-64"), {"fit.batch_size": 4, "quantization.precision": "w8a8"})
    changed = with_overrides(json.loads(json.dumps(recorded)), {"quantization.precision": "w4a8"})
    assert recipe_from(recorded, "run") == load_recipe(
        "shapes-64", {"fit.batch_size": 4, "quantization.precision": "w8a8"}
    )
    assert recipe_from(changed, "run") == load_recipe("shapes-64", {"fit.batch_size": 4})
    again = with_overrides(changed, {"quantization.precision": "w8a8", "fit.max_train_steps": 7})
    assert (recipe_from(again, "run").fit.max_train_steps, recipe_from(again, "run").fit.batch_size) == (7, 4)


def test_tables_and_values_that_exclude_each_other() -> None:
    with pytest.raises(SdqError, match="w8a8: found 3; allowed: a table"):
        load_recipe("shapes-64", {"w8a8": 3})
    with pytest.raises(SdqError, match="cannot be set beside weight_lr"):
        load_recipe("shapes-64", parse_assignments(["fit.weight_lr=1e-5", "fit.weight_lr.w4=1e-5"]))


def test_set_takes_toml_values_and_bare_words() -> None:
    values = parse_assignments(["fit.betas=[0.8, 0.9]", "fit.loss=separate", "freezing.enabled=false"])
    recipe = load_recipe("shapes-64", values)
    assert (recipe.fit.betas, recipe.fit.loss, recipe.freezing.enabled) == ((0.8, 0.9), "separate", False)


def test_a_glob_keeps_its_dots() -> None:
    own = load_recipe("sd").quantization.bits
    recipe = load_recipe("sd", parse_assignments(["quantization.bits.down_blocks.0.*=8"]))
    assert recipe.quantization.bits == {**own, "down_blocks.0.*": 8}


def test_all_mistakes_are_reported_together_with_what_is_allowed() -> None:
    values = parse_assignments(["fit.batchsize=3", "fit.loss=foo", "quantization.precision=w2a2", "fit.batch_size=0"])
    with pytest.raises(SdqError) as caught:
        load_recipe("sd", values)
    message = str(caught.value)
    assert "4 mistakes" in message
    assert "fit.batchsize: there is no such key (did you mean batch_size?)" in message
    assert "fit.loss: found 'foo'; allowed: 'guided' or 'separate'" in message
    assert "quantization.precision: found 'w2a2'; allowed: 'w8a8', 'w4a8', 'w4a16' or 'fp8'" in message
    assert "fit.batch_size: found 0; allowed: at least 1" in message


def test_a_value_of_an_option_is_named_by_the_option() -> None:
    options = {"sampling.num_inference_steps": "--num-inference-steps", "sampling.scheduler": "--scheduler"}
    tree = with_overrides(read_recipe("sd"), {"sampling.num_inference_steps": 0, "sampling.scheduler": "dimm"})
    with pytest.raises(SdqError) as caught:
        recipe_from(tree, "sd", options)
    assert "--num-inference-steps takes at least 1, not 0." in caught.value.message
    assert "--scheduler takes 'default', 'ddim'" in caught.value.message
    assert "mistake" not in caught.value.message
    with pytest.raises(SdqError, match="3 mistakes"):  # beside one of the recipe itself
        recipe_from(with_overrides(tree, {"fit.batch_size": 0}), "sd", options)


def test_bad_files_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text("[fit\n", encoding="utf-8")
    (tmp_path / "latin.toml").write_bytes(b"# caf\xe9\n")
    for name, words in (("broken.toml", "not valid TOML"), ("latin.toml", "not UTF-8"), ("none.toml", "no recipe")):
        with pytest.raises(SdqError, match=words):
            load_recipe(tmp_path / name)
    with pytest.raises(SdqError, match="key=value"):
        parse_assignments(["fit.batch_size"])
