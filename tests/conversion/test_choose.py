from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mhla_diffusion import MHLAPipeline
from mhla_diffusion.conversion import NoiseCalls, align, choose, frontier, save_student
from mhla_diffusion.conversion.choose import assemble, layer_errors
from mhla_diffusion.conversion.knapsack import STOCK, Limits, within
from mhla_diffusion.conversion.trial import Trial, prediction_error, rank_correlation
from mhla_diffusion.planning import Plan, plan

from .conftest import FEW, FORMS, make_teacher


@pytest.mark.parametrize("seed", range(5))
def test_the_frontier_is_that_of_all_choices(seed: int) -> None:
    random = np.random.default_rng(seed)
    forms = [STOCK, "a", "b", "c"]
    costs = [dict(zip(forms, (1.0, *random.integers(1, 9, 3) / 10), strict=True)) for _ in range(5)]
    errors = [dict(zip(forms, (0.0, *random.random(3)), strict=True)) for _ in range(5)]
    found = frontier(errors, costs, keep=[1])
    every = [Limits(errors, costs, 9).choice(c) for c in itertools.product(forms, repeat=5) if c[1] == STOCK]
    for budget in np.linspace(min(c.cost for c in every), 5, 12):
        best = min(c.error for c in every if c.cost <= budget + 1e-9)
        assert within(found, budget).error == pytest.approx(best)
    assert [c.cost for c in found] == sorted(c.cost for c in found)
    assert [c.error for c in found] == sorted((c.error for c in found), reverse=True)
    with pytest.raises(
        ValueError, match=rf"no choice costs 0.1 or less .* the nearest costs {found[0].cost:.4g}"
    ):
        within(found, 0.1)


def test_errors_of_a_layer_are_summed_over_its_branches() -> None:
    jobs = {name: {"error": error} for name, error in (("a", 0.1), ("b", 0.2), ("c", 0.4))}
    found = layer_errors({"layers": {"a": 0, "b": 0, "c": 1}, "jobs": {"mhla": jobs}}, 3)
    assert found[0] == {STOCK: 0.0, "mhla": pytest.approx(0.3)}
    assert found[1:] == [{STOCK: 0.0, "mhla": 0.4}, {STOCK: 0.0}]


@pytest.fixture
def aligned(teacher: Any, calls: NoiseCalls, tmp_path: Path) -> Path:
    align(teacher, calls, tmp_path / "aligned", candidates=FORMS, config=FEW)
    return tmp_path / "aligned"


@pytest.fixture
def size(stored_teacher: Path) -> Plan:
    return plan(str(stored_teacher), 64, 64, vae_stride=1)


def test_a_student_is_made_of_aligned_layers_and_opens_as_a_pipeline(
    teacher: Any, calls: NoiseCalls, aligned: Path, size: Plan, stored_teacher: Path, tmp_path: Path
) -> None:
    student, facts = choose(teacher, calls, aligned, size, budget=0.7, keep=[0, -1])
    assert student.layer_attention == ["softmax", "mhla", "softmax"]
    forms = facts["chosen"]["forms"]
    assert forms[0] == forms[2] == STOCK
    measured = prediction_error(teacher, student, calls, range(6, 14))
    assert facts["chosen"]["measured"] == pytest.approx(measured)
    plain = assemble(teacher, [STOCK] * 3, json.loads((aligned / "align.json").read_text()), aligned)
    assert prediction_error(teacher, plain, calls, [0]) == 0
    save_student(student, facts, str(stored_teacher), tmp_path / "student")
    pipeline = MHLAPipeline.from_pretrained(tmp_path / "student")
    assert pipeline.transformer.layer_attention == student.layer_attention
    torch.testing.assert_close(
        pipeline.transformer(**calls(0), return_dict=False)[0], student(**calls(0), return_dict=False)[0]
    )
    assert json.loads((tmp_path / "student" / "choice.json").read_text())["chosen"]["forms"] == list(forms)
    with pytest.raises(ValueError, match="is there already"):
        save_student(student, facts, str(stored_teacher), tmp_path / "student")


def test_latency_is_measured(teacher: Any, calls: NoiseCalls, aligned: Path, size: Plan) -> None:
    _, facts = choose(teacher, calls, aligned, size, budget=1.0, keep=[], cost="latency", check=0)
    assert all(table[form] > 0 for table in facts["costs"] for form in table)
    assert sum(table[STOCK] for table in facts["costs"]) == pytest.approx(1)


def test_what_does_not_fit_is_refused(teacher: Any, calls: NoiseCalls, aligned: Path, size: Plan) -> None:
    with pytest.raises(ValueError, match=r"keep names layer 3, but the layers are 0 to 2"):
        choose(teacher, calls, aligned, size, budget=0.5, keep=[3])
    with pytest.raises(
        ValueError, match=r"no choice costs 0.2 or less .* nearest costs 0.\d+: raise the budget"
    ):
        choose(teacher, calls, aligned, size, budget=0.2, keep=[0])
    other = make_teacher()
    torch.nn.init.normal_(other.proj_out_2.weight)
    with pytest.raises(ValueError, match="were aligned to another model"):
        choose(other, calls, aligned, size, budget=0.9)
    with pytest.raises(ValueError, match="holds no aligned layers; make them with mhla align"):
        choose(teacher, calls, aligned.parent, size, budget=0.9)


@pytest.mark.parametrize("name", ["check", "repairs"])
def test_numbers_below_0_are_refused(
    teacher: Any, calls: NoiseCalls, aligned: Path, size: Plan, name: str
) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be 0 \(none\) or more, got -3"):
        choose(teacher, calls, aligned, size, budget=0.9, **{name: -3})


def known_trial() -> tuple[Trial, list[Any], Limits]:
    """Layers whose errors, alone, say the opposite of what they do together."""
    alone = [{STOCK: 0.0, "a": error} for error in (0.1, 0.2, 0.3, 0.4)]
    costs = [{STOCK: 0.25, "a": 0.05} for _ in range(4)]
    together = (0.9, 0.5, 0.2, 0.1)
    limits = Limits(alone, costs, budget=0.6)

    class KnownTrial(Trial):
        def measure(self, choice: Any) -> Any:
            total = sum(e for e, form in zip(together, choice.forms, strict=True) if form != STOCK)
            self._known[choice.forms] = total
            return limits.choice(choice.forms).__class__(choice.forms, choice.cost, choice.error, total)

    trial = KnownTrial(None, None, range(0), lambda *_: None)  # type: ignore[arg-type]
    return trial, frontier(alone, costs), limits


def test_a_repair_finds_what_summed_errors_hide() -> None:
    trial, choices, limits = known_trial()
    chosen, notes = trial.check(choices, within(choices, 0.6), limits, repairs=0)
    assert chosen.forms == ("a", "a", STOCK, STOCK)
    repaired = trial.repair(chosen, limits, 40)
    assert repaired.forms == (STOCK, STOCK, "a", "a")
    assert repaired.cost <= 0.6 + 1e-9
    assert notes["before_repair"] == pytest.approx(1.4)


def test_a_repair_leaves_kept_layers_alone() -> None:
    limits = Limits([{STOCK: 0.0, "a": 0.1}] * 3, [{STOCK: 0.3, "a": 0.1}] * 3, budget=1.0, keep=[0])
    found = list(limits.neighbours(limits.choice([STOCK, "a", STOCK])))
    assert found
    assert all(its.forms[0] == STOCK for its in found)


@pytest.mark.parametrize(
    ("trust", "forms"), [(0.0, (STOCK, STOCK, "a", "a")), (1.0, ("a", "a", STOCK, STOCK))]
)
def test_only_what_sums_do_not_predict_is_repaired(
    trust: float, forms: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    trial, choices, limits = known_trial()
    monkeypatch.setattr("mhla_diffusion.conversion.trial.rank_correlation", lambda *_: trust)
    assert trial.check(choices, within(choices, 0.6), limits, repairs=40)[0].forms == forms


def test_rank_correlation_by_hand() -> None:
    assert rank_correlation([1, 2, 3], [10, 20, 90]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 1, 2], [1, 2, 3]) == pytest.approx(3**0.5 / 2)  # ranks 1.5, 1.5, 3
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == 0
    assert rank_correlation([1, 2], [2, 1]) == 1
