"""Two nodes of one process each, on this machine, by `accelerate launch` as docs/training-at-size.md says it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import psutil

from tests.deploy.training.helpers import ROOT, free_port


def launch_nodes(*arguments: object) -> list[subprocess.Popen[str]]:
    """Start the two nodes; each is a launcher with its process."""
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "export", "engines"))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    port = str(free_port())
    nodes = []
    for rank in ("0", "1"):
        command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "2"]
        command += ["--num_processes", "2", "--machine_rank", rank, "--main_process_ip", "127.0.0.1"]
        command += ["--main_process_port", port, "--rdzv_backend", "static", "--mixed_precision", "no"]
        command += ["--dynamo_backend", "no", "-m", "sdq_deploy.cli.main", *map(str, arguments)]
        node = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        nodes.append(node)
    return nodes


def finish(nodes: list[subprocess.Popen[str]]) -> list[str]:
    """Wait for all of them to succeed; what each printed."""
    printed = []
    for node in nodes:
        output, _ = node.communicate(timeout=500)
        assert node.returncode == 0, output
        printed.append(output)
    return printed


def kill(nodes: list[subprocess.Popen[str]]) -> None:
    """SIGKILL for the launchers and what they launched, all at once: a killed launcher would leave its processes."""
    launchers = [psutil.Process(node.pid) for node in nodes if node.poll() is None]
    for process in [*launchers, *(child for each in launchers for child in each.children(recursive=True))]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    for node in nodes:
        node.communicate()
