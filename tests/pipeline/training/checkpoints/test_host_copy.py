"""The copy is of the moment at which it was taken, and its memory is used again."""

import pytest
import torch

from pipeline.training.checkpoints.host_copy import HostCopy


def test_what_changes_later_is_not_in_the_copy() -> None:
    weights = torch.randn(4, 4)
    tied = {"a": weights, "b": weights, "turned": weights.T, "count": torch.tensor(3)}
    copy = HostCopy().take({"file": tied})["file"]
    before = {name: tensor.clone() for name, tensor in tied.items()}
    weights.add_(1)
    assert all(torch.equal(copy[name], before[name]) and copy[name].is_contiguous() for name in tied)
    assert len({tensor.untyped_storage().data_ptr() for tensor in copy.values()}) == len(tied), "nothing is shared"


def test_buffers_are_used_again_where_they_fit() -> None:
    host, tensor = HostCopy(), torch.randn(3)
    first = host.take({"f": {"t": tensor}})["f"]["t"]
    tensor.mul_(2)
    second = host.take({"f": {"t": tensor}, "g": {"t": tensor}})
    assert second["f"]["t"] is first and torch.equal(first, tensor)
    assert second["g"]["t"] is not first
    longer = host.take({"f": {"t": torch.ones(4)}})["f"]["t"]
    assert torch.equal(longer, torch.ones(4))


@pytest.mark.gpu
def test_from_a_gpu_the_copy_is_pinned_and_complete() -> None:
    tensor = torch.randn(1000, 1000, device="cuda")
    before = tensor.cpu()
    copy = HostCopy().take({"f": {"t": tensor}})["f"]["t"]
    tensor.zero_()
    assert copy.is_pinned() and torch.equal(copy, before)
