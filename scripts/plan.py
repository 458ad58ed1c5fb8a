"""``mhla plan`` in a copy of the repository.

python scripts/plan.py --model DiT-XL/2 --height 1024 --width 1024
"""

from mhla_diffusion.commands.main import run

if __name__ == "__main__":
    run("plan")
