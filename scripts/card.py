"""``mhla card`` in a copy of the repository.

python scripts/card.py --model DIR --report REPORT --license apache-2.0
"""

from mhla_diffusion.commands.main import run

if __name__ == "__main__":
    run("card")
