"""What a pickle would call when it is loaded, found out without calling it.

accelerate reads the checkpoints of DeepSpeed and of FSDP through libraries that unpickle whatever is there.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import IO, Any

# Tensors and what torch.distributed.checkpoint and DeepSpeed (ZeRO 1 and 2) keep beside them.
_KNOWN = re.compile(
    r"collections\.OrderedDict|pathlib\.(\w*)Path|torch\.(Size|device|\w+Storage|b?float\w+|u?int\w+|bool)"
    r"|torch\._utils\._rebuild_\w+|torch\.nn\.parameter\.Parameter|torch\.serialization\._get_layout"
    r"|torch\.storage\.\w+|torch\.distributed\.checkpoint\.(metadata|filesystem|planner)\.\w+"
    r"|deepspeed\.(runtime\.fp16\.loss_scaler\.\w*LossScaler|runtime\.zero\.config\.ZeroStageEnum)"
    r"|deepspeed\.utils\.tensor_fragment\.fragment_address"
)


def require_known_names(path: Path) -> None:
    """Check that a pickle, or what torch.save wrote, holds tensors and the records of checkpoints alone.

    Raises:
        ValueError: when it would call anything else, or cannot be read.
    """
    try:
        names = _names_in(path)
    except Exception as error:  # a damaged pickle raises whatever it stumbles over
        raise ValueError(f"{path} cannot be read ({error}): go on from another checkpoint") from error
    unknown = sorted(name for name in names if not _KNOWN.fullmatch(name))
    if unknown:
        raise ValueError(
            f"{path} would call {', '.join(unknown)} when it is loaded, and no checkpoint of this project "
            "does: go on from another one"
        )


def _names_in(path: Path) -> set[str]:
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            return _names_of(file)
    with zipfile.ZipFile(path) as archive:
        found = set[str]()
        for name in archive.namelist():
            if name.endswith(".pkl"):
                with archive.open(name) as file:
                    found |= _names_of(file)
        return found


def _names_of(file: IO[bytes]) -> set[str]:
    reader = _Names(file)
    reader.load()
    return reader.names


class _Names(pickle.Unpickler):
    """Reads a pickle with stand-ins for all that it names."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.names: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        self.names.add(f"{module}.{name}")
        return _StandIn

    def persistent_load(self, key: Any) -> Any:
        return _StandIn()


class _StandIn:
    def __new__(cls, *args: Any, **kwargs: Any) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> _StandIn:
        return self
