"""sdq-deploy: quantization-aware training of Stable Diffusion, its evaluation, and the command line."""

from __future__ import annotations

import logging

__all__ = ["__version__"]

__version__ = "0.1.0"

# diffusers imports bitsandbytes where it is installed, and that remarks on kernels for CPUs that nothing here calls.
# Said here, which every command and every process that one starts imports before diffusers.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
