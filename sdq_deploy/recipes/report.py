"""A pydantic error as lines for people: the key, what is wrong with it, what is allowed."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

__all__ = ["describe_errors"]


def describe_errors(model: type[BaseModel], error: ValidationError) -> list[str]:
    """One line per mistake, "key: found ..., allowed ..."."""
    return [_describe(model, details) for details in error.errors()]


def _describe(model: type[BaseModel], details: ErrorDetails) -> str:
    key = ".".join(str(part) for part in details["loc"])
    kind, context, found = details["type"], details.get("ctx", {}), details.get("input")
    if kind == "extra_forbidden":
        return _unknown_key(model, details["loc"])
    if kind == "missing":
        return f"{key}: is missing"
    if kind == "value_error":
        return f"{key}: {context['error']}"
    return f"{key}: found {found!r}; allowed: {_allowed(kind, context, details['msg'])}"


def _allowed(kind: str, context: dict[str, Any], message: str) -> str:
    if kind == "literal_error":
        return str(context["expected"])
    bounds = {
        "greater_than_equal": ("ge", ">="),
        "greater_than": ("gt", ">"),
        "less_than_equal": ("le", "<="),
        "less_than": ("lt", "<"),
    }
    if kind in bounds:
        name, sign = bounds[kind]
        return f"{sign} {context[name]}"
    text = message.removeprefix("Input should be ")
    return text.split(", ")[0]


def _unknown_key(model: type[BaseModel], location: tuple[int | str, ...]) -> str:
    section: type[BaseModel] = model
    for part in location[:-1]:
        annotation = section.model_fields[str(part)].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            section = annotation
    allowed = list(section.model_fields)
    near = difflib.get_close_matches(str(location[-1]), allowed, n=1)
    guess = f" (did you mean {near[0]}?)" if near else ""
    return f"{'.'.join(map(str, location))}: there is no such key{guess}; allowed: {', '.join(allowed)}"
