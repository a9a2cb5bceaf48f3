"""Quantization-aware training with the serial-to-parallel pipeline (docs/architecture.md, docs/quantization.md)."""
