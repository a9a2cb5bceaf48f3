"""Captures are found again by all that they depend on, and are then what they were."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from sdq_export import captures
from sdq_export.capture import capture
from sdq_export.captures import capture_once
from sdq_export.components import make_component
from sdq_export.skeleton import is_hollow
from sdq_export.source import load_source
from sdq_export.storage import Storage
from tests.tiny import randomize_


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SDQ_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(captures, "_captured", OrderedDict())
    return tmp_path / "cache" / "captures"


class Layer(nn.Module):
    """One hollow weight and one with values."""

    def __init__(self) -> None:
        super().__init__()
        self.hollow = nn.Parameter(torch.full((1,), 7.0).expand(300, 40), requires_grad=False)
        self.scale = nn.Parameter(torch.arange(300.0), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.hollow.T * self.scale


def make() -> ir.Model:
    return capture(Layer().eval(), {"x": torch.zeros(2, 40)}, batched=["x"], outputs=["y"])


def never() -> ir.Model:
    raise AssertionError("captured again")


def next_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captures, "_captured", OrderedDict())


def test_the_next_process_finds_the_same_graph(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = capture_once(("key",), make)
    capture_once(("key",), never)  # this process
    next_process(monkeypatch)
    second = capture_once(("key",), never)
    assert [str(node) for node in second.graph] == [str(node) for node in first.graph]
    assert [node.metadata_props for node in second.graph] == [node.metadata_props for node in first.graph]
    assert list(second.graph.initializers) == list(first.graph.initializers)
    for name, value in first.graph.initializers.items():
        found = second.graph.initializers[name]
        assert value.const_value is not None
        assert found.const_value is not None
        assert found.shape == value.shape
        assert np.array_equal(found.const_value.numpy(), value.const_value.numpy())
        assert is_hollow(found.const_value.numpy()) == is_hollow(value.const_value.numpy())
    assert next(cache.glob("*.onnx")).stat().st_size < 300 * 40 * 4


def test_a_damaged_file_and_another_key_are_captured_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    capture_once(("key",), make)
    next_process(monkeypatch)
    with pytest.raises(AssertionError, match="captured again"):
        capture_once(("other key",), never)
    next(cache.glob("*.onnx")).write_bytes(b"half a fi")
    assert capture_once(("key",), make).graph.outputs[0].name == "y"


@pytest.mark.export
def test_a_process_keeps_the_graphs_that_it_used_last(cache: Path) -> None:
    graph = make()
    for index in range(captures.MOST_IN_MEMORY + 3):
        capture_once((index,), lambda: graph)
        capture_once((0,), never)
    assert len(captures._captured) == captures.MOST_IN_MEMORY
    assert (0,) in captures._captured
    assert (1,) not in captures._captured
    capture_once((1,), never)  # from the disk
    half = captures.KEPT_BYTES // 2 // 4 + 1
    for index in range(3):
        heavy = ir.Value(name="x", const_value=ir.tensor(np.arange(half, dtype=np.float32), name="x"))
        model = make()
        model.graph.initializers.add(heavy)
        capture_once(("heavy", index), lambda model=model: model)  # type: ignore[misc]
    assert list(captures._captured) == [("heavy", 2)]


@pytest.mark.export
def test_a_text_encoder_that_was_changed_in_its_folder_is_captured_again(tiny_sd: Path, tmp_path: Path) -> None:
    """In the same process and at the same path: weights, and a configuration whose weights are the same."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd, folder)

    def text_encoder() -> ir.Model:
        source = load_source(folder)
        graph, _ = make_component(source, source.family.text_encoders[0].export(), Storage("fp32"))
        return graph

    def weights() -> dict[str, np.ndarray]:
        graph = text_encoder()
        return {name: value.const_value.numpy() for name, value in graph.graph.initializers.items()
                if value.const_value is not None}  # fmt: skip

    before = weights()
    model = load_source(folder).part("text_encoder")
    randomize_(model, 9).save_pretrained(folder / "text_encoder")
    after = weights()
    assert any(not np.array_equal(before[name], after[name]) for name in before if name in after)
    config = (folder / "text_encoder" / "config.json").read_text("utf-8")
    assert '"quick_gelu"' in config
    (folder / "text_encoder" / "config.json").write_text(config.replace('"quick_gelu"', '"gelu"'), "utf-8")
    graph = text_encoder()
    assert any(node.op_type in ("Gelu", "Erf") for node in graph.graph)
