"""The peers of serial-to-parallel training, as methods of the same command (docs/methods.md)."""
