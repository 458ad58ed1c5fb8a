"""From a trained model with softmax attention to MHLA: align layers, choose among them, distil, report.

1. :func:`align` trains each layer alone to give what the teacher's gives, in every candidate form;
2. :func:`choose` takes the forms of least error that a budget allows, and puts the student together;
3. training goes on from it with the teacher's help: ``objective.teacher`` of a training run;
4. :func:`report` shows what was lost and won.

:func:`linearize` is all of it.
"""

from __future__ import annotations

from ..backbones.teacher import load_teacher
from .align import align, default_candidates, load_candidates
from .calls import Calls, DataCalls, NoiseCalls, SampledCalls, open_calls
from .choose import choose, save_student
from .job import AlignConfig
from .knapsack import Choice, frontier
from .linearize import LinearizeConfig, linearize
from .report import ReportConfig, report

__all__ = [
    "AlignConfig",
    "Calls",
    "Choice",
    "DataCalls",
    "LinearizeConfig",
    "NoiseCalls",
    "ReportConfig",
    "SampledCalls",
    "align",
    "choose",
    "default_candidates",
    "frontier",
    "linearize",
    "load_candidates",
    "load_teacher",
    "open_calls",
    "report",
    "save_student",
]
