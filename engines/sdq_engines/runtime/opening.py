"""Which of a package's engines a pipeline runs on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdq_engines.backends.base import Session, check_load_options
from sdq_engines.backends.registry import AUTO, backend, fastest
from sdq_engines.errors import SdqError
from sdq_engines.package.store import Package

__all__ = ["open_engine"]


def open_engine(package: Package, engine: str, options: Mapping[str, Any]) -> Session:
    """Load an engine of a package that has been checked.

    Args:
        package: the package.
        engine: its name, or "auto" for the fastest of the package's engines that works here.
        options: of the backend.

    Raises:
        SdqError: the package lacks it, or none of its engines works here; it was built for another version or device;
            it does not take an option.
    """
    if engine == AUTO:
        return _fastest(package, options)
    chosen, entry = backend(engine), package.engine(engine)
    check_load_options(chosen, options)
    return chosen.load(package, entry, options)


def _fastest(package: Package, options: Mapping[str, Any]) -> Session:
    """The first of the package's engines, in the order of `auto`, that works and fits this machine."""
    candidates = list(package.manifest.engines)
    if not candidates:
        raise SdqError(
            f"The package at {package.folder} has no engine.",
            f"Build one: sdq-deploy build {package.folder} --engine auto",
        )
    reasons = []
    while candidates:
        name, seen = fastest(candidates)
        reasons += [f"{engine}: {found.reason}" for engine, found in seen.items() if not found.works]
        if name is None:
            break
        chosen = backend(name)
        check_load_options(chosen, options)
        try:
            return chosen.load(package, package.engine(name), options)
        except SdqError as error:  # built for another version or device: the next one may fit
            reasons.append(f"{name}: {error.message}")
            candidates = [other for other in candidates if other not in seen]
    raise SdqError(
        f"No engine of the package at {package.folder} works here: " + "; ".join(reasons),
        f"Build one that does: sdq-deploy build {package.folder} --engine auto",
    )
