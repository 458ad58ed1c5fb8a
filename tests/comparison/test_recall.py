from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from mhla_diffusion.comparison import (
    Comparison,
    Recall,
    RecallModel,
    Variant,
    recall,
    recall_batch,
    train_recall,
)
from mhla_diffusion.ops import BlockLayout

TASK = Recall(side=8, blocks=2, queries=8, batch_size=4, head_dim=16, steps=3)


def draw(task: Recall, seed: int = 0) -> tuple[torch.Tensor, ...]:
    return recall_batch(task, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("distance", ["near", "far", "anywhere"])
def test_the_answer_is_the_value_of_the_one_cell_that_has_the_key_of_the_query(distance: str) -> None:
    task = dataclasses.replace(TASK, distance=distance)
    inputs, queries, answers = draw(task)
    keys, values, is_query = inputs.split((task.key_dim, task.values, 1), -1)
    assert is_query.sum() == task.batch_size * task.queries
    assert not values[is_query[..., 0] == 1].any()
    block = BlockLayout((8, 8), (2, 2)).block_index(torch.device("cpu"))
    same = []
    for sample in range(task.batch_size):
        for query, answer in zip(queries[sample], answers[sample], strict=True):
            likeness = keys[sample] @ keys[sample, query] - 100 * is_query[sample, :, 0]
            target = likeness.argmax()
            assert likeness[target] == pytest.approx(task.key_dim, rel=1e-4)
            assert values[sample, target].argmax() == answer
            assert values[sample, target].sum() == 1
            same.append(bool(block[target] == block[query]))
    assert {"near": all(same), "far": not any(same), "anywhere": len(set(same)) == 2}[distance]


def test_a_seed_gives_the_same_cells_and_another_seed_others() -> None:
    first, again, other = draw(TASK), draw(TASK), draw(TASK, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize(
    "variant",
    [
        Variant("softmax", "softmax"),
        Variant("linear", "linear"),
        Variant("MHLA", mhla={"cpe": "zero", "gate": True}),
        Variant("other blocks", mhla={"blocks": [4, 2]}),
    ],
    ids=lambda variant: variant.name,
)
def test_a_model_sees_what_its_attention_sees(variant: Variant) -> None:
    model = RecallModel(TASK, variant.config(TASK.default_blocks))
    inputs, queries, _ = draw(TASK)
    kinds = [layer.mhla and layer.mhla.blocks for layer in model.layers]
    assert (
        kinds
        == [{"softmax": None, "linear": (1, 1), "MHLA": (2, 2), "other blocks": (4, 2)}[variant.name]] * 2
    )
    before = model(inputs, queries)
    assert before.shape == (4, 8, 16)
    changed = inputs.clone()
    changed[:, -1] += 1
    assert not torch.equal(model(changed, queries), before)


def test_all_variants_of_a_seed_start_alike() -> None:
    task = Recall(side=4, blocks=2, queries=4, layers=2)
    first = recall._common_start(task, None, 3).state_dict()
    extras = {"cpe": "identity", "gate": True, "qk_conv": True, "local": "gate", "feature_map": "hedgehog"}
    for settings in ({}, extras):
        config = Variant("a", mhla=settings).config(task.default_blocks)
        other = recall._common_start(task, config, 3).state_dict()
        assert len(other) > len(first)
        assert all(torch.equal(other[name], weight) for name, weight in first.items())
    different = recall._common_start(task, None, 4).state_dict()
    assert not torch.equal(different["head.weight"], first["head.weight"])


def test_training_gives_the_same_numbers_again_and_others_for_another_seed() -> None:
    variant = Variant("linear", "linear")
    first, again, other = (train_recall(TASK, variant, seed) for seed in (0, 0, 1))
    assert first["loss"] == again["loss"] != other["loss"]
    assert 0 <= first["accuracy"] <= 1
    assert first["seconds_per_step"] > 0


@pytest.mark.parametrize("seed", [0, 3])
def test_accuracy_is_of_cells_that_were_not_trained_on(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def noted(task: Recall, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        seeds.append(generator.initial_seed())
        return recall_batch(task, generator)

    monkeypatch.setattr("mhla_diffusion.comparison.recall.recall_batch", noted)
    train_recall(TASK, Variant("linear", "linear"), seed)
    trained, asked = set(seeds[: TASK.steps]), set(seeds[TASK.steps :])
    assert trained == {seed}
    assert asked
    assert min(asked) > 10_000, "no seed that anyone trains with"


def test_the_loss_is_that_of_the_last_tenth_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[float] = []
    cross_entropy = recall.F.cross_entropy

    def noted(*args: Tensor) -> Tensor:
        losses.append((loss := cross_entropy(*args)).item())
        return loss

    monkeypatch.setattr(recall.F, "cross_entropy", noted)
    found = train_recall(dataclasses.replace(TASK, steps=20), Variant("linear", "linear"), 0)
    assert found["loss"] == pytest.approx(statistics.mean(losses[-2:]))


@pytest.mark.parametrize("steps", [1, 9, 10, 11])
def test_few_steps_are_trained(steps: int) -> None:
    found = train_recall(dataclasses.replace(TASK, steps=steps), Variant("linear", "linear"), 0)
    assert 0 < found["loss"] < 10


def test_training_begins_on_small_grids_with_as_many_cells_that_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    task = dataclasses.replace(TASK, side=16, queries=32, batch_size=3, steps=10, start_side=4)
    drawn: list[tuple[int, int, int]] = []

    def noted(task: Recall, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        inputs, queries, answers = recall_batch(task, generator)
        drawn.append((inputs.shape[0], inputs.shape[1], queries.shape[1]))
        return inputs, queries, answers

    monkeypatch.setattr(recall, "recall_batch", noted)
    found = train_recall(task, Variant("window", mhla={"local": "shared"}), 0)
    steps = [(48, 16, 2)] * 3 + [(12, 64, 8)] * 3 + [(3, 256, 32)] * 4
    assert drawn[:10] == steps
    assert set(drawn[10:]) == {(3, 256, 32)}, "answers are of the whole grid"
    assert found["loss"] > 0


def test_what_is_not_set_is_not_in_a_record() -> None:
    """Results that are stored have none of what came later."""
    assert "start_side" not in TASK.record
    assert dataclasses.replace(TASK, start_side=4).record == {**TASK.record, "start_side": 4}


def test_a_window_finds_what_is_near() -> None:
    """Chance is 1 in 2 here; a softmax inside the block needs few steps."""
    task = dataclasses.replace(
        TASK, side=4, queries=4, distance="near", values=2, steps=250, batch_size=16, layers=1
    )
    found = train_recall(task, Variant("window", mhla={"local": "shared"}), 0)
    assert found["accuracy"] > 0.8


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"distance": "close"}, "near, far, anywhere"),
        ({"blocks": 3}, "divide side"),
        ({"queries": 33}, "half of the 64 cells"),
        ({"steps": 0}, "steps must be above 0"),
        ({"start_side": 0}, "start_side must be above 0"),
        ({"start_side": 6}, "one of 8, 4: 8 halved, with 2 blocks and a query, got 6"),
        ({"start_side": 2, "queries": 4}, "one of 8, 4: "),
        ({"start_side": 4, "queries": 3}, "one of 8: "),
        ({"start_side": 4, "steps": 1}, "steps must be 2 or more"),
    ],
)
def test_a_task_that_cannot_be_is_refused(setting: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        dataclasses.replace(TASK, **setting)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"training": {"trainer.max_steps": 3}},
            "x: training is of tasks with a training run, not of recall",
        ),
        ({"mhla": {"blocks": [9, 1]}}, "8 tokens and cannot hold 9 blocks"),
    ],
)
def test_variants_that_cannot_be_trained_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Comparison("x", [Variant("x", **settings)], TASK)


def test_a_loss_that_is_not_finite_is_no_result() -> None:
    with pytest.raises(ValueError, match="the loss became nan; lower learning_rate"):
        train_recall(dataclasses.replace(TASK, learning_rate=1e30, steps=20), Variant("linear", "linear"), 0)
