"""How much memory a process may still take, and how much it holds; and giving back what it no longer uses."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["available_memory_bytes", "give_back_memory", "resident_bytes"]

_ROOT = Path("/")
_WORTH_GIVING_BYTES = 2 << 30
"""A process that holds less has nothing that another would miss, and collecting all that the training stack has loaded
takes half a second, several times an export."""


def available_memory_bytes(root: Path = _ROOT) -> int | None:
    """What this process can take before the system has to swap or kill; None where the platform does not say.

    On Linux the least of what the machine has available and what each control group of the process (a container's
    limit, versions 1 and 2) leaves; pages of files, which the system takes back, count as free. On Windows the free
    physical memory.

    Args:
        root: of the file system that has /proc and /sys.
    """
    if sys.platform == "win32":
        return _windows_available()
    found = [*_machine(root), *_groups(root)]
    return max(0, min(found)) if found else None


def resident_bytes(pid: int | None = None) -> int:
    """Physical memory that a process holds now, this one by default; 0 where the platform does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = Path(f"/proc/{pid or os.getpid()}/statm").read_text(encoding="ascii").split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def give_back_memory() -> None:
    """Collect what is unreachable, and let the C library return free pages to the system where it can (glibc).

    Graphs and modules refer to each other in circles, and glibc keeps freed pages between those in use: after an export
    of Stable Diffusion v1-4 that is gigabytes, which an engine's builder needs. A process that holds less than two is
    left alone.
    """
    if 0 < resident_bytes() < _WORTH_GIVING_BYTES:
        return
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def _machine(root: Path) -> Iterator[int]:
    with contextlib.suppress(OSError):
        found = re.search(r"^MemAvailable:\s+(\d+) kB", (root / "proc/meminfo").read_text("ascii"), re.MULTILINE)
        if found:
            yield 1024 * int(found[1])


def _groups(root: Path) -> Iterator[int]:
    """What is left in each control group that the process is in, up to the root of the hierarchy."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text("utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                yield from _left(root / "sys/fs/cgroup", path, "memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                yield from _left(
                    root / "sys/fs/cgroup/memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes",
                    "total_inactive_file",
                )  # fmt: skip


def _left(mount: Path, path: str, limit: str, used: str, reclaimable: str) -> Iterator[int]:
    folder = mount / path.lstrip("/")
    for group in (folder, *folder.parents):
        with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
            most, now = int((group / limit).read_text("ascii")), int((group / used).read_text("ascii"))
            pages = re.search(rf"^{reclaimable} (\d+)", (group / "memory.stat").read_text("ascii"), re.MULTILINE)
            yield most - now + (int(pages[1]) if pages else 0)
        if group == mount:
            return


def _windows_available() -> int | None:
    class Status(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong)] + [
            (name, ctypes.c_ulonglong)
            for name in ("total", "available", "total_page", "available_page", "total_virtual", "available_virtual",
                         "available_extended")
        ]  # fmt: skip

    status = Status(length=ctypes.sizeof(Status))
    windll = getattr(ctypes, "windll")  # noqa: B009  (it exists on Windows alone)
    return int(status.available) if windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)) else None
