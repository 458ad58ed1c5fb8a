"""Train a text-to-video model.

    accelerate launch scripts/train_video.py --config configs/video_wan_moving_mnist.yaml
    accelerate launch scripts/train_video.py --config FILE --lora.rank 16 --resume latest

Exit codes: 0 when trained to the end; 130 (Ctrl-C) or 143 (SIGTERM) when stopped, after saving a checkpoint
that ``--resume latest`` goes on from; 1 for an error.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..training import VideoTrainingConfig, run_script, train_video


def main(arguments: Sequence[str], prog: str) -> int:
    """Return the exit code of a training."""
    return run_script(VideoTrainingConfig, train_video, arguments, prog=prog, description=__doc__ or "")
