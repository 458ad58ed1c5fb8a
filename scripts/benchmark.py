"""``mhla benchmark`` in a copy of the repository: python scripts/benchmark.py operator --out DIR"""

from mhla_diffusion.commands.main import run

if __name__ == "__main__":
    run("benchmark")
