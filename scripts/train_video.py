"""``mhla train-video`` in a copy of the repository.

accelerate launch scripts/train_video.py --config configs/video_wan_moving_mnist.yaml
"""

from mhla_diffusion.commands.main import run

if __name__ == "__main__":
    run("train-video")
