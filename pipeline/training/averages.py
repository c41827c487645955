"""The moving averages that a training run keeps, and their way through the files of a checkpoint.

The first is the model that is sampled and registered; each further one lies beside it as a model of its own, under the
names of `model_files.average_names`. Power-function averages are tracked for their snapshots; a checkpoint holds them
to go on with, and the list of the snapshots that were taken.
"""

from dataclasses import replace

import safetensors.torch
from torch import nn

from ddpm import Ema, EmaBank, PowerEma
from pipeline.config_io import to_json
from pipeline.models.model_files import WEIGHTS, ModelCard, average_names, encode_model
from pipeline.training.ema_snapshots import SnapshotList, SnapshotRecord, SnapshotStore, parse_snapshots
from pipeline.training.train_config import OptimizerConfig

SNAPSHOTS_JSON = "ema_snapshots.json"
"""The checkpoint's file that names the snapshots behind it."""


class Averages:
    """The averages of one network, on the network's device.

    Args:
        network: The network in training; its present weights are the first averages.
        config: Half-lives and ramp-up.
        sigma_rels: Lengths of the power-function averages.
    """

    def __init__(self, network: nn.Module, config: OptimizerConfig, sigma_rels: tuple[float, ...] = ()) -> None:
        """Start from the network's present weights."""
        self.snapshots: list[SnapshotRecord] = []
        self._tracked = {sigma_rel: PowerEma(network, sigma_rel) for sigma_rel in sigma_rels}
        self._halflives = config.ema_halflives_images
        self._bank = EmaBank(network, self._halflives, ramp_up_ratio=config.ema_ramp_up_ratio)

    @property
    def registered(self) -> Ema:
        """The average that is sampled and registered."""
        return self._bank[self._halflives[0]]

    @property
    def num_images(self) -> int:
        """Images taken in so far: those of the steps that were made, without skipped batches."""
        return self.registered.num_images

    def update(self, network: nn.Module, num_images: int) -> None:
        """Take in the network's weights after a step on num_images images."""
        self._bank.update(network, num_images)
        for average in self._tracked.values():
            average.update(network, num_images)

    def take_snapshot(self, step: int, store: SnapshotStore, dtype: str) -> bool:
        """Store the tracked averages, unless nothing has changed since the last snapshot; says whether it did.

        Raises:
            CheckpointError: If they could not be read back as they were written.
        """
        newest = self.snapshots[-1].num_images if self.snapshots else 0
        if self.num_images == newest:
            return False
        averages = {sigma_rel: average.state_dict() for sigma_rel, average in self._tracked.items()}
        self.snapshots.append(store.save(step, self.num_images, averages, dtype))
        return True

    def to_files(self, card: ModelCard, source: bytes | None) -> dict[str, bytes]:
        """The averages as models.

        Args:
            card: What the registered one is.
            source: Source of the caller's own network; one file for all of them.

        Returns:
            Contents by file name.
        """
        files = encode_model(card, self.registered.state_dict(), source).as_dict()
        for halflife_images in self._halflives[1:]:
            of_this = replace(card, average=f"half-life {halflife_images} images")
            model = encode_model(of_this, self._bank[halflife_images].state_dict(), source)
            card_name, weights_name = average_names(halflife_images)
            files |= {card_name: model.card_json, weights_name: model.weights}
        for sigma_rel, average in self._tracked.items():
            files[_tracked_name(sigma_rel)] = encode_model(card, average.state_dict(), None).weights
        if self._tracked:
            files[SNAPSHOTS_JSON] = to_json(SnapshotList(snapshots=tuple(self.snapshots)))
        return files

    def restore(self, files: dict[str, bytes], *, num_images: int) -> None:
        """Go on from what `to_files` wrote.

        Args:
            files: Contents by file name.
            num_images: Images that these averages had taken in; the ramp-up goes on from there.

        Raises:
            KeyError: If the file of an average is missing.
            ValueError: If the weights are another network's.
        """
        for halflife_images in self._halflives:
            first = halflife_images == self._halflives[0]
            name = WEIGHTS if first else average_names(halflife_images)[1]
            self._bank[halflife_images].load_state_dict(safetensors.torch.load(files[name]), num_images=num_images)
        for sigma_rel, average in self._tracked.items():
            average.load_state_dict(safetensors.torch.load(files[_tracked_name(sigma_rel)]), num_images=num_images)
        if self._tracked:
            self.snapshots = list(parse_snapshots(files[SNAPSHOTS_JSON], SNAPSHOTS_JSON))


def _tracked_name(sigma_rel: float) -> str:
    return f"power-ema-{sigma_rel}.safetensors"
