"""The training loop: a resumed run, and a run of two processes, make the updates of one uninterrupted process."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from sdq_deploy.shapes64.train.loop import LoopConfig, StepRandom, one_cycle, run_in_processes, run_loop  # noqa: E402

_BATCH = 6


class _Interrupted(Exception):
    pass


def _fit(config: LoopConfig, stop_at: int | None = None) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.peak_lr)

    def loss_of(random: StepRandom) -> torch.Tensor:
        inputs = torch.randn(_BATCH, 4, generator=random.torch)[random.share]
        return (model(inputs) - inputs[:, :2]).square().mean()

    def after_step(step: int) -> None:
        if step == stop_at:
            raise _Interrupted

    run_loop(config, {"model": model}, optimizer, loss_of, after_step)
    return model.state_dict()


def _config(out: Path, **changes: object) -> LoopConfig:
    return LoopConfig(out=out, steps=12, peak_lr=0.05, checkpoint_every=4, log_every=12, **changes)  # type: ignore[arg-type]


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = _fit(_config(tmp_path / "whole"))
    with pytest.raises(_Interrupted):
        _fit(_config(tmp_path / "cut"), stop_at=9)
    assert torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)["step"] == 8
    resumed = _fit(_config(tmp_path / "cut", resume=True))
    for name, value in whole.items():
        assert torch.equal(resumed[name], value)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.export
def test_two_processes_equal_one(tmp_path: Path) -> None:
    _fit(_config(tmp_path / "one"))
    run_in_processes(partial(_fit_quietly, _config(tmp_path / "two")), 2)
    one, two = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"] for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-6)


def _fit_quietly(config: LoopConfig) -> None:
    _fit(config)


def test_a_second_cycle_starts_from_the_first_ones_weights(tmp_path: Path) -> None:
    first = _fit(_config(tmp_path / "first"))
    second = LoopConfig(out=tmp_path / "second", steps=1, peak_lr=0.0, init=tmp_path / "first" / "checkpoint.pt")
    for name, value in _fit(second).items():
        assert torch.equal(value, first[name])


def test_the_learning_rate_rises_then_falls_to_its_end() -> None:
    rates = [one_cycle(step, 1000, 1.0) for step in range(1000)]
    assert max(rates) == pytest.approx(1.0, abs=1e-3)
    assert rates.index(max(rates)) == pytest.approx(49, abs=2)
    assert rates[-1] == pytest.approx(0.01)
    assert rates[50:] == sorted(rates[50:], reverse=True)


@pytest.mark.export
def test_the_tokenizer_is_the_same_in_every_process() -> None:
    """Its BPE has many ties; the ids must not depend on how a process happens to break them."""
    pytest.importorskip("transformers")
    from sdq_deploy.shapes64.captions import VOCABULARY
    from sdq_deploy.shapes64.train.text import build_tokenizer

    script = (
        "from sdq_deploy.shapes64.captions import VOCABULARY as v;"
        "from sdq_deploy.shapes64.train.text import build_tokenizer as b;"
        "t = b(); print([t(w, add_special_tokens=False).input_ids for w in v])"
    )
    tokenizer = build_tokenizer()
    ids = [tokenizer(word, add_special_tokens=False).input_ids for word in VOCABULARY]
    assert all(len(word) == 1 for word in ids)
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip().splitlines()[-1] == str(ids)
