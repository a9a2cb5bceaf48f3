"""Where the runtime keeps what is not part of a package: the platform's cache folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """The folder for caches: $SDQ_CACHE_DIR, or the platform's own place for them. It may not exist yet."""
    if named := os.environ.get("SDQ_CACHE_DIR"):
        return Path(named)
    home = Path.home()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local")) / "sdq-deploy" / "cache"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "sdq-deploy"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "sdq-deploy"
