"""A skeleton stays without weights whatever is made of it: those of Stable Diffusion v1-4's denoiser are 3.4 GB."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from sdq_deploy.random_checkpoints import published
from sdq_export.shortcuts import SplitShortcut, split_shortcuts
from sdq_export.skeleton import copy_module, load_skeleton


@pytest.fixture(scope="module")
def skeleton(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    folder = tmp_path_factory.mktemp("unet")
    (folder / "config.json").write_text(json.dumps(published("sd14")["components"]["unet"]), encoding="utf-8")
    loaded: nn.Module = load_skeleton(UNet2DConditionModel, folder)
    return loaded


def held(module: nn.Module) -> int:
    """Bytes of all memory that its parameters are seen in."""
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in module.parameters()}
    return sum(storages.values())


def test_a_copy_and_a_split_copy_have_no_weights_either(skeleton: nn.Module) -> None:
    split = split_shortcuts(skeleton)
    parts = [each for each in split.modules() if isinstance(each, SplitShortcut)]
    assert len(parts) == 12
    assert sum(each.numel() for each in skeleton.parameters()) == sum(each.numel() for each in split.parameters())
    for module in (skeleton, copy_module(skeleton), split, copy_module(split)):
        assert held(module) < 10e6


def test_what_has_values_is_copied() -> None:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.full((1,), 2.0).expand(4, 4), requires_grad=False)
    copied = copy_module(layer)
    assert copied is not layer
    assert copied.weight is layer.weight
    with torch.no_grad():
        copied.bias += 1
    assert not torch.equal(copied.bias, layer.bias)
