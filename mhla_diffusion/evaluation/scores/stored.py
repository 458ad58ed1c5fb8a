"""Statistics as other packages store them: npz of clean-fid and ADM, and torch-fidelity's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ...files.arrays import describe_kind, file_kind, npz_headers, require_regular

ARRAYS = ("mu", "sigma", "mu_s", "sigma_s")
FACTS = ("n", "extractor", "sha256", "fingerprint", "sampling", "reading")
_LARGEST = 4 << 30

_CONVERSION = """in a place where it may run code, write
    import pickle, numpy
    stats = pickle.load(open("{path}", "rb"))
    stats = stats.get("fid", stats)  # EDM2 has fd_dinov2 beside it
    numpy.savez("{stem}.npz", mu=stats["mu"], sigma=stats["sigma"])"""


def read_statistics(path: Path) -> dict[str, Any]:
    """Read the arrays ``ARRAYS`` and the values ``FACTS`` of a file, as far as they are there.

    Args:
        path: npz, or what torch-fidelity keeps in its cache (``*-stat-fid-*.pt``).

    Raises:
        ValueError: when it is something else; of a pickle, as EDM2 publishes, the message says how to convert
            it.
        OSError: when it cannot be read.
    """
    require_regular(path)
    kind = file_kind(path)
    if kind == "torch":
        return _read_torch(path)
    if kind == "pickle":
        remedy = _CONVERSION.format(path=path, stem=path.stem)
        raise ValueError(f"it is a pickle, as EDM2 has it, which can run code and is not opened: {remedy}")
    if kind != "npz":
        raise ValueError(f"an npz with mu and sigma is expected, and {describe_kind(kind)}")
    known = npz_headers(path, largest=_LARGEST).keys()
    with np.load(path, allow_pickle=False) as file:
        arrays = {key: file[key].astype(np.float64) for key in ARRAYS if key in known}
        return arrays | {key: file[key].item() for key in FACTS if key in known}


def _read_torch(path: Path) -> dict[str, Any]:
    """Read a dict of arrays or tensors, and nothing that could run code."""
    import torch

    numpy_parts: list[Any] = [np.zeros(1).__reduce__()[0], np.float64().__reduce__()[0], np.ndarray, np.dtype]
    numpy_parts += [type(np.dtype(number)) for number in ("f2", "f4", "f8", "i4", "i8")]
    try:
        with torch.serialization.safe_globals(numpy_parts):
            stored = torch.load(path, map_location="cpu", weights_only=True)
        return {key: np.asarray(stored[key], dtype=np.float64) for key in ("mu", "sigma")}
    except Exception as error:  # whatever torch.load stumbles over in half a file
        reason = str(error).splitlines()[0]
        raise ValueError(f"torch-fidelity's mu and sigma are expected: {reason}") from error
