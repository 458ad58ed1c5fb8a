"""``mhla export videos`` in a copy of the repository.

python scripts/export_videos.py --data.source moving_mnist --num 100 --out DIR
"""

from mhla_diffusion.commands.main import run

if __name__ == "__main__":
    run("export", "videos")
