"""Captured graphs of small models, kept: in memory for this process, in the cache folder for the next one.

Tracing takes seconds whatever the model's size: of the export of a small model it is nine tenths of the time. What is
kept is found again by all that it depends on: the caller's key, the versions of the libraries that trace, and the code
of this package. A hollow constant (`sdq_export.skeleton`) is stored as one number and its shape.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from sdq_engines.files import atomic_write_bytes
from sdq_engines.places import cache_folder
from sdq_export.provenance import tool_versions
from sdq_export.skeleton import is_hollow

__all__ = ["KEPT_BYTES", "MOST_IN_MEMORY", "capture_once"]

KEPT_BYTES = 32 << 20
"""Of constants, hollow ones not counted: those of one graph, and of all that are in memory together."""

MOST_IN_MEMORY = 32
"""Graphs that a process keeps, those that were used last: some four models' parts. The others are on disk."""

_MOST_FILES = 64
_SHAPE = "sdq.hollow_shape"
_captured: OrderedDict[tuple[Hashable, ...], tuple[ir.Model, int]] = OrderedDict()
"""Key -> graph and bytes of its constants; the one that was used last stands last."""


def capture_once(key: tuple[Hashable, ...], make: Callable[[], ir.Model]) -> ir.Model:
    """A graph to edit: captured, or a copy of an earlier capture.

    Args:
        key: all that the graph depends on but for this package's own code and the libraries; its parts are spelled by
            `repr`.
        make: captures it.
    """
    if key not in _captured:
        path = _file(key)
        model = _read(path)
        if model is None:
            model = make()
            if _bytes(model) > KEPT_BYTES:
                return model
            _write(path, model)
        _captured[key] = model, _bytes(model)
    _captured.move_to_end(key)
    while len(_captured) > MOST_IN_MEMORY or sum(size for _, size in _captured.values()) > KEPT_BYTES:
        _captured.popitem(last=False)
    return _captured[key][0].clone()


def _bytes(model: ir.Model) -> int:
    constants = (value.const_value.numpy() for value in model.graph.initializers.values() if value.const_value)
    return sum(array.nbytes for array in constants if not is_hollow(array))


def _file(key: tuple[Hashable, ...]) -> Path:
    digest = hashlib.sha256(f"{_tracer()}\n{key!r}".encode()).hexdigest()
    return cache_folder() / "captures" / f"{digest[:32]}.onnx"


@cache
def _tracer() -> str:
    """What makes of a module a graph: libraries by version, our code by its hash."""
    digest = hashlib.sha256(json.dumps(tool_versions(), sort_keys=True).encode())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _read(path: Path) -> ir.Model | None:
    try:
        proto = onnx.load_model_from_string(path.read_bytes())
    except Exception:  # not there, or damaged: captured again; protobuf's own exceptions are of several kinds
        return None
    model = ir.from_proto(proto)
    for value in model.graph.initializers.values():
        shape = value.metadata_props.pop(_SHAPE, None)
        if shape is not None and value.const_value is not None:
            value.const_value = ir.tensor(
                np.broadcast_to(value.const_value.numpy(), json.loads(shape)), name=value.name
            )
            value.shape = ir.Shape(json.loads(shape))
    return model


def _write(path: Path, model: ir.Model) -> None:
    """The next process captures it again where this is not possible."""
    with contextlib.suppress(OSError):
        atomic_write_bytes(path, ir.to_proto(_shrunk(model)).SerializeToString())
        kept = sorted(path.parent.glob("*.onnx"), key=lambda file: file.stat().st_mtime)
        for old in kept[:-_MOST_FILES]:
            old.unlink(missing_ok=True)


def _shrunk(model: ir.Model) -> ir.Model:
    """A copy whose hollow constants are single numbers."""
    copy = model.clone()
    for value in copy.graph.initializers.values():
        if value.const_value is not None and is_hollow(array := value.const_value.numpy()):
            value.metadata_props[_SHAPE] = json.dumps(array.shape)
            value.const_value = ir.tensor(np.array(array.flat[0]), name=value.name)
            value.shape = ir.Shape([])
    return copy
