"""Files are what the library makes; that they are compared is in test_checkpoints.py."""

import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from pipeline.errors import StorageError
from pipeline.training.checkpoint_files import encode_tensors

TENSORS = {"b": torch.randn(3, 5), "a": torch.arange(7), "scalar": torch.tensor(2.0), "half": torch.randn(4).half()}


def test_the_bytes_are_those_of_the_library() -> None:
    assert encode_tensors(TENSORS) == safetensors.torch.save(TENSORS)
    assert encode_tensors({}) == safetensors.torch.save({})


def test_nothing_is_left_and_no_room_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    encode_tensors(TENSORS)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(StorageError, match=r"gone: cannot make a file of a checkpoint there .*TMPDIR"):
        encode_tensors(TENSORS)
