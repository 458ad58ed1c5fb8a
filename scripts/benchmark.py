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

import os
import sys
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which counts memory, else tells its steps

from jsonargparse import auto_cli

from mhla_diffusion import benchmark, benchmark_evaluation, benchmark_video

if __name__ == "__main__":
    commands: dict[str, Any] = {
        "operator": benchmark.operator,
        "model": benchmark.model,
        "layer": benchmark_video.layer,
        "loading": benchmark_video.loading,
        "evaluation": benchmark_evaluation.evaluation,
        "evaluation_video": benchmark_evaluation.evaluation_video,
        "frechet": benchmark_evaluation.frechet,
    }
    try:
        print(auto_cli(commands, as_positional=False, allow_abbrev=False))
    except (ValueError, RuntimeError, ImportError) as error:
        sys.exit(f"error: {error}")
