"""Align: each layer of the teacher, alone, in every candidate form, trained to give the same output.

Layers are jobs of their own, shared out among the processes. ``out`` has align.json, what was asked for, and
for each candidate a folder with the weights of each layer and a record of its errors; a job that has both is
done, so that the same command goes on where it was stopped.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm

from ..backbones import convert_to_mhla
from ..backbones.quantised import require_not_quantised
from ..backbones.teacher import LayerCall, attention_layers, fingerprint, layer_calls
from ..config import MHLAConfig
from ..files.locking import only_writer
from ..files.text import changes
from ..files.writing import write_file
from ..ops import recommended_layout
from ..processes import in_first_process, one_fate, process_state, wait_for_all
from ..training.data.shards import Shards
from .cache import (
    Activations,
    CacheConfig,
    cache_folder,
    cached_layers,
    caches_in,
    is_begun,
    remove_caches,
    require_disk_space,
    sample_bytes,
    write_activations,
    written_bytes,
)
from .calls import TIME_BUCKETS, Calls
from .job import AlignConfig, train_layer
from .knapsack import STOCK

logger = logging.getLogger(__name__)

RECORD = "align.json"
Job = tuple[str, str]  # a layer and a candidate
__all__ = ["AlignConfig", "align", "default_candidates", "job_files", "load_candidates", "read_aligned"]


def default_candidates(grid: Sequence[int]) -> dict[str, MHLAConfig]:
    """Return forms worth trying on a grid of tokens: linear attention, MHLA, and MHLA with a softmax window.

    The window is each block, or each block with half of another around it. All have learned features and
    centred keys, which convert best.
    """
    base = MHLAConfig.paper(blocks=1, feature_map="hedgehog", center_keys=True)
    layout = recommended_layout(tuple(grid))
    if layout.num_blocks == 1:
        return {"linear": base}
    mixed = replace(base, blocks=layout.blocks, mixing_per_head=True)
    local = replace(mixed, local="shared")
    wide = replace(local, local_margin=tuple(-(-size // 2) for size in layout.block_shape))
    return {"linear": base, "mhla": mixed, "mhla-local": local, "mhla-wide": wide}


def load_candidates(path: str | Path) -> dict[str, MHLAConfig]:
    """Read candidates from YAML that maps names to settings of MHLA.

    Raises:
        ValueError: for anything else, and settings that are not known.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict) or not values or not all(isinstance(v, dict) for v in values.values()):
        raise ValueError(f"{path} must map names to settings of MHLA, such as mhla: {{blocks: 16}}")
    return {str(name): MHLAConfig.from_dict(settings) for name, settings in values.items()}


@one_fate()
def align(
    teacher: Any,
    calls: Calls,
    out: str | Path,
    *,
    candidates: Mapping[str, MHLAConfig] | None = None,
    config: AlignConfig | None = None,
    name: str = "",
    layers: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Align every layer of a teacher in every candidate form.

    Args:
        teacher: as :func:`load_teacher` gives it.
        calls: of the teacher, see :class:`Calls`.
        out: folder; what is there of the same alignment is kept, and candidates may be added.
        candidates: forms by name; :func:`default_candidates` by default.
        config: see :class:`AlignConfig`.
        name: of the teacher, for the record.
        layers: to align, by number; all by default.

    Returns:
        What :func:`read_aligned` returns.

    Raises:
        ValueError: when ``out`` holds the alignment of another teacher, other data or settings, no layer fits
            within ``config.disk``, or activations are not finite.
        OSError: when the disk has no room.
    """
    config, out = config or AlignConfig(), Path(out)
    require_not_quantised(teacher, name, "alignment")
    numbers = {name: layer.layer_number for name, layer in attention_layers(teacher).items()}
    if outside := sorted({*(layers or ())} - {*numbers.values()}):
        raise ValueError(f"layers names layer {outside[0]}, but the layers are {sorted({*numbers.values()})}")
    if layers is not None and not layers:
        raise ValueError("layers names none: leave it out to have all aligned")
    wanted = [name for name, number in numbers.items() if layers is None or number in layers]
    first = layer_calls(teacher, calls(0), list(numbers))
    candidates = dict(default_candidates(calls.grid) if candidates is None else candidates)
    _require_names(candidates)
    record = _record_of(teacher, calls, candidates, config, name=name, tokens=_tokens(first))
    record |= {"layers": numbers, "asked": wanted}
    with ExitStack() as stack:

        def enter() -> tuple[dict[str, Any], list[Job]]:
            stack.enter_context(only_writer(out))
            claimed = _claim(out, record, calls)
            jobs = [(layer, form) for layer in wanted for form in candidates]
            return claimed, [job for job in jobs if not is_done(out, *job)]

        claimed, jobs = in_first_process(enter)
        run = _Run(teacher, calls, out, claimed, first, candidates, config)
        begun = in_first_process(lambda: run.begun(jobs))
        for cached, group in _groups(jobs, first, config, begun):
            run.do(cached, group)
        in_first_process(lambda: remove_caches(out))
    return read_aligned(out)


def _require_names(candidates: Mapping[str, MHLAConfig]) -> None:
    """Check that there are candidates, whose names are those of folders and no other."""
    if not candidates:
        raise ValueError("there are no candidates: leave them out for the default ones")
    for name in candidates:
        if name == STOCK or name.startswith("activations-") or not re.fullmatch(r"\w[\w.+ -]*", name):
            raise ValueError(
                f"a candidate cannot be called {name!r}: take letters, digits and any of _ . + - after the "
                f"first of them, but not {STOCK}, the name of the teacher's own layer, nor activations-"
            )


def _tokens(first: Mapping[str, LayerCall]) -> int:
    return next(iter(first.values())).hidden_states.shape[1]


def _record_of(
    teacher: Any,
    calls: Calls,
    candidates: Mapping[str, MHLAConfig],
    config: AlignConfig,
    *,
    name: str,
    tokens: int,
) -> dict[str, Any]:
    """Everything that an alignment depends on, as plain values."""
    return {
        "model": name, "teacher": fingerprint(teacher), "calls": calls.facts, "settings": config.kept(),
        "candidates": {name: form.to_dict() for name, form in candidates.items()},
        "tokens": tokens,
    }  # fmt: skip


def is_done(out: Path, layer: str, form: str) -> bool:
    """Return True when a job has left its weights and its record."""
    return all(path.is_file() for path in job_files(out, layer, form))


def job_files(out: Path, layer: str, form: str) -> tuple[Path, Path]:
    """Return where a job leaves weights and record."""
    return out / form / f"{layer}.safetensors", out / form / f"{layer}.json"


def read_aligned(out: str | Path) -> dict[str, Any]:
    """Read an alignment: align.json, and under ``jobs`` the record of each layer in each form.

    Raises:
        ValueError: when there is none, or it is not finished.
    """
    out = Path(out)
    record = _read_record(out)
    missing = [
        (layer, form)
        for form in record["candidates"]
        for layer in record["layers"]
        if not is_done(out, layer, form)
    ]
    # Earlier versions did not say which were asked for: those that were left out have no form at all.
    begun = [layer for layer in record["layers"] if any(is_done(out, layer, f) for f in record["candidates"])]
    asked = record.get("asked", begun)
    if late := [job for job in missing if job[0] in asked] or missing[: not begun]:
        raise ValueError(f"{out} is not finished: {late[0]} is missing; run mhla align again")
    record["jobs"] = {
        form: {
            layer: json.loads(job_files(out, layer, form)[1].read_text())
            for layer in record["layers"]
            if (layer, form) not in missing
        }
        for form in record["candidates"]
    }
    return record


def _read_record(out: Path) -> dict[str, Any]:
    try:
        return json.loads((out / RECORD).read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{out} holds no aligned layers; make them with mhla align") from error
    except ValueError as error:
        raise ValueError(f"{out / RECORD} is damaged ({error}): align again in another folder") from error


def _claim(out: Path, record: dict[str, Any], calls: Calls) -> dict[str, Any]:
    """Write align.json, or make sure that the one there is of the same alignment."""
    record = json.loads(json.dumps(record))
    if (out / RECORD).is_file():
        old = _read_record(out)
        old["calls"] = calls.completed(old["calls"])
        forms = {**old["candidates"], **record["candidates"]}
        known = {**record, "candidates": {form: forms[form] for form in old["candidates"]}}
        before, after = ({key: its.get(key) for key in record} for its in (old, known))
        if lines := changes(before, after, free=("model", "asked")):
            raise ValueError(
                f"{out} holds another alignment; choose another folder:\n  " + "\n  ".join(lines)
            )
        record["candidates"] = forms
        asked = {*old.get("asked", ()), *record["asked"]}
        record["asked"] = [name for name in record["layers"] if name in asked]
    elif any(out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no aligned layers; choose another folder")
    write_file(out / RECORD, json.dumps(record, indent=2))
    return record


def _groups(
    jobs: Sequence[Job], first: Mapping[str, LayerCall], config: AlignConfig, begun: Sequence[str]
) -> Iterator[tuple[Sequence[str], list[Job]]]:
    """As many layers at a time as the disk may hold, and their jobs; those of a cache that is begun first.

    Raises:
        ValueError: when it may not hold one.
    """
    layers = list(dict.fromkeys(layer for layer, _ in jobs))
    if not layers:
        return
    size = max(_layer_bytes(first[layer], config) for layer in layers)
    count = int(config.disk * 1e9 // size)
    if count < 1:
        raise ValueError(
            f"disk {config.disk:g} GB holds the activations of no layer: {config.all_samples} samples take "
            f"{size / 1e9:.3g} GB; raise disk, or lower samples"
        )
    logger.info(
        "%d layers of %.3g GB activations each, at most %d at a time within %g GB",
        len(layers), size / 1e9, count, config.disk,
    )  # fmt: skip
    begun = begun if len(begun) <= count else ()
    rest = [layer for layer in layers if layer not in begun]
    groups = [rest[start : start + count] for start in range(0, len(rest), count)]
    for chosen in [begun, *groups] if begun else groups:
        yield chosen, [job for job in jobs if job[0] in chosen]


def _layer_bytes(call: LayerCall, config: AlignConfig) -> int:
    tokens, width = call.inputs.shape[1:]
    return config.all_samples * sample_bytes(tokens, width, getattr(torch, config.dtype))


@dataclass(frozen=True)
class _Run:
    """Alignment that is under way."""

    teacher: Any
    calls: Calls
    out: Path
    record: Mapping[str, Any]
    first: Mapping[str, LayerCall]
    candidates: Mapping[str, MHLAConfig]
    config: AlignConfig

    def begun(self, jobs: Sequence[Job]) -> Sequence[str]:
        """Return the layers of a cache that a stopped run has left, if jobs of them are to do."""
        left = {layer for layer, _ in jobs}
        for folder in caches_in(self.out):
            layers = cached_layers(folder)
            if left & {*layers} and self.first.keys() >= {*layers} and is_begun(self._cache(layers)):
                return layers
        return ()

    def _cache(self, layers: Sequence[str]) -> CacheConfig:
        folder = cache_folder(self.out, self.record["layers"][layers[0]])
        return CacheConfig(
            str(folder), self.record["teacher"], self.record["calls"], tuple(layers),
            self.config.all_samples, self.config.dtype,
        )  # fmt: skip

    def do(self, layers: Sequence[str], jobs: Sequence[Job]) -> None:
        """Cache the activations of some layers, in place of all other caches, and do jobs of them."""
        state, config, cache = process_state(), self.config, self._cache(layers)
        whole = sum(_layer_bytes(self.first[layer], config) for layer in layers)

        def make_room() -> None:
            remove_caches(self.out, but=cache)
            require_disk_space(self.out, whole - written_bytes(cache))

        in_first_process(make_room)
        logger.info("activations of %d layers in %d calls", len(layers), config.all_samples)
        write_activations(self.teacher, self.calls, cache)
        shards = Shards(cache.output_dir)
        mine = jobs[state.process_index :: state.num_processes]
        for layer, form in tqdm(mine, desc="layers", disable=not state.is_main_process):
            self._train(layer, form, Activations(shards, layer))
        wait_for_all()

    def _train(self, layer: str, form: str, activations: Activations) -> None:
        """Do one job, and leave its weights and then its record."""
        call, config = self.first[layer], self.config
        module = aligned_layer(self.teacher, layer, self.candidates[form]).to(call.hidden_states.device)
        buckets = [number % TIME_BUCKETS for number in config.held_out_numbers]
        found = train_layer(module, call, activations, config, buckets)
        logger.info("%s %s: error %.4f, %.4f before", layer, form, found["error"], found["before"])
        weights, record = job_files(self.out, layer, form)
        tensors = {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
        write_file(weights, partial(save_file, tensors))
        write_file(record, json.dumps({"layer": layer, "candidate": form, **found}, indent=2))


def aligned_layer(teacher: Any, name: str, form: MHLAConfig) -> nn.Module:
    """Return a layer of the teacher in another form, in float32, with tensors of its own."""
    number, kinds = teacher.get_submodule(name).layer_number, list(teacher.layer_attention)
    kinds[number] = "mhla"
    converted = convert_to_mhla(teacher, [form] * len(kinds), attention=kinds)
    return copy.deepcopy(converted.get_submodule(name)).float().requires_grad_(True)
