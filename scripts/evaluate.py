"""``mhla evaluate`` in a copy of the repository.

python scripts/evaluate.py image --real DIR --generated DIR --out DIR
"""

from mhla_diffusion.commands.main import run

if __name__ == "__main__":
    run("evaluate")
