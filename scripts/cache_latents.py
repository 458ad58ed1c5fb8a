"""``mhla cache-latents`` in a copy of the repository.

accelerate launch scripts/cache_latents.py image|video ...
"""

from mhla_diffusion.commands.main import run

if __name__ == "__main__":
    run("cache-latents")
