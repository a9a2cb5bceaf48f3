"""From the captured graph to the canonical one: one small `onnx_ir` pass per file (docs/architecture.md, "Passes").

Each pass says what it requires and ensures, finds layers by the exporter's scopes, and returns whether it changed the
model. Their order is in `sdq_export.denoiser`.
"""
