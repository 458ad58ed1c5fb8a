"""Speed and memory of MHLA beside its alternatives, one file for each command of ``mhla benchmark``."""

import os

# Before torch is imported: the profiler, which counts memory, else tells its steps.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
