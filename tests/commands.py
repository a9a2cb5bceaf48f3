"""Our own commands, run in this process as the console script runs them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

__all__ = ["FEWER", "fewer_options", "run"]

#: Of the recipe of Stable Diffusion, fewer of everything; scheduler, precisions, losses and rates stay.
FEWER = {
    "sampling.num_inference_steps": 4,
    "collect.num_prompts": 4,
    "collect.validation_prompts": 2,
    "collect.steps_per_prompt": 2,
    "calibrate.samples_per_step": 2,
    "sensitivity.samples": 2,
    "fit.max_train_steps": 4,
    "fit.batch_size": 2,
    "fit.validate_every": 2,
}


def fewer_options(values: Mapping[str, object] = FEWER) -> list[str]:
    """Recipe values as options of `train` and `demo`."""
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def run(*arguments: str | Path) -> None:
    """A command that is to succeed."""
    from sdq_deploy.cli import main

    with pytest.raises(SystemExit) as exit_:
        main.run([str(argument) for argument in arguments])
    assert exit_.value.code == 0, arguments
