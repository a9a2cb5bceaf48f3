"""CPU time of the weight scale search: a million weights at 4 bits.

python benchmarks/search.py
"""

from __future__ import annotations

import time

import torch

from sdq_deploy.training.search import search_weight_scale
from sdq_engines.formats import INT4


def main() -> None:
    weight = torch.randn(512, 2048, generator=torch.Generator().manual_seed(0))
    seconds = []
    for _ in range(3):
        started = time.process_time()
        search_weight_scale(weight, INT4)
        seconds.append(time.process_time() - started)
    print(f"{weight.numel():,} weights: {min(seconds):.2f} s of CPU time, wanted below 1.5 s")


if __name__ == "__main__":
    main()
