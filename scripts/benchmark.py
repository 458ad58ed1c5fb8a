"""Speed and memory of MHLA beside its alternatives on this machine.

python scripts/benchmark.py operator --out runs/benchmark
python scripts/benchmark.py model --sizes "[256, 512]"
python scripts/benchmark.py layer --out runs/benchmark
python scripts/benchmark.py loading --path DIR
python scripts/benchmark.py evaluation --real DIR --generated DIR
python scripts/benchmark.py evaluation_video
python scripts/benchmark.py frechet
"""

from __future__ import annotations

import sys
from typing import Any

from jsonargparse import auto_cli

from mhla_diffusion.benchmarks.evaluation import evaluation
from mhla_diffusion.benchmarks.evaluation_video import evaluation_video
from mhla_diffusion.benchmarks.frechet import frechet
from mhla_diffusion.benchmarks.layer import layer
from mhla_diffusion.benchmarks.loading import loading
from mhla_diffusion.benchmarks.model import model
from mhla_diffusion.benchmarks.operator import operator

if __name__ == "__main__":
    commands: dict[str, Any] = {
        "operator": operator,
        "model": model,
        "layer": layer,
        "loading": loading,
        "evaluation": evaluation,
        "evaluation_video": evaluation_video,
        "frechet": frechet,
    }
    try:
        print(auto_cli(commands, as_positional=False, allow_abbrev=False))
    except (ValueError, RuntimeError, ImportError) as error:
        sys.exit(f"error: {error}")
