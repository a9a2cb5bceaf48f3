"""The second task: the methods' packages change a given picture after another caption (image to image).

    python benchmarks/fidelity.py build/fidelity                    # trains the runs
    python benchmarks/editing.py build/fidelity/methods-w4a8 --docs docs/fidelity.md

No method was trained for it: the denoiser meets Gaussian-noised encodings of drawings instead of its own trajectories,
and only the last steps of its sampler. Every run is exported, and images are made by the runtime on OpenVINO; the
reference is the floating-point model's package, FP32, likewise.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from fidelity import insert, percent, sdq, spread
from numpy.typing import NDArray
from rich.progress import track

from sdq_deploy.evaluation.grids import comparison_grid
from sdq_deploy.evaluation.metrics import compare_images
from sdq_deploy.evaluation.statistics import frechet_interval, mean_interval
from sdq_deploy.shapes64 import CaptionSeed, held_out_pairs, render
from sdq_deploy.shapes64.classifier import caption_accuracy, features
from sdq_engines import Pipeline
from sdq_engines.package.store import read_manifest

Images = NDArray[np.uint8]

STRENGTH = 0.7
BATCH = 8


def package_of(run: str, folder: Path, *options: str) -> Path:
    """Export a run, or a model, for OpenVINO, unless that is done."""
    if not (folder / "manifest.json").is_file() or "openvino" not in read_manifest(folder).engines:
        sdq(["export", run, "--out", str(folder), "--engine", "openvino", "--batch", f"1,{BATCH},{BATCH}", *options])
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


def row(name: str, images: Images, truth: Images, wanted: Sequence[CaptionSeed]) -> str:
    """One line of the table: what a package made, against what the floating-point model's made."""
    fidelity = compare_images(images, truth)
    cells = [
        spread(vars(mean_interval(fidelity.psnr)), 1),
        spread(vars(mean_interval(1 - fidelity.ssim)), 4),
        spread(vars(frechet_interval(features(images), features(truth))), 3),
        captions_right(images, wanted),
    ]
    return f"| {name} | {' | '.join(cells)} |"


def captions_right(images: Images, wanted: Sequence[CaptionSeed]) -> str:
    right = caption_accuracy(images, [pair.scene for pair in wanted])
    return percent(vars(mean_interval(right.astype(np.float64))))


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
    sampler = ["--dtype", "fp32", "--scheduler", "ddim", "--num-inference-steps", "20", "--guidance-scale", "3"]
    truth = edit(package_of("shapes-64", folder / "packages" / "FP", *sampler), originals, wanted)

    lines = ["| | PSNR, dB | 1 − SSIM | feature FID to FP | captions right |", "|---|---|---|---|---|"]
    lines.append(f"| FP | – | – | – | {captions_right(truth, wanted)} |")
    shown = {"given": np.stack(originals[:8]), "FP": truth[:8]}
    for name in arguments.only:
        images = edit(package_of(str(folder / "runs" / name), folder / "packages" / name), originals, wanted)
        lines.append(row(name, images, truth, wanted))
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
