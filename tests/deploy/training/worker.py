"""One process of a small training: python -m tests.deploy.training.worker MODEL OUT OVERRIDES-AS-JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from sdq_deploy.processes import leave
from sdq_deploy.training.run import run_training
from tests.deploy.training.helpers import small_settings


def main() -> None:
    model, out, overrides = sys.argv[1:]
    run_training(small_settings(Path(model), Path(out), json.loads(overrides)), resume=True, cpu=True, quiet=True)
    leave()


if __name__ == "__main__":
    main()
