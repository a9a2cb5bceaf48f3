"""Time from nothing: importing the runtime, and `sdq-deploy run` from process start to the saved picture.

    python benchmarks/startup.py build/demo/package

Medians over whole processes, warm file cache; the bare interpreter is measured beside them and the ratio printed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path


def median_seconds(command: list[str], runs: int) -> float:
    """Median wall time of the command as a whole process, after one run that is not counted."""
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def main() -> None:
    """Measure and print as a table, or as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--engine", action="append", help="engines to run with (default: openvino, onnxruntime)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    interpreter = [sys.executable, "-c", "pass"]
    rows = {"python -c pass": median_seconds(interpreter, arguments.runs)}
    rows["import sdq_engines (process)"] = median_seconds([sys.executable, "-c", "import sdq_engines"], arguments.runs)
    rows["sdq-deploy --help"] = median_seconds([sys.executable, "-m", "sdq_deploy.cli.main", "--help"], arguments.runs)
    with tempfile.TemporaryDirectory() as folder:
        for engine in arguments.engine or ["openvino", "onnxruntime"]:
            command = [sys.executable, "-m", "sdq_deploy.cli.main", "run", str(arguments.package)]
            command += ["a red circle", "--seed", "7", "--engine", engine, "--out", str(Path(folder) / "image.png")]
            rows[f"sdq-deploy run --engine {engine}"] = median_seconds(command, arguments.runs)

    versions = {name: version(name) for name in ("numpy", "pydantic", "typer", "onnxruntime", "openvino")}
    versions |= {"python": platform.python_version(), "machine": platform.machine()}
    if arguments.json:
        print(json.dumps({"seconds": rows, "versions": versions, "runs": arguments.runs}, indent=2))
        return
    base = rows["python -c pass"]
    for name, seconds in rows.items():
        print(f"{name:36} {seconds:7.3f} s   {seconds / base:6.1f} x the bare interpreter")
    print(" · ".join(f"{name} {value}" for name, value in versions.items()))


if __name__ == "__main__":
    main()
