"""What pydantic found wrong, in words for people: the key, what stands there, what is allowed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

__all__ = ["describe_mistake", "first_mistake"]

_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "more than"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "less than"),
}


def first_mistake(error: ValidationError) -> str:
    """The first mistake of a file that is damaged, and how many more there are."""
    first, *others = error.errors()
    return describe_mistake(first) + (f" (and {len(others)} more)" if others else "")


def describe_mistake(details: ErrorDetails) -> str:
    """One mistake: "key: found ..., allowed: ..."."""
    key = ".".join(str(part) for part in details["loc"])
    kind, context, found = details["type"], details.get("ctx", {}), details.get("input")
    if kind == "extra_forbidden":
        said = "there is no such key"
    elif kind == "missing":
        return f"{key} is missing"
    elif kind == "value_error":
        said = str(context["error"])
    elif kind == "json_invalid":
        said = f"is not valid JSON: {context['error']}"
    else:
        shown = repr(found)
        shown = shown if len(shown) <= 60 else f"a {type(found).__name__}"
        said = f"found {shown}; allowed: {_allowed(kind, context, details['msg'])}"
    return f"{key}: {said}" if key else said


def _allowed(kind: str, context: dict[str, Any], message: str) -> str:
    if kind == "literal_error":
        return str(context["expected"])
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return f"{words} {context[name]}"
    return message.removeprefix("Input should be ").split(", ")[0]
