"""What a process can say about itself on every platform: its peak memory, and how another one died."""

from __future__ import annotations

import signal
import sys

from sdq_engines.memory import resident_bytes

__all__ = ["PeakMemory", "how_it_died", "peak_memory_bytes"]

_SIGKILL = 9


def peak_memory_bytes() -> int:
    """The peak resident memory of this process; 0 where the platform does not say."""
    try:
        # getrusage would count the parent's pages from before exec.
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    if sys.platform == "win32":
        return _windows_peak()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _windows_peak() -> int:
    import ctypes
    from ctypes import wintypes

    class Counters(ctypes.Structure):
        _fields_ = [("cb", wintypes.DWORD), ("PageFaultCount", wintypes.DWORD)] + [
            (name, ctypes.c_size_t)
            for name in ("PeakWorkingSetSize", "WorkingSetSize", "QuotaPeakPagedPoolUsage", "QuotaPagedPoolUsage",
                         "QuotaPeakNonPagedPoolUsage", "QuotaNonPagedPoolUsage", "PagefileUsage", "PeakPagefileUsage")
        ]  # fmt: skip

    counters = Counters(cb=ctypes.sizeof(Counters))
    windll = getattr(ctypes, "windll")  # noqa: B009  (it exists on Windows alone)
    handle = ctypes.c_void_p(windll.kernel32.GetCurrentProcess())
    done = windll.psapi.GetProcessMemoryInfo(handle, ctypes.byref(counters), counters.cb)
    return int(counters.PeakWorkingSetSize) if done else 0


class PeakMemory:
    """The most memory that another process was seen to hold, looked at now and then.

    Attributes:
        bytes: so far; 0 where the platform does not say.
    """

    def __init__(self, pid: int) -> None:
        self.pid, self.bytes = pid, 0

    def look(self) -> None:
        """Look once."""
        self.bytes = max(self.bytes, resident_bytes(self.pid))


def how_it_died(returncode: int, memory: int = 0) -> str | None:
    """Words for the end of a child that was killed or crashed; None if it exited by itself.

    Args:
        returncode: the child's.
        memory: bytes that it was last seen to hold. Nobody but the system kills a child with SIGKILL unasked, and the
            system does it when memory runs out.
    """
    if returncode == -_SIGKILL:
        return "was killed, probably for want of memory" + (f" ({memory / 1e9:.1f} GB were in use)" if memory else "")
    if returncode < 0:
        try:
            return f"was ended by {signal.Signals(-returncode).name}"
        except ValueError:
            return f"was ended by signal {-returncode}"
    if returncode >= 0xC0000000:  # Windows' NTSTATUS codes
        return f"crashed (status 0x{returncode:08X})"
    return None
