"""``mhla demo``: a page in the browser, a pipeline and its teacher side by side.

mhla demo runs/mhla/pipeline=runs/softmax/pipeline runs/other/pipeline
"""

from __future__ import annotations

from collections.abc import Sequence

from .parsing import parse_and_call, with_list


def demo(models: list[str], host: str = "127.0.0.1", port: int | None = None) -> None:
    """Start a page on which pipelines are tried, each beside its teacher, with times; Ctrl-C ends it.

    Args:
        models: folders or hub ids of pipelines, each alone or with its teacher: DIR=DIR.
        host: address that the page is served at; 0.0.0.0 for other machines too.
        port: of the page; the first that is free from 7860 on by default.
    """
    # Here, as diffusers takes seconds that ``--help`` has no need of.
    from ..demo import Pair, build_page
    from ..hub import component_subfolder

    pairs = [Pair.parse(text) for text in models]
    for pair in pairs:
        for path in pair.paths:
            if component_subfolder(path, "transformer") is None:  # now, and not at the first click
                raise ValueError(f"{path} is no pipeline, here or on the hub")
    build_page(pairs).launch(server_name=host, server_port=port)


def main(arguments: Sequence[str], prog: str) -> None:
    """Start the page."""
    parse_and_call(demo, with_list(arguments, "models"), prog)
