"""Methods by name; each one's module is imported when it is asked for."""

from __future__ import annotations

import importlib
from typing import Any

from sdq_deploy.recipes.schema import Method
from sdq_deploy.training.method import TrainingMethod

__all__ = ["method_named"]

_HOMES: dict[Method, str] = {
    "s2p": "s2p",
    "ptq": "ptq",
    "ptq-reconstruction": "reconstruction",
    "efficientdm": "efficientdm",
}


def method_named(name: Method) -> TrainingMethod[Any]:
    """The method of this name."""
    found: TrainingMethod[Any] = importlib.import_module(f"sdq_deploy.training.methods.{_HOMES[name]}").METHOD
    return found
