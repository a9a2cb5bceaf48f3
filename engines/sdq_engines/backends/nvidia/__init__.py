"""TensorRT and TensorRT-RTX: one code, the library's module chosen by the engine's name."""
