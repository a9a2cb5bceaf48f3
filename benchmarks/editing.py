"""The second task: the methods' packages change a given picture after another caption (image to image).

    python benchmarks/fidelity.py build/fidelity                    # trains the runs
    python benchmarks/editing.py build/fidelity/methods-w4a8 --docs docs/fidelity.md

No method was trained for it: the denoiser meets Gaussian-noised encodings of drawings instead of its own trajectories,
and only the last steps of its sampler. Every run is exported, and images are made by the runtime on OpenVINO; the
reference is the floating-point model's package, FP32, likewise.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fidelity import insert
from numpy.typing import NDArray
from rich.progress import track

from sdq_deploy.evaluation.grids import comparison_grid
from sdq_deploy.evaluation.metrics import Fidelity, compare_images
from sdq_deploy.evaluation.statistics import Interval, frechet_interval, mean_interval
from sdq_deploy.shapes64 import CaptionSeed, held_out_pairs, render
from sdq_deploy.shapes64.classifier import caption_accuracy, features
from sdq_engines import Pipeline
from sdq_engines.package.store import read_manifest

Images = NDArray[np.uint8]

STRENGTH = 0.7
BATCH = 8


@dataclass(frozen=True)
class Edited:
    """What one package made of all pictures."""

    images: Images
    right: NDArray[np.bool_]
    fidelity: Fidelity
    frechet: Interval


def package_of(run: str, folder: Path, *options: str) -> Path:
    """Export a run, or a model, for OpenVINO, unless that is done."""
    if not (folder / "manifest.json").is_file() or "openvino" not in read_manifest(folder).engines:
        command = [
            "export",
            run,
            "--out",
            str(folder),
            "--engine",
            "openvino",
            "--batch",
            f"1,{BATCH},{BATCH}",
            *options,
        ]
        print("$ sdq-deploy", *command, flush=True)
        subprocess.run([sys.executable, "-m", "sdq_deploy.cli.main", *command], check=True)
    return folder


def edit(package: Path, originals: Sequence[Images], wanted: Sequence[CaptionSeed]) -> Images:
    """Each picture changed after the caption of its own, uint8 [N, 64, 64, 3]."""
    pipe = Pipeline.load(package, engine="openvino")
    made: list[Images] = []
    for first in track(range(0, len(wanted), BATCH), description=package.name):
        part = wanted[first : first + BATCH]
        result = pipe(
            [pair.prompt for pair in part],
            seed=[pair.seed for pair in part],
            image=list(originals[first : first + BATCH]),
            strength=STRENGTH,
        )
        made += [np.asarray(image) for image in result.images]
    return np.stack(made)


def row(name: str, found: Edited) -> str:
    psnr, right = mean_interval(found.fidelity.psnr), mean_interval(found.right.astype(np.float64))
    lost = mean_interval(1 - found.fidelity.ssim)
    cells = [f"{psnr.value:.1f} ({psnr.low:.1f} … {psnr.high:.1f})"]
    cells += [f"{lost.value:.4f} ({lost.low:.4f} … {lost.high:.4f})"]
    cells += [f"{found.frechet.value:.3f} ({found.frechet.low:.3f} … {found.frechet.high:.3f})"]
    return f"| {name} | {' | '.join(cells)} | {percent(right)} |"


def percent(value: Interval) -> str:
    return f"{100 * value.value:.1f} % ({100 * value.low:.1f} … {100 * value.high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of one table of benchmarks/fidelity.py")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--only", nargs="+", default=["s2p", "efficientdm", "reconstruction", "ptq-mse"])
    parser.add_argument("--docs", type=Path, help="put the table in its place in this Markdown file")
    parser.add_argument("--picture", type=Path, help="a PNG of the first eight pictures")
    arguments = parser.parse_args()
    folder: Path = arguments.folder

    pairs = held_out_pairs(arguments.images + 1)
    originals = [render(pair.scene) for pair in pairs[:-1]]  # of one caption, to be changed after the next
    wanted = pairs[1:]
    scenes = [pair.scene for pair in wanted]
    sampler = ["--dtype", "fp32", "--scheduler", "ddim", "--num-inference-steps", "20", "--guidance-scale", "3"]
    truth = edit(package_of("shapes-64", folder / "packages" / "FP", *sampler), originals, wanted)
    truth_features = features(truth)

    lines = ["| | PSNR, dB | 1 − SSIM | feature FID to FP | captions right |", "|---|---|---|---|---|"]
    lines.append(f"| FP | – | – | – | {percent(mean_interval(caption_accuracy(truth, scenes).astype(np.float64)))} |")
    shown = {"given": np.stack(originals[:8]), "FP": truth[:8]}
    for name in arguments.only:
        images = edit(package_of(str(folder / "runs" / name), folder / "packages" / name), originals, wanted)
        found = Edited(
            images=images,
            right=caption_accuracy(images, scenes),
            fidelity=compare_images(images, truth),
            frechet=frechet_interval(features(images), truth_features),
        )
        lines.append(row(name, found))
        shown[name] = images[:8]
    text = "\n".join(lines) + "\n"
    (folder / "editing.md").write_text(text, encoding="utf-8")
    if arguments.picture is not None:
        comparison_grid(shown).save(arguments.picture)
    if arguments.docs is not None:
        insert(arguments.docs, "editing", text)
    print(text)


if __name__ == "__main__":
    main()
