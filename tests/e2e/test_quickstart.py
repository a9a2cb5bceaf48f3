"""The quickstart as it is written, on a tiny Stable Diffusion: each of its commands, in order, and its Python."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from sdq_engines.package.store import open_package
from tests.commands import fewer_options, run
from tests.test_docs import ROOT, blocks

pytestmark = pytest.mark.slow


def typed(model: Path) -> list[list[str]]:
    """The page's commands, its Python among them, with a tiny model, few steps, and an engine that runs here."""
    found = []
    for language, text in blocks(ROOT / "docs" / "quickstart.md"):
        if language == "python":
            found.append(["python", text])
            continue
        for line in text.splitlines():
            words = shlex.split(re.sub(r"\s#\s.*$", "", line))
            if words[:1] != ["sdq-deploy"] or words[1] == "doctor":
                continue
            named = {"CompVis/stable-diffusion-v1-4": str(model), "tensorrt-rtx": "openvino", "64": "2"}
            words = [named.get(word, word) for word in words[1:]]
            if words[0] == "train":
                words += fewer_options()
                words += [] if "--cpu" in words else ["--cpu"]
            if words[0] == "export" and str(model) in words:
                words += ["--num-inference-steps", "4"]
            found.append(words)
    return found


def test_each_command_does_what_the_page_says(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    prompts = "\n".join(f"a red circle number {index}" for index in range(6))
    Path("prompts.txt").write_text(prompts, encoding="utf-8")
    commands = typed(tiny_sd)
    assert [words[0] for words in commands] == [
        *("train", "train", "export", "run", "python", "evaluate"),
        *("train", "export", "run"),
        "export",
    ]
    for number, words in enumerate(commands):
        if words[0] == "python":
            Path("image.png").unlink()
            exec(compile(words[1], "quickstart", "exec"), {})  # the page's own lines
            assert Image.open("image.png").size == (64, 64)
            continue
        if number == 6:  # another road: without a GPU
            Path("run").rename("run-with-a-gpu")
        run(*words)
        if "--dry-run" in words:
            assert not Path("run").exists()
            assert "Nothing was written" in capsys.readouterr().out
        if number == 2:
            manifest = open_package("package").manifest
            assert (manifest.precision, manifest.sampler.scheduler) == ("w4a8", "DDIMScheduler")
            assert manifest.sampler.guidance_scale == 7.5
        if words[0] == "evaluate":
            assert list(Path().rglob("report.html"))
    assert open_package("package").manifest.precision == "fp16"
