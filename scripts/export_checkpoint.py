"""``mhla export-checkpoint`` in a copy of the repository.

python scripts/export_checkpoint.py --run RUN --out DIR
"""

from mhla_diffusion.commands.main import run

if __name__ == "__main__":
    run("export-checkpoint")
