"""``mhla analyze`` in a copy of the repository: python scripts/analyze.py --model DIR --out DIR"""

from mhla_diffusion.commands.main import run

if __name__ == "__main__":
    run("analyze")
