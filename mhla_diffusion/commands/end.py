"""The one end of all commands: which errors are the user's, how they are told, and the exit codes.

0 when done; 1 for what is wrong with the input, 2 for a command line that asks for what does not exist; 128
and the number of the signal when stopped. Anything else that is raised is a fault of this project, and keeps
its traceback.
"""

from __future__ import annotations

import os
import pickle
import signal
import struct
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from ..optional import how_to_install


class CommandError(Exception):
    """Error of the user's: what is to be mended, in words, and the exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


class _TerminatedError(BaseException):
    """SIGTERM, so that what is temporary is removed, as Ctrl-C has it."""


def exit_code(call: Callable[[], int | None]) -> int:
    """Return the exit code of a call, after telling an error of the user's in one line on stderr."""
    try:
        with _terminated_in_order():
            code = call() or 0
        sys.stdout.flush()
        return code
    except CommandError as error:
        return _tell(error, error.code)
    except BrokenPipeError:  # who reads the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return _tell("interrupted", 128 + signal.SIGINT)
    except _TerminatedError:
        return _tell("terminated", 128 + signal.SIGTERM)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == __name__.partition(".")[0]:
            raise
        return _tell(how_to_install(error.name) if error.name else error, 1)
    except (OSError, ValueError, ImportError) as error:
        return _tell(_of_hub(error), 1)
    except _broken_file_errors() as error:
        return _tell(f"a file is broken: {error}", 1)
    except (MemoryError, RuntimeError) as error:
        if not _is_of_memory(error):
            raise
        return _tell(f"out of memory; take a smaller size or fewer at a time: {error}", 1)


@contextmanager
def _terminated_in_order() -> Iterator[None]:
    """Raise at SIGTERM, but where somebody has other plans for it or no signal arrives."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, process = signal.getsignal(signal.SIGTERM), os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() == process:
            raise _TerminatedError
        os._exit(128 + number)  # a fork, which has nothing of its own

    if before is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _of_hub(error: Exception) -> str:
    """Return the message of an error, and where it is of a hub that was not asked, that it was not."""
    constants = sys.modules.get("huggingface_hub.constants")
    asked_none = constants is not None and constants.HF_HUB_OFFLINE
    if asked_none and isinstance(error, OSError) and "does not appear to have a file" in str(error):
        return f"{error} It is not in the cache, and HF_HUB_OFFLINE is set: the hub was not asked."
    return str(error) or type(error).__name__


def _broken_file_errors() -> tuple[type[Exception], ...]:
    """What the readers of weights and archives raise for a file that is none, or only a part of one."""
    safetensors = sys.modules.get("safetensors")
    of_safetensors = (safetensors.SafetensorError,) if safetensors else ()
    return (zipfile.BadZipFile, pickle.UnpicklingError, struct.error, EOFError, *of_safetensors)


def _is_of_memory(error: Exception) -> bool:
    """Tell whether memory did not do: torch says it of a GPU by a class, of a CPU by a message."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & {"MemoryError", "OutOfMemoryError"}) or "DefaultCPUAllocator" in str(error)


def _tell(error: object, code: int) -> int:
    # Messages of other libraries have several lines, each a sentence or an item.
    text = ""
    for line in filter(None, map(str.strip, str(error).splitlines())):
        text += ("" if not text else " " if text[-1] in ".:;,?!" else "; ") + line
    print(f"error: {text or type(error).__name__}", file=sys.stderr)
    return code
