"""Turn a checkpoint, quantized or not, into a package: sampler compilation, capture, graph passes, parity, writing."""
