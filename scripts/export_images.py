"""``mhla export images`` in a copy of the repository.

python scripts/export_images.py --data.source mnist --out DIR
"""

from mhla_diffusion.commands.main import run

if __name__ == "__main__":
    run("export", "images")
