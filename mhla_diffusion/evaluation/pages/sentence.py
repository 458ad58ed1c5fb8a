"""Protocol of a report in sentences, to be pasted into a paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..scores.score import Score
from ..sets.samples import SetSummary


def protocol_sentence(
    scores: list[Score], real: SetSummary, generated: SetSummary, protocol: Mapping[str, Any], kind: str
) -> str:
    """State what was measured, on what, and how the samples were made, as far as manifests say it."""
    made, known = ("unknown numbers of" if n is None else f"{n:,}" for n in (generated.count, real.count))
    found = _listed([str(score) for score in scores])
    said = [
        f"{found}, of {made} generated against {known} real {kind}s.", f"Pixels: {protocol['conversion']}."
    ]  # fmt: skip
    for name, its in protocol["extractors"].items():
        said.append(
            f"Features are those of {name} ({its['weights']}, sha256 {str(its['weights_sha256'])[:12]}, "
            f"{its['feature_dimension']} dimensions); {kind}s were resized {its['resize']}, and "
            f"normalized as {its['normalization']}; {its['statistics']}."
        )
    if "clips" in protocol:
        said.append(f"Clips: {protocol['clips']}.")
    if protocol["intervals"] != "none":
        said.append(f"Intervals: {protocol['intervals']}.")
    said.append(_how_made(generated.manifest, kind))
    versions = protocol["versions"]
    said.append(f"Scored with mhla-diffusion {versions['mhla-diffusion']} and torch {versions['torch']}.")
    return " ".join(filter(None, said))


def _how_made(manifest: Mapping[str, Any], kind: str) -> str:
    """Sampler, steps, guidance and size, of what generation wrote down."""
    words = {
        "num_inference_steps": "{} steps",
        "guidance_scale": "guidance {}",
        "true_cfg_scale": "guidance {}",
        "height": "height {}",
        "width": "width {}",
        "num_frames": "{} frames",
        "fps": "{} frames a second",
        "dtype": "{}",
    }
    settings = [form.format(manifest[key]) for key, form in words.items() if manifest.get(key) is not None]
    if sampler := manifest.get("scheduler", {}).get("class"):
        settings.insert(0, sampler)
    if not settings:
        return f"How the {kind}s were made is not recorded."
    pipeline = manifest.get("pipeline", {}).get("class", "a pipeline")
    weights = manifest.get("weights_sha256")
    model = pipeline if weights is None else f"{pipeline} (weights sha256 {weights[:12]})"
    return f"The {kind}s were made by {model} with {_listed(settings)}."


def _listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
