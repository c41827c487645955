"""Models that are made in milliseconds, as a folder of model files, for tests of generation."""

import uuid
from pathlib import Path

import pytest
import torch

from ddpm import ModelConfig, OwnNetworkConfig, ScheduleConfig, Stream, UNetConfig, build_network, standard_normal
from ddpm.networks.registry import AnyNetwork
from pipeline.models.model_files import ModelCard, encode_model
from pipeline.models.model_source import collect_source

TINY_UNET = UNetConfig(
    base_channels=8, channel_multipliers=(1,), num_res_blocks=1, attention_resolutions=(), dropout=0.0, num_groups=4
)


def write_model(
    folder: Path,
    *,
    network: AnyNetwork = TINY_UNET,
    num_classes: int | None = 3,
    channels: int = 1,
    num_timesteps: int = 100,
    image_size: tuple[int, int] = (8, 8),
    answers: bool = False,
    class_names: tuple[str, ...] | None = None,
    dataset_digest: str = "",
) -> str:
    """Write an untrained model's files; returns the folder as a URI. It answers 0, unless it is to answer something.

    Its classes are called 0, 1, ... like those of the digits, unless they have other names.
    """
    config = ModelConfig(
        network=network,
        schedule=ScheduleConfig(name="cosine", num_timesteps=num_timesteps),
        image_size=image_size,
        channels=channels,
        num_classes=num_classes,
    )
    names = tuple(str(k) for k in range(num_classes or 0)) if class_names is None else class_names
    card = ModelCard(config=config, class_names=names, dataset_digest=dataset_digest)
    weights = build_network(config).state_dict()
    if answers:
        generator = torch.Generator().manual_seed(0)
        weights = {name: w + 0.1 * torch.randn(w.shape, generator=generator) for name, w in weights.items()}
    files = encode_model(card, weights, collect_source(network))
    folder.mkdir(parents=True)
    for name, data in files.as_dict().items():
        (folder / name).write_bytes(data)
    return str(folder)


OWN_NETWORK = '''
"""Networks that misbehave, as a user's own module."""
import os
import signal
import time
from pathlib import Path

import torch


class Network(torch.nn.Module):
    def __init__(self, what, where):
        super().__init__()
        self.what, self.where = what, where
        self.scale = torch.nn.Parameter(torch.tensor(0.1))
        if what == "by noise":
            Path(f"{where}-{os.getpid()}").touch()

    def forward(self, x_t, t, label):
        if self.what == "kills once" and not Path(self.where).exists():
            Path(self.where).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "kills":
            with Path(self.where).open("a") as file:
                file.write("killed\\\\n")
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "by noise":
            for one in Path(self.where).read_text().split():
                action, value = one.split(":")
                if (x_t.flatten(1)[:, 0] == torch.tensor(float(value))).any():
                    self.misbehave(action)
        if self.what == "slow" and Path(self.where).exists():
            time.sleep(float(Path(self.where).read_text()))
        if self.what == "hungry" and len(x_t) > 4:
            torch.empty(2**55)
        if self.what == "diverged":
            return x_t * float("nan")
        return x_t * self.scale

    def misbehave(self, action):
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if action == "hang":
            time.sleep(3600)
        if action == "raise":
            raise RuntimeError("a network's own reason")
        if action == "break_device":
            while len(list(Path(self.where).parent.glob(f"{Path(self.where).name}-*"))) < 3:
                time.sleep(0.05)  # until there is another device: the driver and two actors have made the network
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered")


def make(image_size, channels, num_classes, what, where=""):
    return Network(what, where)
'''


def noise_mark(seed: int, sample_id: int) -> float:
    """The first number of an image's noise, by which a network of "by noise" knows the image when it is begun."""
    return float(standard_normal(seed, Stream.X_T, torch.tensor([sample_id]), 0, (1, 8, 8)).flatten()[0])


def write_own_model(folder: Path, monkeypatch: pytest.MonkeyPatch, what: str, where: str = "") -> str:
    """A model of a user's own network, whose module is importable in this process only: workers get its source."""
    module = f"own_network_{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    (folder / f"{module}.py").write_text(OWN_NETWORK)
    monkeypatch.syspath_prepend(str(folder))
    network = OwnNetworkConfig(factory=f"{module}:make", options={"what": what, "where": where})
    return write_model(folder / "model", network=network)
