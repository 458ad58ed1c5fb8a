"""The README.md of a saved pipeline."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

# Marks a card as ours to write again; a card without it belongs to its author.
_MARK = "<!-- Written by mhla_diffusion. Remove this line to keep your own edits. -->"

_BODY = """
{mark}

# {name}

Class-conditional image generation with Multi-Head Linear Attention (MHLA,
[arXiv 2601.07832](https://arxiv.org/abs/2601.07832)): attention in linear time over blocks of the token grid.

{facts}

## How to load it

```python
from mhla_diffusion import MHLAPipeline

pipe = MHLAPipeline.from_pretrained("{name}")
images = pipe({example}).images
```
"""


def write_model_card(pipeline: Any, folder: str | os.PathLike[str], *, repo_id: str) -> None:
    """Write README.md into a folder, unless one that is not ours lies there."""
    path = os.path.join(folder, "README.md")
    if os.path.exists(path):
        with open(path, encoding="utf-8") as existing:
            if _MARK not in existing.read():
                return
    example = repr([next(iter(pipeline.labels), 0)])
    facts = "\n".join(f"| {key} | {value} |" for key, value in _facts(pipeline).items())
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["mhla", "linear-attention", "class-conditional-image-generation"],
    )
    body = _BODY.format(mark=_MARK, name=repo_id, facts=f"| | |\n|---|---|\n{facts}", example=example)
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n{body}")
    partial = f"{path}.partial"
    card.save(partial)
    os.replace(partial, path)


def _facts(pipeline: Any) -> dict[str, str]:
    """What a reader of the card wants to know, as text."""
    transformer, config = pipeline.transformer, pipeline.transformer.config
    size = config.sample_size * pipeline.vae_scale_factor
    # A stock DiT will do for a pipeline.
    kinds = Counter(getattr(transformer, "layer_attention", ["softmax"] * config.num_layers))
    attention = ", ".join(f"{kind} in {count} of {config.num_layers} layers" for kind, count in kinds.items())
    facts = {"attention": attention}
    if set(kinds) != {"softmax"}:
        mhla = config.mhla_config
        parts = [name for name in ("gate", "output_norm", "mixing_per_head") if mhla[name]]
        if mhla["cpe"]:
            parts.insert(0, f"CPE ({mhla['cpe']} start)")
        facts |= {
            "blocks": " x ".join(map(str, transformer.mixing_blocks)) if "mhla" in kinds else "none",
            "feature map, normalizer": f"{mhla['feature_map']}, {mhla['normalizer']}",
            "also in each layer": ", ".join(parts) or "nothing",
        }
    facts |= {
        "parameters": f"{sum(p.numel() for p in transformer.parameters()):,}",
        "size": f"{size} x {size} pixels, {'pixel space' if pipeline.vae is None else 'latents'}",
        "classes": str(config.num_embeds_ada_norm),
        "prediction": pipeline.config.prediction_type,
        "scheduler": type(pipeline.scheduler).__name__,
    }
    training = pipeline.config.training or {"training": "not recorded"}
    return facts | {key.replace("_", " "): str(value) for key, value in _flatten(training).items()}


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings to one, its keys dotted, without what is not set."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat
