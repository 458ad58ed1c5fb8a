"""The README.md of a saved pipeline."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard, ModelCardData, create_repo

from mhla_diffusion.attention import MHLAConfig
from mhla_diffusion.files.writing import write_file

from .identity import transformers_of

# Marks a card as ours to write again; a card without it belongs to its author.
_MARK = "<!-- Written by mhla_diffusion. Remove this line to keep your own edits. -->"

_BODY = """
{mark}

# {name}

{purpose} with Multi-Head Linear Attention (MHLA,
[arXiv 2601.07832](https://arxiv.org/abs/2601.07832)): attention in linear time over blocks of the token grid.

{facts}

## How to load it

```python
from mhla_diffusion import MHLAPipeline

pipe = MHLAPipeline.from_pretrained("{name}")
{call}
```
"""


@dataclass(frozen=True)
class Purpose:
    """Purpose of a kind of pipeline.

    Args:
        text: the beginning of a sentence.
        task: the hub's name for it.
        tag: one more of the hub's tags.
    """

    text: str
    task: str
    tag: str


class CardedPipeline(DiffusionPipeline):
    """Pipeline that is saved with a model card."""

    purpose: Purpose

    def example_call(self) -> str:
        """Return a line of Python that generates."""
        raise NotImplementedError

    def sizes(self) -> dict[str, str]:
        """List what it makes and of which size, as rows of the card."""
        raise NotImplementedError

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        **kwargs: Any,
    ) -> str | None:
        """Save as :meth:`diffusers.DiffusionPipeline.save_pretrained` does, with a model card.

        A README.md that somebody wrote or edited is left as it is.

        Returns:
            The address of the upload, if there was one.
        """
        super().save_pretrained(save_directory, **kwargs)
        repo_id = repo_id or os.path.basename(os.path.abspath(save_directory))
        if push_to_hub:
            repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        write_model_card(self, save_directory, repo_id=repo_id)
        if not push_to_hub:
            return None
        return self._upload_folder(
            save_directory, repo_id, token=token, commit_message=commit_message, create_pr=create_pr
        )

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str | None:
        """Upload to the hub: :meth:`save_pretrained` into a temporary folder with ``push_to_hub=True``."""
        with tempfile.TemporaryDirectory() as folder:
            return self.save_pretrained(folder, push_to_hub=True, repo_id=repo_id, **kwargs)


def write_model_card(pipeline: CardedPipeline, folder: str | os.PathLike[str], *, repo_id: str) -> None:
    """Write README.md into a folder, unless one that is not ours lies there."""
    path = os.path.join(folder, "README.md")
    if os.path.exists(path):
        with open(path, encoding="utf-8") as existing:
            if _MARK not in existing.read():
                return
    facts = "\n".join(f"| {key} | {value} |" for key, value in _facts(pipeline).items())
    purpose = pipeline.purpose
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=purpose.task,
        tags=["mhla", "linear-attention", purpose.tag],
    )
    body = _BODY.format(
        mark=_MARK,
        name=repo_id,
        purpose=purpose.text,
        facts=f"| | |\n|---|---|\n{facts}",
        call=pipeline.example_call(),
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n{body}")
    write_file(path, card.save)


def _facts(pipeline: CardedPipeline) -> dict[str, str]:
    """What a reader of the card wants to know, as text."""
    facts: dict[str, str] = {}
    for name, transformer in transformers_of(pipeline).items():
        suffix = f" ({name})" if facts else ""
        facts |= {f"{key}{suffix}": value for key, value in _attention(transformer).items()}
        facts[f"parameters{suffix}"] = f"{sum(p.numel() for p in transformer.parameters()):,}"
    facts |= {**pipeline.sizes(), "scheduler": type(pipeline.scheduler).__name__}
    training = pipeline.config.training or {"training": "not recorded"}
    return facts | {key.replace("_", " "): str(value) for key, value in _flatten(training).items()}


def _attention(transformer: Any) -> dict[str, str]:
    """What attention a transformer has."""
    # A stock model will do for a pipeline.
    kinds = getattr(transformer, "layer_attention", ["softmax"] * transformer.config.num_layers)
    counts = ", ".join(f"{kind} in {count} of {len(kinds)} layers" for kind, count in Counter(kinds).items())
    if not hasattr(transformer, "mixing_blocks") or set(kinds) == {"softmax"}:
        return {"attention": counts}
    stored = transformer.config.mhla_config
    choices = stored if isinstance(stored, (list, tuple)) else [stored] * len(kinds)
    # What layers with stock attention have is not used.
    used = [
        choice for choice, kind in zip(choices, kinds, strict=True) if kind != transformer.stock_attention
    ]
    configs = [MHLAConfig.from_dict(dict(choice)).to_dict() for choice in used]
    return {
        "attention": counts,
        "blocks": " x ".join(map(str, transformer.mixing_blocks)) if "mhla" in kinds else "none",
        "feature map, normalizer": _distinct(f"{c['feature_map']}, {c['normalizer']}" for c in configs),
        "settings that are not the default": _distinct(map(_changed, configs)),
    }


def _changed(config: Mapping[str, Any]) -> str:
    """What is not the default."""
    defaults = MHLAConfig().to_dict()
    changed = [f"{key} = {value}" for key, value in config.items() if defaults.get(key, not value) != value]
    return ", ".join(changed) or "none"


def _distinct(texts: Iterable[str]) -> str:
    """Texts of the layers, each once."""
    return "; ".join(dict.fromkeys(texts))


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings to one, its keys dotted, without what is not set."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat
