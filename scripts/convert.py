"""``mhla convert`` in a copy of the repository.

python scripts/convert.py --model facebook/DiT-XL-2-256 --out DIR
"""

from mhla_diffusion.commands.main import run

if __name__ == "__main__":
    run("convert")
