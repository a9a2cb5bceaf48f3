"""Files that one process writes and others, on other nodes too, read: there for all, or said why not."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from sdq_engines.errors import SdqError

__all__ = ["PATIENCE", "await_files"]

#: Seconds: a network file system may show a new file to other nodes only after its cache of the folder has expired,
#: with NFS's defaults after a minute at most.
PATIENCE = 90.0


def await_files(paths: Sequence[Path], patience: float = PATIENCE) -> None:
    """Return once all of these files can be seen from this process; one that is alone does not wait for any.

    Raises:
        SdqError: one is not there, after `patience` seconds where several processes work together.
    """
    missing = [path for path in paths if not path.is_file()]
    end = time.monotonic() + (patience if _in_company() else 0)
    while missing and time.monotonic() < end:
        time.sleep(min(1.0, patience / 10))
        for folder in {path.parent for path in missing if path.parent.is_dir()}:
            os.listdir(folder)  # renews what the client of a network file system knows of it
        missing = [path for path in missing if not path.is_file()]
    if not missing:
        return
    if _in_company():
        raise SdqError(
            f"On {socket.gethostname()}, {len(missing)} files that the other processes have written are not to be "
            f"seen, such as {missing[0]}.",
            "Every node must see the same folder: give an --out on a shared file system.",
        )
    raise SdqError(
        f"{len(missing)} files of the run are gone, such as {missing[0]}.",
        "Restore them, or train into a new --out.",
    )


def _in_company() -> bool:
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
