"""Exports as a library: what the settings of a run's export may say."""

from __future__ import annotations

import pytest

from sdq_engines.errors import SdqError
from sdq_export.checkpoint import QuantizedCheckpoint
from sdq_export.jobs import ExportSettings, check_run
from sdq_export.sampler import compile_sampler
from sdq_export.source import Source
from tests.export.quantized import quantized_checkpoint


@pytest.fixture(scope="module")
def trained(source: Source) -> QuantizedCheckpoint:
    return quantized_checkpoint(source, compile_sampler(source.scheduler_named("ddim"), 4), "w4a8")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (ExportSettings(scheduler="euler"), "trained for DDIMScheduler with 4 steps"),
        (ExportSettings(num_inference_steps=5), "no other sampler"),
        (ExportSettings(dtype="fp32"), "stores its other weights in FP16"),
    ],
)
def test_a_run_is_exported_as_it_was_trained(trained: QuantizedCheckpoint, settings: ExportSettings, said: str) -> None:
    with pytest.raises(SdqError, match=said) as refused:
        check_run(trained, settings)
    assert refused.value.hint


def test_what_repeats_the_training_is_taken(trained: QuantizedCheckpoint) -> None:
    check_run(trained, ExportSettings(scheduler="ddim", num_inference_steps=4))
    plan = trained.info.sampler.compile()
    assert (plan.scheduler, plan.calls) == ("DDIMScheduler", 4)
