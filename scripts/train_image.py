"""``mhla train-image`` in a copy of the repository.

accelerate launch scripts/train_image.py --config configs/image_dit_mnist.yaml
"""

from mhla_diffusion.commands.main import run

if __name__ == "__main__":
    run("train-image")
