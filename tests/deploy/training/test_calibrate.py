"""Initial activation scales."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from sdq_deploy.training.calibrate import activation_scales, largest_activations
from sdq_deploy.training.dataset import load_split
from sdq_engines.formats import INT8
from sdq_export.quantspec import ActivationSite, QuantSpec, WeightSite
from sdq_export.sites import find_sites
from tests.deploy.training.helpers import small_context
from tests.tiny import tiny_unet


def spec_of(groups: tuple[int, ...]) -> QuantSpec:
    return QuantSpec(
        precision="w8a8",
        num_steps=len(groups),
        weights=(WeightSite(layer="a", op="linear", format=INT8),),
        activations=(ActivationSite(name="a.input", consumers=("a",), groups=groups),),
    )


def test_a_group_holds_the_largest_magnitude_of_its_steps() -> None:
    largest = {"a.input": torch.tensor([127.0, 254.0, 381.0])}
    assert activation_scales(largest, spec_of((0, 0, 1)))["a.input.scale"].tolist() == [2.0, 3.0]


def test_a_group_without_latents_takes_its_neighbours() -> None:
    largest = {"a.input": torch.tensor([0.0, 127.0, 0.0, 0.0, 254.0])}
    assert activation_scales(largest, spec_of((0, 1, 2, 3, 4)))["a.input.scale"].tolist() == [1.0, 1.0, 1.0, 2.0, 2.0]


def test_a_step_without_latents_leaves_zero(tiny_sd: Path, finished_run: Path) -> None:
    context = small_context(tiny_sd, finished_run)
    data = load_split(finished_run / "dataset", "training")
    bare = int(data.shard.steps[0])
    rest = data.shard.steps != bare
    rows = {name: getattr(data.shard, name)[rest] for name in ("latents", "steps", "prompt_ids")}
    kept = replace(data, shard=replace(data.shard, **rows))
    largest = largest_activations(context.teacher, context.spec, kept, 100, lambda: None)
    assert all(seen[bare] == 0 and seen.count_nonzero() > 0 for seen in largest.values())


def test_one_group_is_the_largest_of_the_per_step_scales(tiny_sd: Path, finished_run: Path) -> None:
    context = small_context(tiny_sd, finished_run)
    data = load_split(finished_run / "dataset", "training")
    largest = largest_activations(context.teacher, context.spec, data, 100, lambda: None)
    single = find_sites(tiny_unet(), context.spec.num_steps, "w4a8", groups=1)
    per_step, one = activation_scales(largest, context.spec), activation_scales(largest, single)
    assert all(torch.equal(one[name][0], scales.max()) for name, scales in per_step.items())
    assert load_file(finished_run / "scales.safetensors").keys() > per_step.keys()
