"""FLOPs, bytes and the bound on the speed-up of MHLA for a model and a size, and the blocks to take.

python scripts/plan.py --model DiT-XL/2 --height 1024 --width 1024
python scripts/plan.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --height 480 --width 832 --frames 81
"""

from __future__ import annotations

import sys

from jsonargparse import auto_cli

from mhla_diffusion.planning import plan

if __name__ == "__main__":
    try:
        print(auto_cli(plan, as_positional=False, allow_abbrev=False))
    except ValueError as error:
        sys.exit(f"error: {error}")
