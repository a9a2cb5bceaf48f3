"""From the captured graph to the canonical one: one small `onnx_ir` pass per file.

Each pass says what it requires and ensures, finds layers by the exporter's scopes, and returns whether it changed the
model. Their order is in `sdq_export.denoiser`; docs/architecture.md has what they make ("Canonical graph, then
lowering").
"""
