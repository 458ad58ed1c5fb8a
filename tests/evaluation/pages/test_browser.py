"""The pages in a browser, where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mhla_diffusion.evaluation import FeatureExtractor, compare_reports, evaluate_images

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium")

# Written into a copy of a page: what a person would see of it, as JSON in its title.
PROBE = """<script>addEventListener("load", () => { document.title = JSON.stringify({
  inner: innerWidth, wide: document.documentElement.scrollWidth,
  broken: [...document.images].filter(image => !image.naturalWidth).length,
  paper: getComputedStyle(document.body).backgroundColor,
}); });</script>"""


def _look(page: str, folder: Path, width: int, *extra: str) -> dict[str, object]:
    """Open a page in a window of this width; fails on anything that the console says."""
    file = folder / "page.html"
    file.write_text(page.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    # A frame, as windows are not as narrow as telephones.
    frame = f'<iframe src="page.html" width="{width}" height="800" style="border:0"></iframe>'
    report = "<script>onload = () => { document.title = frames[0].document.title; }</script>"
    (folder / "frame.html").write_text(frame + report)
    command = [
        *(str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"),
        *("--virtual-time-budget=5000", "--enable-logging=stderr", "--dump-dom", *extra),
    ]
    result = subprocess.run(
        [*command, f"file://{folder}/frame.html"], capture_output=True, text=True, timeout=100, check=True
    )
    assert "CONSOLE" not in result.stderr, result.stderr
    title = re.search(r"<title>(.*)</title>", result.stdout)
    assert title, result.stdout[:500]
    return json.loads(title[1])


@pytest.fixture
def pages(
    extractor: FeatureExtractor,
    make_pixels: Callable[..., np.ndarray],
    write_folder: Callable[..., Path],
    tmp_path: Path,
) -> dict[str, str]:
    real = write_folder("real", make_pixels(40), classes=["cat", "a dog with a long name"])
    folders = []
    for name, count in (("one", 30), ("two", 29)):
        made = write_folder(f"made {name}", make_pixels(count, 1, 20), ["cat", "a dog with a long name"])
        report = evaluate_images(real, made, extractor=extractor)
        report.save(tmp_path / name)
        folders.append(tmp_path / name)
    return {"report": report.to_html(), "comparison": compare_reports(folders).to_html()}


@pytest.mark.parametrize("width", [390, 1440])
def test_pages_fit_and_the_console_is_silent(pages: dict[str, str], width: int, tmp_path: Path) -> None:
    for page in pages.values():
        seen = _look(page, tmp_path, width)
        assert seen["inner"] == width
        assert int(str(seen["wide"])) <= width
        assert seen["broken"] == 0


def test_pages_are_light_and_dark(pages: dict[str, str], tmp_path: Path) -> None:
    light = _look(pages["report"], tmp_path, 800)
    dark = _look(pages["report"], tmp_path, 800, "--blink-settings=preferredColorScheme=0")
    assert light["paper"] != dark["paper"]
