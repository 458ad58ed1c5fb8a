"""Write the pages of --help again, after a change of what commands take.

python scripts/write_help.py
"""

from __future__ import annotations

from mhla_diffusion.commands.main import paths
from mhla_diffusion.commands.pages import write_pages

if __name__ == "__main__":
    write_pages(paths())
