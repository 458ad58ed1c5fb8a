"""``mhla evaluate``, also ``mhla-evaluate``: scores of images and videos, and comparisons."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ..evaluation import Report, compare_reports, compute_statistics, evaluate_images, evaluate_videos
from ..evaluation.pages.report import require_no_report
from ..evaluation.scores.frechet import require_new_npz
from ..evaluation.sets.benchmarks import export_benchmark, write_prompts
from ..evaluation.sets.vbench import export_vbench
from ..files.locking import only_writer
from ..files.manifest import read_manifest
from ..files.writing import write_file
from ..processes import in_first_process
from .parsing import join_prompts, parse_and_call, with_list

logger = logging.getLogger(__name__)


def image(out: str, save_stats: str | None = None, overwrite: bool = False, **evaluation: Any) -> None:
    """Score generated images against real ones.

    Args:
        out: folder for report.json, report.md, report.html and samples.json.
        save_stats: npz to which the statistics of the real images are written too.
        overwrite: replace a report or statistics that are already there.
    """
    _require_one_extractor(save_stats, evaluation.get("extractor"))
    with _room(out, save_stats, overwrite):
        _save(evaluate_images(**evaluation), out, save_stats, overwrite)


def video(out: str, save_stats: str | None = None, overwrite: bool = False, **evaluation: Any) -> None:
    """Score generated videos against real ones.

    Args:
        out: folder for report.json, report.md, report.html and samples.json.
        save_stats: npz to which the statistics of the real videos are written too.
        overwrite: replace a report or statistics that are already there.
    """
    _require_one_extractor(save_stats, evaluation.get("extractor"))
    with _room(out, save_stats, overwrite):
        _save(evaluate_videos(**evaluation), out, save_stats, overwrite)


def stats(out: str, overwrite: bool = False, **computation: Any) -> None:
    """Write the statistics of a set of images, to be given as ``--real`` from then on.

    Args:
        out: npz with mu and sigma, and mu_s and sigma_s when the extractor gives spatial features.
        overwrite: replace statistics that are already there.
    """
    require_new_npz(out, overwrite=overwrite)
    statistics = compute_statistics(**computation)
    in_first_process(lambda: statistics.save(out, overwrite=overwrite))
    logger.info("Statistics: %s", out)


def compare(reports: list[str], out: str, labels: list[str] | None = None, overwrite: bool = False) -> None:
    """Put reports side by side, as comparison.md and comparison.html.

    Args:
        reports: folders of two reports or more.
        out: folder for the comparison.
        labels: what each is called, such as "[softmax, mhla, mhla]"; runs with equal labels are one group, of
            which mean and deviation are given. By default a part of its path, and groups are runs that
            differ in seeds alone.
        overwrite: replace a comparison that is already there.
    """
    table = compare_reports(reports, labels=labels)
    table.save(out, overwrite=overwrite)
    logger.info("%s", table.to_markdown())
    logger.info("Comparison: %s", Path(out) / "comparison.html")


def steps(
    run: str,
    real: str,
    out: str,
    num: int = 1000,
    prompts: list[str] | None = None,
    num_inference_steps: int | None = None,
    guidance: float | None = None,
    generation_batch_size: int = 32,
    **evaluation: Any,
) -> None:
    """Score every checkpoint of an image training, side by side; the same command again goes on.

    Args:
        run: output folder of the training; trainer.keep_checkpoints says how many there are.
        real: as for mhla evaluate image.
        out: folder for the samples and the report of each step, and comparison.md and comparison.html of all.
        num: images of each checkpoint; with prompts that many of them, in turn.
        prompts: texts or files of them, for models of texts.
        num_inference_steps: denoising steps; the pipeline's default if not given.
        guidance: scale of classifier-free guidance; the pipeline's default if not given.
        generation_batch_size: images that are generated at a time.
    """
    # Here, as scores need no models.
    from mhla_diffusion.pipelines.generation import generate_images
    from mhla_diffusion.pipelines.identity import describe
    from mhla_diffusion.pipelines.prompts import read_prompts

    from ..training.checkpoints import list_checkpoints
    from ..training.export import open_checkpoint

    checkpoints = in_first_process(lambda: list_checkpoints(Path(run)))  # a training may go on there
    if not checkpoints:
        raise ValueError(f"{run} has no checkpoints: give the output folder of a training")
    texts = None if prompts is None else read_prompts(prompts)
    asked = {
        "run": run, "real": real, "num": num, "prompts": None if texts is None else [str(t) for t in texts],
        "num_inference_steps": num_inference_steps, "guidance": guidance, **evaluation,
    }  # fmt: skip
    in_first_process(lambda: _claim(Path(out) / "settings.json", asked))
    reports = [Path(out) / checkpoint.name / "report" for checkpoint in checkpoints]
    for checkpoint, report in zip(checkpoints, reports, strict=True):
        samples = report.with_name("samples")
        pipeline = open_checkpoint(checkpoint)
        if in_first_process((report / "report.json").is_file):
            # Another run may have written the checkpoint anew.
            made = read_manifest(samples) or {}
            if made.get("weights_sha256", its := describe(pipeline)["weights_sha256"]) != its:
                raise ValueError(f"{report} is of other weights than {checkpoint} has: choose another --out")
            logger.info("%s is scored already", checkpoint.name)
            continue
        generate_images(
            pipeline, samples, num_images=num, prompts=texts,
            num_inference_steps=num_inference_steps, guidance_scale=guidance,
            batch_size=generation_batch_size,
        )  # fmt: skip
        found = evaluate_images(real, samples, **evaluation)
        in_first_process(partial(found.save, report))
    if len(reports) > 1:
        table = compare_reports(reports, labels=[checkpoint.name for checkpoint in checkpoints])
        in_first_process(lambda: table.save(out, overwrite=True))
        logger.info("%s", table.to_markdown())


def _claim(record: Path, asked: dict[str, Any]) -> None:
    """Write what scores are of, or check that those that are there are of the same."""
    from ..files.text import changes

    asked = json.loads(json.dumps(asked, default=str))
    if record.is_file():
        if differences := changes(json.loads(record.read_text()), asked):
            raise ValueError(
                f"{record.parent} holds other scores; choose another --out:\n  " + "\n  ".join(differences)
            )
    elif any(record.parent.glob("step-*/report")):
        raise ValueError(f"{record.parent} holds scores without their {record.name}: choose another --out")
    write_file(record, json.dumps(asked, indent=2))


def vbench(generated: str, out: str) -> None:
    """Copy generated videos into the layout that VBench reads.

    Args:
        generated: folder of mhla generate, with its manifest.json.
        out: folder that is not there yet.
    """
    logger.info("%d videos in %s", export_vbench(generated, out), out)


def prompts(benchmark: str, source: str, out: str) -> None:
    """Write the prompts of a benchmark of text to image as a CSV file for mhla generate image --prompts.

    Args:
        benchmark: mjhq30k, geneval, geneval2 or dpg_bench.
        source: its own file or folder of prompts: meta_data.json, evaluation_metadata.jsonl,
            geneval2_data.jsonl, or the folder prompts.
        out: the CSV file, which is not there yet.
    """
    logger.info("%d prompts in %s", write_prompts(benchmark, source, out), out)


def layout(benchmark: str, source: str, generated: str, out: str) -> None:
    """Copy generated images into the layout that a benchmark of text to image reads.

    Args:
        benchmark: mjhq30k, geneval, geneval2 or dpg_bench.
        source: as for mhla evaluate prompts.
        generated: folder of mhla generate, from these prompts.
        out: folder that is not there yet.
    """
    logger.info("images of %d prompts in %s", export_benchmark(benchmark, source, generated, out), out)


def main(arguments: Sequence[str], prog: str, name: str) -> None:
    """Score, or do what else there is."""
    commands: dict[str, Callable[..., Any]] = {
        "image": image,
        "video": video,
        "stats": stats,
        "compare": compare,
        "steps": steps,
        "vbench": vbench,
        "prompts": prompts,
        "layout": layout,
    }
    if name == "compare":
        arguments = with_list(arguments, "reports")
    elif name == "steps":
        arguments = join_prompts(arguments)
    parse_and_call(commands[name], arguments, prog)


def _require_one_extractor(save_stats: str | None, extractor: Any) -> None:
    if save_stats and isinstance(extractor, (list, tuple)) and len(extractor) > 1:
        raise ValueError(
            f"save_stats {save_stats} holds the statistics of one extractor, and {len(extractor)} are given "
            f"({', '.join(map(str, extractor))}): leave it out, or score with each in a command of its own"
        )


@contextmanager
def _room(out: str, save_stats: str | None, overwrite: bool) -> Iterator[None]:
    """Check, before the work, that what it gives can be written, and keep the place."""
    with ExitStack() as stack:

        def enter() -> None:
            require_no_report(out, overwrite=overwrite)
            if save_stats:
                require_new_npz(save_stats, overwrite=overwrite)
            stack.enter_context(only_writer(out))

        in_first_process(enter)
        yield


def _save(report: Report, out: str, save_stats: str | None, overwrite: bool) -> None:
    def save() -> None:
        report.protocol["command"] = shlex.join(sys.argv)
        report.save(out, overwrite=overwrite)
        if save_stats:
            report.real_statistics.save(save_stats, overwrite=overwrite)
        logger.info("Report: %s", Path(out) / "report.html")

    in_first_process(save)
