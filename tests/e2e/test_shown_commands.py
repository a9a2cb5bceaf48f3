"""Every command and Python block of the README and the docs, run as a reader would type it, on a tiny Stable Diffusion.

What a page names is replaced by what stands for it here (`NAMES`), and everything is made smaller. The quickstart's
blocks are one road and have a test of their own. What cannot be run here is listed with the reason (`NOT_RUN`);
`tests/test_docs.py` reads the options of that too.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdq_engines.package.store import open_package
from sdq_export.checkpoint import load_checkpoint
from tests.commands import fewer_options, run
from tests.deploy.training.test_prepare import write_adapter
from tests.single_files import original_state, write_file
from tests.test_docs import PAGES, blocks, shown

pytestmark = pytest.mark.slow

#: What the pages say -> what it is here.
NAMES = {
    **dict.fromkeys(("CompVis/stable-diffusion-v1-4", "MODEL", "FOLDER", "shapes-64"), "model"),
    **dict.fromkeys(("tensorrt", "tensorrt-rtx", "ENGINE"), "onnxruntime"),
    **dict.fromkeys(("1024", "12500"), "2"),
    "RUN": "run",
    "OTHER": "run",
    "PACKAGE": "package",
    "512x512": "64x64",
    "768x512": "96x64",
    "psnr=30": "psnr=1",
    "psnr=30,ssim=0.95": "psnr=1,ssim=0.0001",
}

#: A pattern of commands as they are shown -> why they are not run here.
NOT_RUN = {
    "accelerate launch": "it starts several processes: tests/deploy/training/test_launch.py and test_evaluate.py",
    "--processes 2": "it starts two interpreters: tests/deploy/evaluation/test_evaluate.py",
    "demo --out build/demo": "tests/e2e/test_main_job.py runs it",
    "train CompVis/.* --precision w4a8": "the quickstart has it, and tests/e2e/test_quickstart.py runs it",
    "export run --out package --engine": "the quickstart has it, and tests/e2e/test_quickstart.py runs it",
    "train shapes-64 --out run$": "the method s2p, which the quickstart trains with",
    "algorithm smoothquant|method (efficientdm|ptq-reconstruction)": "tests/deploy/training/methods/ trains with each",
    "--vae int8": "a random VAE loses too much by it, and is refused: tests/export/test_integer_storage.py",
    "--bf16 text_encoder_3": "it needs TensorRT-RTX and a T5: tests/engines/test_bf16_attention.py, test_build.py",
    "--prompt-chunks 3": "it is traced anew: tests/export/test_prompts.py exports two chunks",
    "…": "a part of a sentence",
}

#: Commands that stand in a sentence without what they need.
BARE = ("train", "run", "build", "bench", "export", "evaluate")


@dataclass
class Workspace:
    """A folder in which the pages' files are: a model, prompts, pictures, a run and a package for any size."""

    folder: Path
    done: set[tuple[str, ...]] = field(default_factory=set)
    """What has been run, before outputs got a name of their own."""

    def type(self, arguments: str) -> Path | None:
        """Run what follows `sdq-deploy`; returns the folder that it wrote, None where it has been run already."""
        words = [_replaced(word) for word in shlex.split(arguments)]
        if tuple(words) in self.done:
            return None
        self.done.add(tuple(words))
        words, out = _smaller(words), None
        if words[0] in ("train", "export") and "--resume" not in words and "--dry-run" not in words:
            position = words.index("--out") + 1
            out = self.folder / _free(self.folder, words[position])
            words[position] = out.name
        run(*words)
        return out


@pytest.fixture(scope="module")
def workspace(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    folder, before = tmp_path_factory.mktemp("shown"), Path.cwd()
    os.chdir(folder)
    try:
        shutil.copytree(tiny_sd, "model")
        Path("prompts.txt").write_text("\n".join(f"a red circle number {i}" for i in range(6)), encoding="utf-8")
        for name, picture in (("photo", np.full((64, 64, 3), 90, np.uint8)), ("mask", np.eye(64, dtype=bool))):
            Image.fromarray(picture).save(f"{name}.png")
        for number, name in enumerate(("style", "character")):
            write_adapter(Path(f"{name}.safetensors"), seed=number)
        write_file(original_state("sd", tiny_sd), Path("model.safetensors"))
        write_file(original_state("sd", tiny_sd), Path("vae.safetensors"))
        made = Workspace(folder)
        made.type("train shapes-64 --out run --precision w8a8 --method ptq --ptq-algorithm max --prompts prompts.txt")
        made.type("export run --out package --dynamic-size")
        made.type("build package --engine tensorrt-rtx --size 512x512 --size 768x512")
        yield made
    finally:
        os.chdir(before)


def runnable(page: Path) -> Iterator[str]:
    """The commands of a page that are run here, [optional parts] included."""
    in_blocks = "quickstart" not in page.name
    for launcher, arguments in shown(page, in_blocks=in_blocks):
        line = f"{launcher} {arguments}"
        if any(re.search(pattern, line) for pattern in NOT_RUN) or arguments in BARE or arguments.startswith("-"):
            continue
        yield re.sub(r"\[(-[^\]]*)\]", r"\1", arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page: Path, workspace: Workspace) -> None:
    for arguments in runnable(page):
        out = workspace.type(arguments)
        if out is not None and arguments.startswith("export"):
            assert open_package(out).manifest.io.image_size == (64, 64)
        elif out is not None:
            assert load_checkpoint(out).info.sampler.num_inference_steps == 4
        elif arguments.startswith("run "):
            assert Image.open("image.png").size == (64, 64)
        elif arguments.startswith("evaluate"):
            assert Path("build/evaluation/report.html").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page: Path, workspace: Workspace) -> None:
    names: dict[str, object] = {}
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text.replace("768", "96").replace("512", "64"), str(page), "exec"), names)
    if "images" in names:
        assert names["images"]


def test_each_reason_is_one() -> None:
    """Nothing is listed that no page shows any more."""
    lines = [f"{launcher} {arguments}" for page in PAGES for launcher, arguments in shown(page)]
    for pattern in NOT_RUN:
        assert any(re.search(pattern, line) for line in lines), pattern


def _replaced(word: str) -> str:
    name, equals, value = word.partition("=")
    return NAMES.get(word, f"{name}={NAMES[value]}" if equals and value in NAMES else word)


def _smaller(words: list[str]) -> list[str]:
    """The same command with fewer steps, images and repetitions, on the CPU, with prompts."""
    command = words[0]
    if command in ("train", "evaluate") and "--prompts" not in words and "--resume" not in words:
        words = [*words, "--prompts", "prompts.txt"]
    if command == "train" and "--resume" not in words:
        few = ["--set", "fit.max_train_steps=1", "--cpu"]
        method = [] if "--method" in words else ["--method", "ptq", "--ptq-algorithm", "max", "--precision", "w8a8"]
        return [*words, *fewer_options(), *few, *method]
    if command == "train":
        return [*words, "--cpu"]
    if command == "evaluate":
        return [*words, *([] if "--num-images" in words else ["--num-images", "2"]), "--cpu"]
    if command == "export":
        return [*words, "--gate", "18", *(["--num-inference-steps", "4"] if words[1] != "run" else [])]
    if command == "build" and "--size" not in words:  # for the package's Python, whose images have both sizes
        return [*words, "--size", "64x64", "--size", "96x64"]
    return [*words, "--runs", "3"] if command == "bench" else words


def _free(folder: Path, name: str) -> str:
    """A name that nothing in the folder has, this one if it can be."""
    stem = name.strip("/").replace("/", "-")
    return next(each for each in (stem, *(f"{stem}-{i}" for i in range(99))) if not (folder / each).exists())
