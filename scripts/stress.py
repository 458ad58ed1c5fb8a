"""Faults by chance, for as long as wanted; prints one table of what came of them.

python scripts/stress.py --out runs/stress --hours 2
python scripts/stress.py --out runs/stress --hours 0     # the table of what was done so far

Kills, signals, full disks, second writers, lost processes, damaged files and fuzzed inputs, on models of a
few layers. Each case is drawn from its number, so that a run that was stopped goes on, and any case can be
done again. Ends with 1 when one came to a wrong result, a traceback, a hang or a crash.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")

from mhla_diffusion.commands.end import exit_code
from mhla_diffusion.commands.parsing import parse_and_call
from tests.stress.main import stress

if __name__ == "__main__":
    sys.exit(exit_code(lambda: parse_and_call(stress, sys.argv[1:], "stress.py")))
