"""Requests to a pipeline: what cannot be made is refused in one line, before anything is computed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from mhla_diffusion.arguments import is_whole, require_positive


class ClassNames:
    """Names of classes.

    Args:
        id2label: class id to its name, or names separated by commas, as in ImageNet.

    Attributes:
        ids: of each name. A name that is a class's whole label is that class's, though it be among the names
            of another: "pepper" beside "salt, pepper".
        shared: names that mean several classes, with their ids.
    """

    def __init__(self, id2label: Mapping[Any, str] | None) -> None:
        wholes, parts = defaultdict[str, list[int]](list), defaultdict[str, list[int]](list)
        for key, label in (id2label or {}).items():
            names = dict.fromkeys(name.strip() for name in label.split(","))
            wholes[label.strip()].append(int(key))
            for name in names:
                parts[name].append(int(key))
        found = {name: wholes.get(name, ids) for name, ids in parts.items()}
        self._wholes = {name: ids[0] for name, ids in wholes.items() if len(ids) == 1}
        self.ids = {name: ids[0] for name, ids in found.items() if len(ids) == 1}
        self.shared = {name: ids for name, ids in found.items() if len(ids) > 1}

    def find(self, labels: Any, num_classes: int) -> list[int]:
        """Return the class ids of one label or a list of them, each a name or an id.

        Lists in lists are one list, as for :class:`diffusers.DiTPipeline`.

        Raises:
            ValueError: for a name that means no class or several, an id out of range, or another form.
        """
        labels = list(_flat(labels))
        if other := [label for label in labels if not isinstance(label, str) and not is_whole(label)]:
            raise ValueError(f"class labels are names or ids, got {other[0]!r} among them")
        names = {label for label in labels if isinstance(label, str)}
        known = self.ids | self._wholes
        for name in sorted(names & self.shared.keys()):
            raise ValueError(f"{name!r} is a name of the classes {_listed(self.shared[name])}: give the id")
        if unknown := [name for name in labels if isinstance(name, str) and name not in known]:
            choice = ", ".join(sorted(self.ids)) or "none: this pipeline has no id2label, give class ids"
            raise ValueError(f"unknown class {', '.join(map(repr, unknown))}; the names are {choice}")
        ids = [known[label] if isinstance(label, str) else int(label) for label in labels]
        if outside := [i for i in ids if not 0 <= i < num_classes]:
            raise ValueError(f"class id {outside[0]} is out of range: the model knows 0 to {num_classes - 1}")
        return ids


def _flat(labels: Any) -> Iterator[Any]:
    labels = labels.tolist() if hasattr(labels, "tolist") else labels
    if isinstance(labels, Iterable) and not isinstance(labels, str):
        for part in labels:
            yield from _flat(part)
    else:
        yield labels


def _listed(ids: Sequence[int]) -> str:
    return f"{', '.join(map(str, ids[:-1]))} and {ids[-1]}"


def require_generators(generator: torch.Generator | list[torch.Generator] | None, count: int) -> None:
    """Check that there is one generator, or a list with one for each sample.

    Raises:
        ValueError: when there is something else.
    """
    listed = generator if isinstance(generator, list) else [generator]
    if generator is not None and not all(isinstance(one, torch.Generator) for one in listed):
        raise ValueError(
            f"generator must be a torch.Generator or a list of them, got {generator!r}: of a seed one is "
            'torch.Generator("cpu").manual_seed(seed)'
        )
    if isinstance(generator, list) and len(generator) != count:
        raise ValueError(
            f"{len(generator)} generators for {count} samples; give one, or a list with one for each"
        )


def count_samples(prompt: Any, negative_prompt: Any, prompt_embeds: Any, per_prompt: int | None) -> int:
    """Return how many samples are asked for.

    Args:
        prompt, negative_prompt: a text or a list of them, None where it is not given; an empty text is one.
        prompt_embeds: ``[B, L, D]`` in place of the prompt.
        per_prompt: samples for each; None for one.

    Raises:
        ValueError: when there is no prompt, it is something else than texts, or ``per_prompt`` is below 1.
    """
    require_positive(num_videos_per_prompt=per_prompt)
    for name, texts in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        listed = texts if isinstance(texts, list) else [texts]
        if texts is not None and not all(isinstance(text, str) for text in listed):
            raise ValueError(f"{name} must be a text or a list of texts, got {texts!r}")
    given = [prompt] if isinstance(prompt, str) else prompt_embeds if prompt is None else prompt
    if given is None or not len(given):
        raise ValueError(
            "nothing to generate: "
            + ("give a prompt or prompt_embeds" if given is None else "the list of prompts is empty")
        )
    return len(given) * (per_prompt or 1)
