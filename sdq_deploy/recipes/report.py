"""A pydantic error as lines for people: the key, what is wrong with it, what is allowed."""

from __future__ import annotations

import difflib

from pydantic import BaseModel, ValidationError

from sdq_engines.validation import describe_mistake

__all__ = ["describe_errors"]


def describe_errors(model: type[BaseModel], error: ValidationError) -> list[str]:
    """One line per mistake, "key: found ..., allowed ..."."""
    return [
        _unknown_key(model, details["loc"]) if details["type"] == "extra_forbidden" else describe_mistake(details)
        for details in error.errors()
    ]


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
