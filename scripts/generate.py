"""``mhla generate`` in a copy of the repository.

accelerate launch scripts/generate.py image --model DIR --num 1000 --out DIR
"""

from mhla_diffusion.commands.main import run

if __name__ == "__main__":
    run("generate")
