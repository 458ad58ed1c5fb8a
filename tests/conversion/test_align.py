from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mhla_diffusion import MHLAConfig, convert_to_mhla
from mhla_diffusion.backbones.teacher import as_teacher, attention_layers, layer_calls
from mhla_diffusion.conversion import (
    AlignConfig,
    DataCalls,
    NoiseCalls,
    SampledCalls,
    align,
    cache,
    default_candidates,
    load_candidates,
    open_calls,
)
from mhla_diffusion.conversion.align import job_files, read_aligned
from mhla_diffusion.hub import expert_times
from mhla_diffusion.training.data.shards import Shards

from .conftest import FEW, FORMS, make_teacher


def test_every_layer_comes_nearer_in_every_form_and_weights_are_what_errors_say(
    teacher: Any, calls: NoiseCalls, tmp_path: Path
) -> None:
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    found = align(teacher, calls, tmp_path / "aligned", candidates=FORMS, config=FEW)
    jobs = [job for by_layer in found["jobs"].values() for job in by_layer.values()]
    assert len(jobs) == 6
    assert all(job["error"] <= job["before"] for job in jobs)
    assert sum(job["error"] for job in jobs) < 0.9 * sum(job["before"] for job in jobs)
    assert all(set(job["by_time"]) == {"6", "7", "8", "9"} for job in jobs), "held out are calls 6 to 9"
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not list((tmp_path / "aligned").glob("activations*")), "the disk is given back"
    # The stored weights, measured here without a cache.
    name, form = "transformer_blocks.1.attn1", "mhla"
    layer = convert_to_mhla(teacher, FORMS[form]).get_submodule(name)
    # Not copied into the layer, which shares its projections with the teacher.
    layer.load_state_dict(load_file(tmp_path / "aligned" / form / f"{name}.safetensors"), assign=True)
    errors = []
    for number in FEW.held_out_numbers:
        call = layer_calls(teacher, calls(number), [name])[name]
        out = layer(call.hidden_states, *call.args, **call.kwargs)
        errors.append(float((out - call.output).abs().sum() / call.output.abs().sum()))  # type: ignore[union-attr]
    assert found["jobs"][form][name]["error"] == pytest.approx(sum(errors) / len(errors), rel=0.02)


def test_a_layer_that_gets_worse_ends_early_with_its_best_weights(
    teacher: Any, calls: NoiseCalls, tmp_path: Path
) -> None:
    wild = dataclasses.replace(FEW, evaluate_every=2, patience=1, learning_rate=1e6, old_learning_rate=1e6)
    candidates = {"mhla": FORMS["mhla"]}
    jobs = align(teacher, calls, tmp_path, candidates=candidates, config=wild, layers=[0])["jobs"]["mhla"]
    ((name, job),) = jobs.items()
    assert (job["steps"], job["error"]) == (2, job["before"])
    stored = load_file(job_files(tmp_path, name, "mhla")[0])
    assert max(float(value.abs().max()) for value in stored.values()) < 1e3


def test_rates_fall_in_a_line_to_nothing(teacher: Any, calls: NoiseCalls, tmp_path: Path) -> None:
    taken: list[list[float]] = []
    handle = register_optimizer_step_pre_hook(
        lambda optimizer, *_: taken.append([group["lr"] for group in optimizer.param_groups])
    )
    try:
        align(teacher, calls, tmp_path, candidates={"mhla": FORMS["mhla"]}, config=FEW, layers=[0])
    finally:
        handle.remove()
    assert taken == [[2e-2 * (1 - step / 20), 1e-2 * (1 - step / 20)] for step in range(20)]


def test_what_is_done_is_not_done_again_and_candidates_may_be_added(
    teacher: Any, calls: NoiseCalls, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, forms = tmp_path / "aligned", {"mhla": FORMS["mhla"]}
    align(teacher, calls, out, candidates=forms, config=FEW, layers=[0, 1])
    records = {path: path.read_bytes() for path in out.rglob("*.json") if path.name != "align.json"}
    (out / "mhla" / "transformer_blocks.1.attn1.json").unlink()  # as if stopped before its record was written
    with caplog.at_level(logging.INFO):
        found = align(teacher, calls, out, candidates=FORMS, config=FEW)
    done = [line for line in caplog.messages if ": error" in line]
    assert len(done) == 5, done
    assert set(found["jobs"]) == {"linear", "mhla"}
    first = out / "mhla" / "transformer_blocks.0.attn1.json"
    assert first.read_bytes() == records[first]
    again = json.loads((out / "mhla" / "transformer_blocks.1.attn1.json").read_text())
    stored = json.loads(records[out / "mhla" / "transformer_blocks.1.attn1.json"])
    assert again["error"] == stored["error"], "a job is the same whenever it is done"


def test_an_alignment_that_stopped_between_layers_is_not_finished(
    teacher: Any, calls: NoiseCalls, tmp_path: Path
) -> None:
    out, forms = tmp_path / "aligned", {"mhla": FORMS["mhla"]}
    with pytest.raises(ValueError, match=r"layers names layer 7, but the layers are \[0, 1, 2\]"):
        align(teacher, calls, out, candidates=forms, config=FEW, layers=[0, 7])
    align(teacher, calls, out, candidates=forms, config=FEW, layers=[0, 1])
    for file in job_files(out, "transformer_blocks.1.attn1", "mhla"):
        file.unlink()
    with pytest.raises(ValueError, match=r"not finished: .*blocks.1.* is missing; run mhla align again"):
        read_aligned(out)
    with pytest.raises(ValueError, match=r"not finished: .*blocks.1.attn1"):
        align(teacher, calls, out, candidates=forms, config=FEW, layers=[2])
    assert set(json.loads((out / "align.json").read_text())["asked"]) == set(attention_layers(teacher))
    align(teacher, calls, out, candidates=forms, config=FEW, layers=[1])
    assert set(read_aligned(out)["jobs"]["mhla"]) == set(attention_layers(teacher))


def test_layers_are_done_in_groups_that_the_disk_may_hold(
    teacher: Any, calls: NoiseCalls, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    size = FEW.all_samples * cache.sample_bytes(16, 16)
    small = dataclasses.replace(FEW, disk=1.5 * size / 1e9)
    with caplog.at_level(logging.INFO):
        one_by_one = align(teacher, calls, tmp_path / "small", candidates=FORMS, config=small)
    assert caplog.messages.count("activations of 1 layers in 10 calls") == 3
    at_once = align(teacher, calls, tmp_path / "large", candidates=FORMS, config=FEW)
    for form in FORMS:
        for layer, job in at_once["jobs"][form].items():
            assert one_by_one["jobs"][form][layer]["error"] == job["error"]
    again = align(teacher, calls, tmp_path / "small", candidates=FORMS, config=FEW)
    assert again["jobs"] == one_by_one["jobs"], "room on a disk is no other setting"
    with pytest.raises(ValueError, match=r"holds the activations of no layer: 10 samples take .* raise disk"):
        align(teacher, calls, tmp_path / "none", config=dataclasses.replace(FEW, disk=1e-9))


class Killed(BaseException):
    pass


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Aligns and is killed after some jobs."""

    def stop(jobs: int, *args: Any, **kwargs: Any) -> None:
        module = sys.modules["mhla_diffusion.conversion.align"]
        train, done = module.train_layer, list[int]()  # type: ignore[attr-defined]

        def some(*args: Any) -> Any:
            if len(done) == jobs:
                raise Killed
            done.append(1)
            return train(*args)

        with monkeypatch.context() as patch:
            patch.setattr(module, "train_layer", some)
            with pytest.raises(Killed):
                align(*args, **kwargs)

    return stop


def caches(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("activations*"))


@pytest.mark.parametrize("change", ["nothing", "less disk", "fewer layers"])
def test_what_was_stopped_goes_on_whatever_was_cached_and_leaves_no_cache(
    teacher: Any, calls: NoiseCalls, tmp_path: Path, change: str, stop_after: Callable[..., None]
) -> None:
    stop_after(2, teacher, calls, tmp_path, candidates=FORMS, config=FEW)  # of layer 0, both
    assert caches(tmp_path) == ["activations-000"]
    done = {path: path.read_bytes() for path in tmp_path.glob("*/transformer_blocks*")}
    assert len(done) == 4
    asked: list[int] = []

    class Noted(NoiseCalls):
        def __call__(self, number: int) -> dict[str, Any]:
            asked.append(number)
            return super().__call__(number)

    size = FEW.all_samples * cache.sample_bytes(16, 16)
    less = dataclasses.replace(FEW, disk=1.5 * size / 1e9)
    config, layers = less if change == "less disk" else FEW, [1] if change == "fewer layers" else None
    more: Any = contextlib.nullcontext()
    if layers:
        more = pytest.raises(ValueError, match=r"not finished: .*blocks\.2\.attn1.* is missing")
    with more:
        align(teacher, Noted(teacher), tmp_path, candidates=FORMS, config=config, layers=layers)
    assert all(
        file.is_file() for form in FORMS for file in job_files(tmp_path, "transformer_blocks.1.attn1", form)
    )
    # The first call says what layers look like.
    assert len(asked) == 1 + (20 if change == "less disk" else 0), "a cache that is there is not made again"
    assert not caches(tmp_path)
    assert all(path.read_bytes() == content for path, content in done.items())


def test_caches_are_removed_and_nothing_else(teacher: Any, calls: NoiseCalls, tmp_path: Path) -> None:
    few = dataclasses.replace(FEW, steps=1)
    forms = {"mhla": FORMS["mhla"]}
    align(teacher, calls, tmp_path, candidates=forms, config=few, layers=[0])
    (tmp_path / "activations-007").mkdir()  # a candidate, of earlier versions
    (tmp_path / "activations-007" / "transformer_blocks.0.attn1.json").write_text("{}")
    for name in ("activations-000", "activations-001", "activations-002", "activations-old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "latents-00000.safetensors").write_bytes(b"")  # half removed, without a record
    (tmp_path / "activations-002" / "notes.txt").write_text("mine")
    (tmp_path / "activations-001" / "cache.json").write_text('{"config": {"layers": ["a"]}, "num_shards": 1}')
    align(teacher, calls, tmp_path, candidates=forms, config=few, layers=[0, 1])
    assert caches(tmp_path) == ["activations-002", "activations-007", "activations-old"]
    (tmp_path / "activations-000").mkdir()
    align(teacher, calls, tmp_path, candidates=forms, config=few, layers=[0, 1])
    assert caches(tmp_path) == ["activations-002", "activations-007", "activations-old"], "nothing was to do"


def test_the_disk_needs_room_for_what_is_not_written_yet(
    teacher: Any,
    calls: NoiseCalls,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_after: Callable[..., None],
) -> None:
    few = dataclasses.replace(FEW, dtype="float32")
    stop_after(0, teacher, calls, tmp_path, candidates=FORMS, config=few)
    (tmp_path / "activations-000" / "latents-00001.safetensors").unlink()  # of calls 8 and 9
    usage, missing = shutil.disk_usage(tmp_path), 2 * 3 * cache.sample_bytes(16, 16, torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
        with pytest.raises(OSError, match=r"the activations that are missing take .* GB free"):
            align(teacher, calls, tmp_path, candidates=FORMS, config=few)
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=missing))
        align(teacher, calls, tmp_path, candidates=FORMS, config=few)


def test_another_teacher_grid_or_setting_is_refused_by_name(
    teacher: Any, calls: NoiseCalls, tmp_path: Path
) -> None:
    out = tmp_path / "aligned"
    align(teacher, calls, out, candidates=FORMS, config=FEW, layers=[0])
    other = make_teacher()
    torch.nn.init.normal_(other.transformer_blocks[0].attn1.to_q.weight, std=0.3)
    with pytest.raises(
        ValueError, match=r"another alignment; choose another folder:\n  teacher: \w{1,12} -> \w{1,12}$"
    ):
        align(other, NoiseCalls(other), out, candidates=FORMS, config=FEW)
    with pytest.raises(ValueError, match=r"\n  calls\.grid: \[4, 4\] -> \[4, 6\]\n"):
        align(teacher, NoiseCalls(teacher, grid=(4, 6)), out, candidates=FORMS, config=FEW)
    with pytest.raises(ValueError, match=r":\n  settings\.steps: 20 -> 9$"):
        align(teacher, calls, out, candidates=FORMS, config=dataclasses.replace(FEW, steps=9))
    with pytest.raises(ValueError, match=r"\n  candidates\.mhla\.blocks: .* -> 2\b"):
        align(teacher, calls, out, candidates={"mhla": MHLAConfig(blocks=2)}, config=FEW)


def test_an_alignment_goes_on_that_is_older_than_a_setting_of_the_run(
    teacher: Any, tmp_path: Path, write_run: Callable[..., Path]
) -> None:
    out, few = tmp_path / "aligned", dataclasses.replace(FEW, steps=1)
    path = str(write_run())
    align(teacher, open_calls(teacher, path), out, candidates=FORMS, config=few, layers=[0])
    record = json.loads((out / "align.json").read_text())
    del record["calls"]["objective"]["shift"], record["calls"]["data"]["flip"]
    assert len(record["calls"].pop("fingerprint")) == 64
    (out / "align.json").write_text(json.dumps(record))
    align(teacher, open_calls(teacher, path), out, candidates=FORMS, config=few, layers=[0])
    shifted = str(write_run(objective={"shift": 2.0}))
    (out / "align.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r":\n  calls\.objective\.shift: 1\.0 -> 2\.0$"):
        align(teacher, open_calls(teacher, shifted), out, candidates=FORMS, config=few, layers=[0])


def test_a_damaged_picture_is_named_once_and_the_next_stands_in_for_it(
    teacher: Any, write_run: Callable[..., Path], image_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(write_run())
    before = open_calls(teacher, path)
    assert isinstance(before, DataCalls)
    wanted = [before.sample(number)[0] for number in range(20)]
    broken = sorted(image_folder.rglob("*.png"))[3]
    broken.write_bytes(broken.read_bytes()[:40])
    calls = open_calls(teacher, path)
    assert isinstance(calls, DataCalls)
    with caplog.at_level(logging.WARNING):
        found = [calls.sample(number)[0] for number in range(40)]
    assert caplog.text.count(f"skipped: {broken}: ") == 1
    differing = [n for n, x in enumerate(wanted) if not torch.equal(x, found[n])]
    assert len(differing) == 1
    assert sum(torch.equal(found[differing[0]], x) for x in wanted) == 1
    assert calls.grid == before.grid


def test_layers_are_not_aligned_on_other_pictures_than_those_before(
    teacher: Any, tmp_path: Path, write_run: Callable[..., Path], image_folder: Path
) -> None:
    out, few = tmp_path / "aligned", dataclasses.replace(FEW, steps=1)
    path = str(write_run())
    align(teacher, open_calls(teacher, path), out, candidates=FORMS, config=few, layers=[0])
    first, second, *_ = sorted(image_folder.rglob("*.png"))
    first.write_bytes(second.read_bytes())
    with pytest.raises(ValueError, match=r"holds another alignment; .*:\n  calls\.fingerprint: "):
        align(teacher, open_calls(teacher, path), out, candidates=FORMS, config=few, layers=[1])


def make_cache(teacher: Any, calls: NoiseCalls, folder: Path, fingerprint: str = "f") -> cache.CacheConfig:
    config = cache.CacheConfig(str(folder), fingerprint, calls.facts, tuple(attention_layers(teacher)), 4)
    cache.write_activations(teacher, calls, config)
    return config


def test_a_cache_of_another_teacher_is_refused(teacher: Any, calls: NoiseCalls, tmp_path: Path) -> None:
    make_cache(teacher, calls, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"another cache of activations; .*:\n  teacher: f -> g$"):
        make_cache(teacher, calls, tmp_path / "cache", "g")


def test_activations_that_are_not_finite_are_named(teacher: Any, calls: NoiseCalls, tmp_path: Path) -> None:
    teacher.transformer_blocks[1].attn1.to_v.weight[0, 0] = torch.nan
    with pytest.raises(
        ValueError, match=r"output of layer transformer_blocks.1.attn1 is not finite in call 0"
    ):
        align(teacher, calls, tmp_path / "aligned", candidates=FORMS, config=FEW)


def test_a_damaged_file_of_activations_is_named(teacher: Any, calls: NoiseCalls, tmp_path: Path) -> None:
    config = make_cache(teacher, calls, tmp_path / "cache")
    path = tmp_path / "cache" / "latents-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    activations = cache.Activations(Shards(config.output_dir), "transformer_blocks.2.attn1")
    with pytest.raises(ValueError, match=r"layer transformer_blocks.2.attn1 are damaged.*latents-00000"):
        activations.read([3])


def test_a_full_disk_is_said_before_and_during(
    teacher: Any, calls: NoiseCalls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
        with pytest.raises(
            OSError, match=r"the activations that are missing take .* GB, but .* has 1e-08 GB free"
        ):
            align(teacher, calls, tmp_path / "aligned", candidates=FORMS, config=FEW)
    written: list[Path] = []

    def write_one(path: Path, content: Any) -> None:
        if written:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written.append(path)
        write_file(path, content)

    from mhla_diffusion.training.data.shards import write_file

    many = dataclasses.replace(FEW, samples=12)
    with monkeypatch.context() as patch:
        patch.setattr("mhla_diffusion.training.data.shards.write_file", write_one)
        with pytest.raises(OSError, match="No space left"):
            align(teacher, calls, tmp_path / "other", candidates=FORMS, config=many)
    assert len(written) == 1
    assert written[0].is_file(), "what was written stays, and the next run goes on from there"
    assert align(teacher, calls, tmp_path / "other", candidates=FORMS, config=many)["jobs"]


def test_a_teacher_that_has_mhla_already_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the teacher has mhla in layers 1 already"):
        as_teacher(make_teacher(attention=["softmax", "mhla", "softmax"], mhla_config={"blocks": 4}))


def test_the_time_of_a_call_says_nothing_of_what_is_dropped_or_mirrored(
    teacher: Any, write_run: Callable[..., Path]
) -> None:
    calls = open_calls(teacher, str(write_run(class_dropout=0.5)))
    numbers = range(200)
    dropped = torch.tensor([int(calls.sample(n)[1]["class_labels"]) == 2 for n in numbers])
    within = torch.tensor([float(10 * calls.fraction(n)) % 1 for n in numbers])
    assert 60 < dropped.sum() < 140
    for of in (within[dropped], within[~dropped]):
        assert of.min() < 0.1
        assert of.max() > 0.9


def test_calls_are_functions_of_their_number_at_even_times(
    teacher: Any, write_run: Callable[..., Path]
) -> None:
    for calls in (
        NoiseCalls(teacher),
        SampledCalls(teacher, steps=2),
        open_calls(teacher, str(write_run())),
    ):
        first, again, other = calls(3), calls(3), calls(13)
        assert first.keys() == {"hidden_states", "timestep", "class_labels"}
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not torch.equal(first["hidden_states"], other["hidden_states"])
        times = [float(calls(number)["timestep"]) for number in range(20)]
        assert [int(time // 100) for time in times] == [*range(10), *range(10)]


def test_calls_of_an_expert_are_at_its_times(
    teacher: Any, write_run: Callable[..., Path], tmp_path: Path
) -> None:
    index = {"boundary_ratio": 0.875, "transformer_2": ["diffusers", "WanTransformer3DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "transformer_2").mkdir()
    pipeline = str(tmp_path)
    assert expert_times(pipeline) == (0.875, 1)
    assert expert_times(pipeline, "transformer_2") == expert_times(f"{pipeline}/transformer_2") == (0, 0.875)
    assert expert_times(str(tmp_path.parent)) is None
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "model_index.json").write_text(json.dumps({**index, "transformer_2": None}))
    assert expert_times(f"{pipeline}/one") is None
    for data in ("noise", str(write_run())):
        for low, high in ((0.875, 1.0), (0.0, 0.875)):
            calls = open_calls(teacher, data, times=(low, high))
            assert "times" not in open_calls(teacher, data).facts.get("objective", {}), "as it was before"
            times = [float(calls(number)["timestep"]) / 1000 for number in range(20)]
            assert all(low - 0.001 <= time < high for time in times)
            assert times[9] - times[0] > 0.7 * (high - low)
            assert calls.facts != open_calls(teacher, data).facts
    assert calls.config.objective.times == (0, 0.875), "which its distillation is of too"
    other = str(write_run(objective={"times": [0.875, 1.0]}))
    with pytest.raises(ValueError, match=r"for times 0 to 0.875, but objective.times are 0.875 to 1: set"):
        open_calls(teacher, other, times=(0, 0.875))
    with pytest.raises(ValueError, match=r"of this transformer alone, which is for times 0 to 0.875: give"):
        open_calls(teacher, "samples", times=(0, 0.875))


def test_data_that_cannot_be_is_refused(teacher: Any) -> None:
    with pytest.raises(ValueError, match=r"the YAML file of a training run, samples, .* got 'nothing.yaml'"):
        open_calls(teacher, "nothing.yaml")
    with pytest.raises(ValueError, match=r"wan_films.yaml is no training run of images, which MHLADiT"):
        open_calls(teacher, str(Path(__file__).parents[2] / "configs" / "video_wan_films.yaml"))


def test_candidates_are_read_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "candidates.yaml"
    path.write_text("mhla: {blocks: [2, 2], local: gate}\nlinear: {blocks: 1}\n")
    assert load_candidates(path) == {
        "mhla": MHLAConfig(blocks=(2, 2), local="gate"), "linear": MHLAConfig.paper(blocks=1),
    }  # fmt: skip
    path.write_text("mhla: {block: 2}\n")
    with pytest.raises(ValueError, match="unknown MHLA setting block"):
        load_candidates(path)
    for content in ("[1, 2]", "{}", ""):
        path.write_text(content)
        with pytest.raises(ValueError, match="must map names to settings of MHLA"):
            load_candidates(path)
    forms = default_candidates((8, 8))
    assert list(forms) == ["linear", "mhla", "mhla-local", "mhla-wide"]
    assert forms["mhla-wide"].layout((8, 8)).block_shape == (4, 4)
    assert forms["mhla-wide"].local_margin == (2, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be 1 or more"),
        ({"learning_rate": 0.0}, "learning_rate and disk must be"),
        ({"disk": math.inf}, "learning_rate and disk must be positive and finite, got .* and inf"),
        ({"old_learning_rate": -1.0}, "old_learning_rate must be 0 or more"),
        ({"seed": -1}, r"seed must be a whole number from 0 to \d+, got -1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AlignConfig(**settings)


@pytest.mark.parametrize("name", ["stock", "", "../escaped", "a/b", ".hidden", "activations-000"])
def test_candidates_are_folders_of_their_own(
    teacher: Any, calls: NoiseCalls, name: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"a candidate cannot be called {name!r}: take letters"):
        align(teacher, calls, tmp_path / "aligned", candidates={name: MHLAConfig(blocks=4)}, config=FEW)
    assert not list(tmp_path.iterdir())


def test_an_alignment_of_nothing_is_refused(teacher: Any, calls: NoiseCalls, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are no candidates"):
        align(teacher, calls, tmp_path / "aligned", candidates={}, config=FEW)
    with pytest.raises(ValueError, match="layers names none"):
        align(teacher, calls, tmp_path / "aligned", candidates=FORMS, config=FEW, layers=[])
    assert not list(tmp_path.iterdir())


def test_a_layer_that_gives_nothing_has_an_error_that_is_a_number(
    teacher: Any, calls: NoiseCalls, tmp_path: Path
) -> None:
    torch.nn.init.zeros_(teacher.transformer_blocks[1].attn1.to_out[0].weight)
    torch.nn.init.zeros_(teacher.transformer_blocks[1].attn1.to_out[0].bias)
    record = align(teacher, calls, tmp_path / "aligned", candidates=FORMS, config=FEW)
    text = (tmp_path / "aligned" / "align.json").read_text()
    assert "Infinity" not in text + str(record)
    assert "NaN" not in text
    errors = [job["error"] for jobs in record["jobs"].values() for job in jobs.values()]
    assert all(math.isfinite(error) for error in errors)


def test_activations_that_a_dtype_cannot_hold_are_not_the_fault_of_the_teacher(
    teacher: Any, calls: NoiseCalls, tmp_path: Path
) -> None:
    teacher.transformer_blocks[1].attn1.to_out[0].weight.mul_(1e6)
    config = dataclasses.replace(FEW, dtype="float16")
    with pytest.raises(ValueError, match=r"not finite in call 0 as torch\.float16: give bfloat16 or float32"):
        align(teacher, calls, tmp_path / "aligned", candidates=FORMS, config=config)
