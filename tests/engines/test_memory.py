"""What memory there is, and what a kill leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdq_engines.in_progress import IN_PROGRESS, in_progress, what_was_killed
from sdq_engines.memory import available_memory_bytes, resident_bytes

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
ROOT = Path(__file__).parents[2]


def system(root: Path, available: int, groups: dict[str, str]) -> Path:
    """A machine's /proc and /sys: kilobytes available, and files of control groups."""
    files = {"proc/meminfo": f"MemTotal: 99999999 kB\nMemAvailable:   {available} kB\n", **groups}
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


@linux
@pytest.mark.parametrize(
    ("groups", "wanted"),
    [
        ({}, 8_192_000),
        # version 2: its own group has no limit, the one above has
        (
            {
                "proc/self/cgroup": "0::/pod/box\n",
                "sys/fs/cgroup/pod/box/memory.max": "max\n",
                "sys/fs/cgroup/pod/memory.max": "5000000\n",
                "sys/fs/cgroup/pod/memory.current": "3000000\n",
                "sys/fs/cgroup/pod/memory.stat": "anon 1\ninactive_file 500000\n",
            },
            2_500_000,
        ),
        # version 1
        (
            {
                "proc/self/cgroup": "5:cpu:/a\n4:memory:/a\n",
                "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "4000000\n",
                "sys/fs/cgroup/memory/a/memory.usage_in_bytes": "3500000\n",
                "sys/fs/cgroup/memory/a/memory.stat": "total_inactive_file 100\n",
            },
            500_100,
        ),
        # a limit above what the machine has
        (
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": "90000000\n",
                "sys/fs/cgroup/memory.current": "1\n",
                "sys/fs/cgroup/memory.stat": "inactive_file 0\n",
            },
            8_192_000,
        ),
    ],
)
def test_what_is_available_is_the_least_that_any_limit_leaves(
    tmp_path: Path, groups: dict[str, str], wanted: int
) -> None:
    assert available_memory_bytes(system(tmp_path, 8000, groups)) == wanted


def test_a_system_that_says_nothing_refuses_nothing(tmp_path: Path) -> None:
    if sys.platform != "win32":
        assert available_memory_bytes(tmp_path) is None
    here = available_memory_bytes()
    assert here is None or here > 10_000_000


def test_an_end_of_any_kind_but_a_kill_leaves_no_word(tmp_path: Path) -> None:
    with in_progress(tmp_path, "export") as work:
        work.stage("sampling")
        assert json.loads((tmp_path / IN_PROGRESS).read_text())["stage"] == "sampling"
    with pytest.raises(KeyboardInterrupt), in_progress(tmp_path, "export"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    assert what_was_killed(tmp_path) is None
    (tmp_path / IN_PROGRESS).write_text("{")
    assert what_was_killed(tmp_path) is None


_WORKER = """
import sys, time
from pathlib import Path
from sdq_engines.in_progress import in_progress
from sdq_engines.locks import JOB, sole_writer
folder = Path(sys.argv[1])
with sole_writer(folder, JOB, "export"), in_progress(folder, "export") as work:
    work.stage("capturing the denoiser")
    held = bytearray(b"x") * 200_000_000
    print("ready", flush=True)
    time.sleep(60)
"""


@linux
def test_a_killed_process_is_named_with_its_stage_and_memory(tmp_path: Path) -> None:
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "export", "engines"))
    worker = subprocess.Popen(
        [sys.executable, "-c", _WORKER, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
    )
    assert worker.stdout is not None
    assert worker.stdout.readline() == b"ready\n"
    assert resident_bytes(worker.pid) > 200_000_000
    assert what_was_killed(tmp_path) is None  # it still works
    until = time.monotonic() + 20
    while json.loads((tmp_path / IN_PROGRESS).read_text())["memory_bytes"] < 200_000_000:
        assert time.monotonic() < until
        time.sleep(0.05)
    worker.send_signal(signal.SIGKILL)
    worker.communicate(timeout=20)
    said = what_was_killed(tmp_path)
    assert said == (
        f"The last export to {tmp_path} was killed in the stage 'capturing the denoiser', probably for want of memory; "
        "0.2 GB were in use."
    )
