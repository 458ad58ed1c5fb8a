"""``mhla demo`` in a copy of the repository.

python scripts/demo.py runs/mhla/pipeline=runs/softmax/pipeline
"""

from mhla_diffusion.commands.main import run

if __name__ == "__main__":
    run("demo")
