"""The same samples, in the same order, however the batch divides."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mhla_diffusion.training.data.stream import BatchShare, SampleStream, StreamSampler, UnreadableSampleError


class Numbers:
    """Samples that say which they are; those in ``broken`` cannot be read."""

    def __init__(self, count: int, broken: tuple[int, ...] = (), buckets: list[int] | None = None) -> None:
        self.count, self.broken, self.buckets = count, broken, buckets

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return str(index)

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        if index in self.broken:
            raise UnreadableSampleError(f"sample {index}: broken")
        return {"samples": torch.rand(2, generator=generator), "index": index}


def read(source: Numbers, share: BatchShare, steps: range, **kwargs: Any) -> dict[int, tuple[int, float]]:
    """Sample number -> (index, first random value)."""
    stream = SampleStream(source, share, steps, seed=3, **kwargs)
    return {
        number: (int(index), float(values[0]))
        for numbers, batch in stream
        for number, index, values in zip(numbers, batch["index"], batch["samples"], strict=True)
    }


@pytest.mark.parametrize(("processes", "micro_batches"), [(1, 1), (2, 1), (1, 4), (3, 2)])
def test_every_division_serves_the_same_samples(processes: int, micro_batches: int) -> None:
    whole = read(Numbers(10), BatchShare(12), range(4))
    parts: dict[int, tuple[int, float]] = {}
    for index in range(processes):
        share = BatchShare(12, processes, index, micro_batches)
        part = read(Numbers(10), share, range(4))
        assert not parts.keys() & part.keys()
        parts |= part
    assert parts == whole
    assert sorted(whole) == list(range(48))


def test_an_epoch_is_a_permutation_and_the_next_another() -> None:
    order = [index for index, _ in read(Numbers(10), BatchShare(4), range(5)).values()]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]


@pytest.mark.parametrize(("processes", "micro_batches"), [(1, 1), (2, 1), (1, 2)])
def test_a_batch_is_of_one_bucket_and_an_epoch_has_every_sample(processes: int, micro_batches: int) -> None:
    buckets = [0, 1, 0, 0, 1, 0, 2, 0, 0, 0, 1, 0]  # eight, three and one
    parts: dict[int, tuple[int, float]] = {}
    for process in range(processes):
        share = BatchShare(4, processes, process, micro_batches)
        parts |= read(Numbers(12, buckets=buckets), share, range(8))
    order = [parts[number][0] for number in sorted(parts)]
    batches = [order[start : start + 4] for start in range(0, 32, 4)]
    assert all(len({buckets[index] for index in batch}) == 1 for batch in batches)
    for epoch in (batches[:4], batches[4:]):
        assert {index for batch in epoch for index in batch} == set(range(12))
    assert batches[:4] != batches[4:]


def test_batches_of_several_buckets_are_mixed_in_an_epoch() -> None:
    buckets = [0] * 20 + [1] * 20
    order = [index for index, _ in read(Numbers(40, buckets=buckets), BatchShare(4), range(40)).values()]
    of_batches = [buckets[index] for index in order[::4]]
    epochs = [of_batches[start : start + 10] for start in range(0, 40, 10)]
    assert all(epoch not in (sorted(epoch), sorted(epoch)[::-1]) for epoch in epochs)


def test_an_unreadable_sample_is_replaced_from_its_bucket() -> None:
    buckets = [0, 1, 0, 1]
    order = read(Numbers(4, broken=(1,), buckets=buckets), BatchShare(2), range(8))
    served = [index for index, _ in order.values()]
    assert set(served) == {0, 2, 3}
    assert all(buckets[a] == buckets[b] for a, b in zip(served[::2], served[1::2], strict=True))


def test_a_later_start_goes_on_in_the_middle_of_an_epoch() -> None:
    whole = read(Numbers(10), BatchShare(4), range(6))
    assert read(Numbers(10), BatchShare(4), range(3, 6)) == {k: v for k, v in whole.items() if k >= 12}


def test_workers_change_nothing_and_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    here = read(Numbers(10), BatchShare(4), range(3))
    assert read(Numbers(10), BatchShare(4), range(3), num_workers=2) == here
    assert torch.equal(torch.get_rng_state(), state)


def test_a_batch_larger_than_the_data() -> None:
    indices = [index for index, _ in read(Numbers(3), BatchShare(8), range(1)).values()]
    assert sorted(indices[:3]) == sorted(indices[3:6]) == [0, 1, 2]


def test_an_unreadable_sample_is_named_once_and_replaced(caplog: pytest.LogCaptureFixture) -> None:
    stream = SampleStream(Numbers(5, broken=(2, 3)), BatchShare(5), range(3), seed=0, num_workers=1)
    indices = [int(index) for _, batch in stream for index in batch["index"]]
    assert len(indices) == 15
    assert set(indices) == {0, 1, 4}
    assert stream.unreadable == {2: "sample 2: broken", 3: "sample 3: broken"}
    assert sum("sample 2: broken" in record.message for record in caplog.records) == 1


def test_nothing_readable_is_an_error() -> None:
    stream = SampleStream(Numbers(2, broken=(0, 1)), BatchShare(2), range(1), seed=0)
    with pytest.raises(ValueError, match=r"none of the 2 samples can be read, first sample \d: broken"):
        next(iter(stream))


def test_a_batch_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match=r"batch_size 10 .* 2 processes x 2 .*nearest that do are 8 and 12"):
        BatchShare(10, num_processes=2, micro_batches=2)


def test_the_sampler_keeps_no_position() -> None:
    sampler = StreamSampler(Numbers(5), BatchShare(2), range(4), seed=0)
    assert list(sampler) == list(sampler)
