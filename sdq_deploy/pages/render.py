"""Fill a page's template; every page extends `page.html.j2`, which brings the look."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["data_uri", "file_uri", "render_page"]


def render_page(package: str, template: str, context: Mapping[str, Any], filters: Mapping[str, Any]) -> str:
    """The page as text.

    Args:
        package: the import package whose `templates` folder has the template.
        template: its file name.
        context, filters: what the template uses. A name that is missing is an error.
    """
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    loader = ChoiceLoader([PackageLoader(package), PackageLoader("sdq_deploy.pages")])
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.filters |= filters
    return environment.get_template(template).render(**context)


def data_uri(data: bytes, kind: str = "image/png") -> str:
    """The bytes as an address that holds them."""
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def file_uri(path: Path) -> str:
    """A PNG file as an address that holds it."""
    return data_uri(path.read_bytes())
