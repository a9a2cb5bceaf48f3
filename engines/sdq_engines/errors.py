"""The one exception that a user is meant to read."""

from __future__ import annotations

__all__ = ["SdqError"]


class SdqError(Exception):
    """A mistake or a limit that the user can do something about; commands print it without a traceback.

    Args:
        message: one sentence: what was found, what was wanted.
        hint: what to do next, preferably a command. May be empty.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[type[SdqError], tuple[str, str]]:
        # Exception's own pickling would pass the message alone; builders raise this across processes.
        return type(self), (self.message, self.hint)
