"""Every method at the same sites, bits and data: how near its images stay to the floating-point model's.

    python benchmarks/fidelity.py build/fidelity --images 2048          # about two hours on two cores
    python benchmarks/fidelity.py build/fidelity --table ablation --images 512 --seeds 3

Trains each row on shapes-64 with the serial dataset of the first, then runs `sdq-deploy evaluate` on all of them over
held-out prompts (runs by the torch reference that export is checked against). Finished rows are kept. Prints a Markdown
table and writes it, with everything that evaluate writes, into the folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

S2P_PLAIN = ["--set", "fit.ild_weight=0", "--set", "freezing.enabled=false"]


@dataclass(frozen=True)
class Row:
    """One line of a table: its name, and the options of `sdq-deploy train` that make it."""

    name: str
    options: tuple[str, ...] = ()


METHODS = (
    Row("s2p"),
    Row("efficientdm", ("--method", "efficientdm")),
    Row("reconstruction", ("--method", "ptq-reconstruction")),
    Row("ptq-search", ("--method", "ptq", "--ptq-algorithm", "search")),
    Row("ptq-mse", ("--method", "ptq", "--ptq-algorithm", "mse")),
    Row("ptq-max", ("--method", "ptq", "--ptq-algorithm", "max")),
    Row("ptq-percentile", ("--method", "ptq", "--ptq-algorithm", "percentile")),
    Row("ptq-smoothquant", ("--method", "ptq", "--ptq-algorithm", "smoothquant")),
)

# Time information precalculation has no row: the tables hold the very values of the layers they replace.
ABLATION = (
    Row("serial", ("--pipeline", "serial", *S2P_PLAIN, "--set", "quantization.groups=1")),
    Row("parallel", ("--pipeline", "parallel", *S2P_PLAIN, "--set", "quantization.groups=1")),
    Row("s2p-1-group", (*S2P_PLAIN, "--set", "quantization.groups=1")),
    Row("s2p-2-groups", (*S2P_PLAIN, "--set", "quantization.groups=2")),
    Row("s2p-5-groups", (*S2P_PLAIN, "--set", "quantization.groups=5")),
    Row("s2p-T-groups", tuple(S2P_PLAIN)),
    Row("s2p-T-groups-ild", ("--set", "freezing.enabled=false")),
    Row("s2p-T-groups-ild-sf"),
)

SCALES = (
    Row("one-scale", ("--method", "ptq", "--ptq-algorithm", "search", "--set", "quantization.groups=1")),
    Row("per-step-scales", ("--method", "ptq", "--ptq-algorithm", "search")),
    Row("s2p"),
)

TABLES = {"methods": METHODS, "ablation": ABLATION, "scales": SCALES}
COLUMNS = ("psnr", "ssim", "feature_fid", "caption_accuracy")


def train(row: Row, run: Path, dataset: Path | None, precision: str, seed: int) -> None:
    """Train one row unless its run is complete; the first row's dataset serves all of its seed."""
    record = run / "run.json"
    if record.is_file() and json.loads(record.read_text(encoding="utf-8"))["status"] == "complete":
        return
    command = ["train", "shapes-64", "--out", str(run), "--precision", precision, "--seed", str(seed), *row.options]
    command += ["--dataset", str(dataset)] if dataset is not None else []
    command += ["--resume"] if record.is_file() else []
    sdq(command)


def sdq(command: list[str]) -> None:
    print("$ sdq-deploy", *command, flush=True)
    subprocess.run([sys.executable, "-m", "sdq_deploy.cli.main", *command], check=True)


def table(results: dict[str, Any], runs: dict[str, Path]) -> str:
    """Markdown: figures with their 95 % intervals, and what the fit took."""
    lines = [
        "| | PSNR, dB | 1 − SSIM | feature FID to FP | captions right | fit | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    reference = results["reference"]["figures"]["caption_accuracy"]
    lines.append(f"| FP | – | – | – | {percent(reference)} | – | – |")
    for candidate in results["candidates"]:
        psnr, ssim, fid, captions = (candidate["figures"][name] for name in COLUMNS)
        stage = json.loads((runs[candidate["name"]] / "run.json").read_text(encoding="utf-8"))["stages"]["fit"]
        peak = stage.get("measured", {}).get("peak_memory_bytes")
        cells = [
            candidate["name"],
            spread(psnr, 1),
            f"{1 - ssim['value']:.4f} ({1 - ssim['high']:.4f} … {1 - ssim['low']:.4f})",
            spread(fid, 3),
            percent(captions),
            f"{stage['seconds']:.0f} s",
            "–" if not peak else f"{peak / 1e9:.2f} GB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(figure: dict[str, float], digits: int) -> str:
    if figure["low"] is None:
        return f"{figure['value']:.{digits}f}"
    return f"{figure['value']:.{digits}f} ({figure['low']:.{digits}f} … {figure['high']:.{digits}f})"


def percent(figure: dict[str, float]) -> str:
    return f"{100 * figure['value']:.1f} % ({100 * figure['low']:.1f} … {100 * figure['high']:.1f})"


def differences(results: dict[str, Any], first: str) -> str:
    """Paired differences of one row to all others and to FP, Markdown."""
    lines = [f"| {first} minus | PSNR, dB | SSIM | captions right, points |", "|---|---|---|---|"]
    rows: dict[str, dict[str, str]] = {}
    for found in results["comparisons"]:
        if first not in (found["first"], found["second"]):
            continue
        sign = 1 if found["first"] == first else -1
        other = found["second"] if sign == 1 else found["first"]
        low, high = sorted((sign * found["low"], sign * found["high"]))
        factor, digits = {"psnr": (1, 2), "ssim": (1, 4), "caption_accuracy": (100, 1)}[found["figure"]]
        value, low, high = (factor * part for part in (sign * found["value"], low, high))
        rows.setdefault(other, {})[found["figure"]] = f"{value:+.{digits}f} ({low:+.{digits}f} … {high:+.{digits}f})"
    for other, cells in rows.items():
        lines.append(
            f"| {other} | {' | '.join(cells.get(name, '–') for name in ('psnr', 'ssim', 'caption_accuracy'))} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--table", choices=TABLES, default="methods")
    parser.add_argument("--precision", choices=("w8a8", "w4a8"), default="w4a8")
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each row")
    parser.add_argument("--only", nargs="+", help="names of rows")
    arguments = parser.parse_args()
    folder: Path = arguments.folder / f"{arguments.table}-{arguments.precision}"
    rows = [row for row in TABLES[arguments.table] if not arguments.only or row.name in arguments.only]
    runs: dict[str, Path] = {}
    for seed in range(arguments.seeds):
        first: Path | None = None
        for row in rows:
            name = row.name if arguments.seeds == 1 else f"{row.name}-seed{seed}"
            runs[name] = folder / "runs" / name
            train(row, runs[name], first, arguments.precision, seed)
            first = first or runs[name]
    out = folder / "evaluation"
    candidates = [f"{name}={run}" for name, run in runs.items()]
    options = ["--split", "held_out", "--num-images", str(arguments.images), "--processes", "2", "--out", str(out)]
    sdq(["evaluate", *candidates, *options])
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    text = f"{table(results, runs)}\n\n{differences(results, next(iter(runs)))}\n"
    (folder / "table.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
