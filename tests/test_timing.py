"""Memory is that of the call."""

from __future__ import annotations

import torch

from mhla_diffusion.timing import peak_bytes


def test_memory_beyond_what_is_returned() -> None:
    def call() -> torch.Tensor:
        large = torch.zeros(1000)
        return large[:10].clone()

    assert 4000 <= peak_bytes(call, "cpu") <= 4200


def test_views_of_one_storage_are_returned_once() -> None:
    def call() -> tuple[torch.Tensor, ...]:
        whole = torch.zeros(1000)
        return whole[:10], whole[10:]

    assert 0 <= peak_bytes(call, "cpu") <= 200
