"""The README.md of a saved pipeline."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from diffusers import DiffusionPipeline
from huggingface_hub import EvalResult, ModelCardData, create_repo, metadata_load

from mhla_diffusion.backbones.weight_files import require_first
from mhla_diffusion.config import MHLAConfig
from mhla_diffusion.files.writing import write_file

from .identity import TRAINING, training_of, transformers_of
from .sampling import call_parameters, guidance_name, output_kind, with_negative_prompt
from .schedulers import prediction_of, require_scheduler, scales_inputs

# Marks a card as ours to write again, by a hash of all else, which those of earlier versions lack; any other
# belongs to its author.
_MARK = "<!-- Written by mhla_diffusion{hash}. Remove this line to keep your own edits. -->"
_MARKED = re.compile(re.escape(_MARK).replace(r"\{hash\}", r"(?: \(sha256 (\w+)\))?") + "\n")

PICTURE = "samples.png"

_BODY = """
{mark}

# {title}

{purpose} with Multi-Head Linear Attention (MHLA,
[arXiv 2601.07832](https://arxiv.org/abs/2601.07832)): attention in linear time over blocks of the token grid.
{picture}
{status}

{facts}
{scores}
## How to load it

`pip install .` in a copy of the mhla_diffusion repository, then:

```python
from mhla_diffusion import MHLAPipeline

pipe = MHLAPipeline.from_pretrained("{name}")  # or your path to this folder
{call}
```
{hint}"""

_CONVERTED = """**Converted, not fine-tuned yet.** Weights are those of {base}; what MHLA has beyond them is
at its start. It is not the same function, but a start for fine-tuning: its samples are no measure of either
model."""

_FIELDS = """# Before publishing say here, as the hub has it: license: ..., datasets: [...], language: [...]
"""


@dataclass(frozen=True)
class Purpose:
    """Purpose of a kind of pipeline.

    Args:
        text: the beginning of a sentence.
        task: the hub's name for it.
    """

    text: str
    task: str


class CardedPipeline(DiffusionPipeline):
    """Pipeline that is saved with a model card."""

    purpose: Purpose
    scales_inputs: ClassVar[bool] = True

    def require_scheduler(self) -> None:
        """Check that the scheduler fits what the model was trained to predict.

        Raises:
            ValueError: otherwise, saying which would.
        """
        if self.scheduler is None:
            return
        require_scheduler(
            self.scheduler, self.config.prediction_type, scaled=self.scales_inputs,
            alphas_cumprod=self._alphas_cumprod,
        )  # fmt: skip

    def register_modules(self, **modules: Any) -> None:
        """Register components; the first scheduler has the noise of the training."""
        if not hasattr(self, "_alphas_cumprod"):
            self._alphas_cumprod = getattr(modules.get("scheduler"), "alphas_cumprod", None)
        super().register_modules(**modules)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> CardedPipeline:
        """Load as :meth:`diffusers.DiffusionPipeline.from_pretrained` does."""
        pipeline = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if "scheduler" not in kwargs and pipeline.config.prediction_type == "flow_prediction":
            # Earlier versions called the clean sample of a flow so too; what is stored together fits.
            found = prediction_of(pipeline.scheduler, scaled=cls.scales_inputs)
            if found == "flow_sample":
                pipeline.register_to_config(prediction_type=found)
        return pipeline

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

        Raises:
            ValueError: for a scheduler that does not fit the model, and for a folder from which other weights
                would be loaded.
        """
        self.require_scheduler()
        form = {
            "variant": kwargs.get("variant"),
            "safe_serialization": kwargs.get("safe_serialization", True),
        }
        for name in transformers_of(self):
            require_first(Path(save_directory, name), **form)
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


@dataclass(frozen=True)
class Result:
    """Score as the hub has it.

    Args:
        name: such as ``fid_clean``.
        metric: what it is, whatever it was computed with, such as ``frechet``.
        value: the score.
        data: name of the real samples.
        facts: what else belongs to it, as JSON values, such as its interval.
    """

    name: str
    metric: str
    value: float
    data: str
    facts: Mapping[str, Any]

    def for_hub(self, task: str) -> EvalResult:
        """Return it for the header of a card."""
        return EvalResult(
            task_type=task, dataset_type=re.sub(r"\W+", "-", self.data), dataset_name=self.data,
            metric_type=self.metric, metric_name=self.name, metric_value=self.value,
            metric_args=dict(self.facts),
        )  # fmt: skip


@dataclass(frozen=True)
class CardFields:
    """Fields of a card that the pipeline itself knows nothing of.

    Args:
        scores: Markdown, such as the report.md of an evaluation.
        results: the same for the hub, which lists them beside those of other models.
        base_model: hub id or path of the model that this one was made of.
        license: as the hub names it, such as ``"apache-2.0"``.
        datasets: hub ids.
        converted: whether it was converted from ``base_model`` and not trained since.
    """

    scores: str | None = None
    results: tuple[Result, ...] = ()
    base_model: str | None = None
    license: str | None = None
    datasets: tuple[str, ...] = ()
    converted: bool = False


def save_with_card(
    pipeline: Any, folder: str | os.PathLike[str], training: Mapping[str, Any] | None = None
) -> None:
    """Save a pipeline, ours or one of diffusers, with a model card.

    Args:
        pipeline: ours knows its training.
        folder: where to.
        training: facts about the training of one of diffusers.
    """
    pipeline.save_pretrained(folder)
    if isinstance(pipeline, CardedPipeline):
        return
    if training:
        write_file(Path(folder) / TRAINING, json.dumps(training, indent=2, default=str))
    write_model_card(pipeline, folder, repo_id=os.path.basename(os.path.abspath(folder)))


def write_model_card(
    pipeline: Any, folder: str | os.PathLike[str], *, repo_id: str, fields: CardFields = CardFields()
) -> None:
    """Write README.md into a folder, unless one that is not ours lies there.

    Shows the picture samples.png when that is in the folder.

    Args:
        pipeline: ours, or one of diffusers with our transformer.
        folder: of the saved pipeline.
        repo_id: what it is loaded by.
        fields: what else is to be said.
    """
    path = Path(folder) / "README.md"
    if is_edited(path):
        return
    training = training_of(pipeline, folder)
    title = _title(pipeline, repo_id, training)
    base = fields.base_model or training.get("base model")
    purpose = _purpose(pipeline)
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=purpose.task,
        license=fields.license,
        datasets=list(fields.datasets) or None,
        base_model=base if base and is_hub_id(base) else None,
        tags=["mhla", "linear-attention", purpose.task],
        model_name=title if fields.results else None,
        eval_results=[result.for_hub(purpose.task) for result in fields.results] or None,
    )
    facts = "\n".join(
        f"| {key} | {_without_folders(value)} |" for key, value in _facts(pipeline, training).items()
    )
    picture = os.path.isfile(os.path.join(folder, PICTURE))
    body = _BODY.format(
        mark="{mark}",
        name=repo_id,
        title=title,
        purpose=purpose.text,
        picture=f"\n![Samples]({PICTURE})\n" if picture else "",
        status=_status(training, base, fields),
        facts=f"| | |\n|---|---|\n{facts}",
        scores=f"\n## Scores\n\n{_without_folders(fields.scores)}\n" if fields.scores else "",
        call=_example_call(pipeline, training),
        hint=""
        if fields.license
        else "\nNo licence is stated: that of the weights is their author's to say.\n",
    )
    # As it is: ModelCard.save would drop the line on fields that are still to be filled.
    text = f"---\n{data.to_yaml()}\n{'' if fields.license else _FIELDS}---\n{body}"
    before, after = text.split("{mark}\n", 1)
    mark = _MARK.format(hash=f" (sha256 {_sha256(before + after)})")
    write_file(path, f"{before}{mark}\n{after}")


def stored_fields(card: Path) -> CardFields:
    """Read the fields of a card of ours, but for scores; none where there is no card."""
    if not card.is_file():
        return CardFields()
    header = metadata_load(card) or {}
    return CardFields(
        base_model=header.get("base_model"),
        license=header.get("license"),
        datasets=tuple(header.get("datasets") or ()),
        converted=_CONVERTED.split(" Weights", 1)[0] in card.read_text("utf-8"),
    )


def is_edited(card: Path) -> bool:
    """Tell a card that somebody wrote or edited from one of ours; False where there is none."""
    if not card.exists():
        return False
    text = card.read_text("utf-8")
    mark = _MARKED.search(text)
    if mark is None:
        return True
    return mark[1] is not None and mark[1] != _sha256(text[: mark.start()] + text[mark.end() :])


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _purpose(pipeline: Any) -> Purpose:
    if isinstance(pipeline, CardedPipeline):
        return pipeline.purpose
    if output_kind(pipeline) == "images":
        return Purpose("Text-to-image generation", task="text-to-image")
    if "image" in call_parameters(pipeline):
        return Purpose("Image-to-video generation", task="image-to-video")
    return Purpose("Text-to-video generation", task="text-to-video")


def _title(pipeline: Any, repo_id: str, training: Mapping[str, Any]) -> str:
    """The name on the hub; of a folder, whose name says little, what it is."""
    if is_hub_id(repo_id):
        return repo_id.split("/")[-1]
    transformer = next(iter(transformers_of(pipeline).values()))
    model = type(transformer).__name__.partition("Transformer")[0].replace("MHLA", "MHLA-")
    data = str(training.get("data") or "").partition(",")[0]
    return f"{model} of {_without_folders(data)}" if data else model


def _status(training: Mapping[str, Any], base: str | None, fields: CardFields) -> str:
    """What was trained and what was not."""
    if fields.converted:
        return _CONVERTED.format(base=_without_folders(base or "the stock model"))
    if not training:
        return "How it was trained is not recorded."
    if source := training.get("converted from"):
        return (
            f"Converted from {_without_folders(source)}, and not trained as a whole since: what is said of "
            "training is of that model."
        )
    start = f", starting from {_without_folders(base)}" if base else ", from scratch"
    return f"Trained: {training['trained']}{start}." if "trained" in training else f"Trained{start}."


def _example_call(pipeline: Any, training: Mapping[str, Any]) -> str:
    """A line that generates as samples were made during training: their size, steps and guidance."""
    if isinstance(pipeline, CardedPipeline):
        call = pipeline.example_call()
    elif output_kind(pipeline) == "images":
        call = 'images = pipe("...").images'
    else:
        picture = "image, " if "image" in call_parameters(pipeline) else ""
        call = f'video = pipe({picture}prompt="...").frames[0]'
    known = {**_sampled_with(pipeline, training), **training.get("call", {})}
    chosen = with_negative_prompt({"prompt": "...", **known})
    literals = {name: '""' if value == "" else repr(value) for name, value in chosen.items()}
    given = "".join(f", {name}={value}" for name, value in literals.items() if name != "prompt")
    return re.sub(r"\)\.(images|frames)", rf"{given}).\1", call, count=1)


def _sampled_with(pipeline: Any, training: Mapping[str, Any]) -> dict[str, Any]:
    """Steps and guidance of the samples during training, as arguments of the pipeline's call."""
    names = {"num_inference_steps": "num_inference_steps", "guidance_scale": guidance_name(pipeline)}
    chosen = training.get("sampled with") or {}
    return {names[name]: chosen[name] for name in names if name in chosen}


def is_hub_id(name: str) -> bool:
    """Return True for what may be a model of the hub, and is nothing here."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not os.path.exists(name)


def _without_folders(text: Any) -> str:
    """A text whose absolute paths are the names of their files alone."""
    return re.sub(r"(?<![\w:/.])/(?:[^\s/|,;]+/)+([^\s/|,;]+)", r"\1", str(text))


def _facts(pipeline: Any, training: Mapping[str, Any]) -> dict[str, str]:
    """What a reader of the card wants to know, as text."""
    facts: dict[str, str] = {}
    for name, transformer in transformers_of(pipeline).items():
        suffix = f" ({name})" if facts else ""
        facts |= {f"{key}{suffix}": value for key, value in _attention(transformer).items()}
        facts[f"parameters{suffix}"] = f"{sum(p.numel() for p in transformer.parameters()):,}"
    if isinstance(pipeline, CardedPipeline):
        facts |= pipeline.sizes()
    else:
        facts |= _parts(pipeline)
    facts["scheduler"] = type(pipeline.scheduler).__name__
    apart = ("call", "settings")  # the example has the call, and settings are many
    told = {key: value for key, value in training.items() if key not in apart}
    told = _flatten(
        {**told, "sampled with": _sampled_with(pipeline, training)} if told else {"training": "not recorded"}
    )
    return facts | {key.replace("_", " "): str(value) for key, value in told.items()}


def _parts(pipeline: Any) -> dict[str, str]:
    """What a pipeline of diffusers says of itself by its parts."""
    encoders = [
        type(part).__name__ for name, part in pipeline.components.items() if name.startswith("text_encoder")
    ]
    prediction = prediction_of(pipeline.scheduler, scaled=scales_inputs(type(pipeline)))
    parts = {"text encoder": ", ".join(name for name in encoders if name != "NoneType")}
    return {name: value for name, value in {**parts, "prediction": prediction}.items() if value}


def _attention(transformer: Any) -> dict[str, str]:
    """What attention a transformer has."""
    # A stock model will do for a pipeline.
    kinds = getattr(transformer, "layer_attention", None) or ["softmax"] * transformer.config.num_layers
    counts = ", ".join(f"{kind} in {count} of {len(kinds)} layers" for kind, count in Counter(kinds).items())
    if not hasattr(transformer, "mixing_blocks") or set(kinds) == {"softmax"}:
        return {"attention": counts}
    stored = transformer.config.mhla_config
    choices = stored if isinstance(stored, (list, tuple)) else [stored] * len(kinds)
    # What layers with stock attention have is not used.
    used = [
        choice for choice, kind in zip(choices, kinds, strict=True) if kind != transformer.stock_attention
    ]
    parsed = [MHLAConfig.from_dict(dict(choice)) for choice in used]
    configs = [config.to_dict() for config in parsed]
    return {
        "attention": counts,
        "blocks": " x ".join(map(str, transformer.mixing_blocks)) if "mhla" in kinds else "none",
        "feature map, normalizer": _distinct(f"{c['feature_map']}, {c['normalizer']}" for c in configs),
        "softmax window": _distinct(map(_window, parsed)),
        "settings that are not the default": _distinct(map(_changed, configs)),
    }


def _window(config: MHLAConfig) -> str:
    """The window that a config comes to, which may be one by default."""
    if config.window is None:
        return "none"
    margin = " x ".join(map(str, config.margin if isinstance(config.margin, tuple) else (config.margin,)))
    unit = "of a block" if isinstance(config.margin, float) else "tokens"
    exactly = " (exact)" if config.exact_routing else ""
    routed = f", {config.routed_blocks} routed blocks{exactly}" if config.routed_blocks else ""
    return f"{config.window}, margin {margin} {unit}{routed}"


def _changed(config: Mapping[str, Any]) -> str:
    """What is not the default."""
    defaults, values = (
        MHLAConfig().to_dict(),
        {**config, "local": config.get("local")},
    )  # left out where it is None
    changed = [f"{key} = {value}" for key, value in values.items() if defaults.get(key, not value) != value]
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
