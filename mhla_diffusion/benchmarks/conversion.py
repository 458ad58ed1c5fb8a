"""Memory and time of conversion, and of a pipeline opened with MHLA, beside those of the stock model."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from ..backbones import MHLAWanTransformer3DModel, convert_to_mhla
from ..config import MHLAConfig
from ..files.text import markdown_table
from .shared import check_at_least, machine

CONFIG = MHLAConfig(blocks=(3, 5, 10), normalizer="none", output_norm=True, gate=True)
_PRESET = "Wan2.1-1.3B"
_WAYS = ("stock model", "stock model, converted", "stock pipeline", "pipeline, converted on loading")


def conversion(layers: int | None = None, repeats: int = 3) -> str:
    """Peak memory and seconds of loading a stock Wan2.1-1.3B in bfloat16, and of converting it to MHLA.

    Each way is a process of its own, the ways taking turns, and ends when all weights have been read from
    disk, as loading alone maps their file. Memory is the most that was resident, mapped files included,
    beyond what the process held when its packages were imported.

    Args:
        layers: of the model, 30 by default; fewer are not what is to be known, and quicker.
        repeats: of each way, of which the medians count.

    Returns:
        A table in Markdown.

    Raises:
        ValueError: for layers or repeats below 1.
    """
    check_at_least(1, layers=1 if layers is None else layers, repeats=repeats)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in _WAYS}
    with tempfile.TemporaryDirectory() as folder:
        weights = _write_pipeline(Path(folder), layers)
        for _ in tqdm(range(repeats), desc="conversion", disable=None):
            for way in _WAYS:
                _forget(Path(folder))
                program = f"from {__name__} import load; load({way!r}, {folder!r})"
                done = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE)
                found[way].append(json.loads(done.stdout.splitlines()[-1]))
    medians = {
        way: {key: statistics.median(run[key] for run in runs) for key in ("bytes", "seconds")}
        for way, runs in found.items()
    }
    lines = [["", "peak memory, MB", "over stock", "seconds", "over stock"]]
    for i, (way, run) in enumerate(medians.items()):
        stock = medians[_WAYS[i // 2 * 2]]
        ratios = [f"{run[key] / stock[key]:.2f} x" if i % 2 else "" for key in ("bytes", "seconds")]
        lines.append([way, f"{run['bytes'] / 1e6:,.0f}", ratios[0], f"{run['seconds']:.2f}", ratios[1]])
    return f"{machine('cpu')}; {weights / 1e9:.2f} B weights, bfloat16\n\n{markdown_table(lines)}"


def load(way: str, folder: str) -> None:
    """Load in one way, and print the peak memory and the time as JSON; for a process of its own."""
    import mhla_diffusion

    before, start = _memory("VmRSS"), time.perf_counter()
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    if "pipeline" in way:
        config = CONFIG if "converted" in way else None
        loaded: Any = mhla_diffusion.MHLAPipeline.from_pretrained(folder, mhla_config=config, **options)
    else:
        loaded = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer", **options)
        loaded = convert_to_mhla(loaded, CONFIG) if "converted" in way else loaded
    transformer = loaded.transformer if "pipeline" in way else loaded
    for weight in transformer.parameters():
        weight.detach().view(-1)[::1024].sum()  # a value of every page
    seconds, peak = time.perf_counter() - start, _memory("VmHWM") - before
    print(json.dumps({"bytes": peak, "seconds": seconds}))  # noqa: T201 (to the process that started this one)


def _forget(folder: Path) -> None:
    """Have the system forget what it has of these files, so that they are read from disk."""
    for path in filter(Path.is_file, folder.rglob("*")):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _memory(name: str) -> int:
    """Bytes of this process by Linux's name: VmRSS now, VmHWM at the most."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(name)))


def _write_pipeline(folder: Path, layers: int | None) -> int:
    """Write a pipeline with a transformer of that size and other parts that are tiny; count its weights."""
    preset = MHLAWanTransformer3DModel.presets[_PRESET]
    with torch.device("meta"):
        transformer = WanTransformer3DModel(**preset | ({} if layers is None else {"num_layers": layers}))
    transformer = transformer.to(torch.bfloat16).to_empty(device="cpu")
    torch.manual_seed(0)
    for parameter in transformer.parameters():
        parameter.data.fill_(0.01)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_tokenizer(), pad_token="<pad>")
    encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=4, num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    WanPipeline(tokenizer, encoder, vae, FlowMatchEulerDiscreteScheduler(), transformer).save_pretrained(
        folder
    )
    return sum(parameter.numel() for parameter in transformer.parameters())


def _tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    return Tokenizer(WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>"))
