"""Processes that compute together: how long they wait for each other, and how one of them ends."""

from __future__ import annotations

import contextlib
import os
import sys
from datetime import timedelta

__all__ = ["LONGEST_WAIT", "leave"]

#: How long processes wait for the one that works before they take it for dead: at real size far longer than
#: torch's default of 10 or 30 minutes.
LONGEST_WAIT = timedelta(hours=12)


def leave(code: int = 0) -> None:
    """Exit now if this process is one of several; return if it is alone.

    gloo's threads may still hold tensors, and one that lets go of its last while the interpreter is being torn down
    ends the process by SIGABRT ("terminate called without an active exception"), after all work was done. So the
    teardown is skipped: by now every file is closed, and what is printed is flushed here.

    Args:
        code: exit status. With 0 the others are waited for, so that none finds its peer gone; one that failed is not.
    """
    if "torch" not in sys.modules:
        return
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return
    if code == 0:
        with contextlib.suppress(RuntimeError):
            distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
