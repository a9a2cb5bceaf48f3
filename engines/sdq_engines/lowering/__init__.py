"""From the canonical graph to what one engine wants: one `onnx_ir` pass per file (docs/architecture.md, "Lowering")."""
