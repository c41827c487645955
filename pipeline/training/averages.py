"""The moving averages that a training run keeps.

The first is the model that is sampled and registered; each further one lies beside it as a model of its own, under the
names of `model_files.average_names`. Power-function averages are tracked for their snapshots; a checkpoint holds them
to go on with, and the list of the snapshots that were taken.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from ddpm import Ema, EmaBank, PowerEma
from pipeline.training.background import BackgroundWriter
from pipeline.training.ema_snapshots import SnapshotRecord, SnapshotStore
from pipeline.training.host_copy import HostCopy, Tensors
from pipeline.training.state_files import tracked_name, weights_name
from pipeline.training.train_config import OptimizerConfig


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
        self._last_snapshot_images, self._snapshot_copy = 0, HostCopy()
        self._tracked = {sigma_rel: PowerEma(network, sigma_rel) for sigma_rel in sigma_rels}
        self._halflives = config.ema_halflives_images
        self._bank = EmaBank(network, self._halflives, ramp_up_ratio=config.ema_ramp_up_ratio)

    @property
    def registered(self) -> Ema:
        """The average that is sampled and registered."""
        return self._bank[self._halflives[0]]

    @property
    def num_images(self) -> int:
        """Images taken in so far, without skipped batches; to read it waits for the device."""
        return self.registered.num_images

    def update(self, network: nn.Module, num_images: Tensor) -> None:
        """Take in the network's weights after a step on num_images images (0-dim), 0 of a skipped one; no waiting."""
        self._bank.update(network, num_images)
        for average in self._tracked.values():
            average.update(network, num_images)

    def take_snapshot(self, step: int, store: SnapshotStore, dtype: str, writer: BackgroundWriter) -> None:
        """Store the tracked averages beside training, unless nothing has changed since the last snapshot.

        The snapshot is among `snapshots` when its job is done: a checkpoint that is written after it names it.

        Args:
            step: Global batches behind it.
            store: Where.
            dtype: "float32" or "float16".
            writer: Does the writing.

        Raises:
            BaseException: What the writer's jobs before have raised.
        """
        if self.num_images == self._last_snapshot_images:
            return
        writer.wait("snapshot")
        num_images = self._last_snapshot_images = self.num_images
        copies = self._snapshot_copy.take(self._tracked_tensors())
        averages = {sigma_rel: copies[tracked_name(sigma_rel)] for sigma_rel in self._tracked}
        writer.start("snapshot", lambda: self.snapshots.append(store.save(step, num_images, averages, dtype)))

    @property
    def is_tracking(self) -> bool:
        """Whether there are power-function averages, of which snapshots are taken."""
        return bool(self._tracked)

    @property
    def halflives_images(self) -> tuple[int, ...]:
        """Half-lives of the averages that are models, the registered one's first."""
        return self._halflives

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Every average by its file and its weights' names; not copies."""
        models = {weights_name(self._halflives, h): self._bank[h].state_dict() for h in self._halflives}
        return models | self._tracked_tensors()

    def restore(self, tensors: Tensors, snapshots: Sequence[SnapshotRecord], *, num_images: int) -> None:
        """Go on from stored averages.

        Args:
            tensors: As `tensors` gave them.
            snapshots: The snapshots behind them.
            num_images: Images that these averages had taken in; the ramp-up goes on from there.

        Raises:
            KeyError: If an average is missing.
            ValueError: If the weights are another network's.
        """
        for halflife_images in self._halflives:
            name = weights_name(self._halflives, halflife_images)
            self._bank[halflife_images].load_state_dict(tensors[name], num_images=num_images)
        for sigma_rel, average in self._tracked.items():
            average.load_state_dict(tensors[tracked_name(sigma_rel)], num_images=num_images)
        self.snapshots = list(snapshots)
        self._last_snapshot_images = self.snapshots[-1].num_images if self.snapshots else 0

    def _tracked_tensors(self) -> dict[str, dict[str, Tensor]]:
        return {tracked_name(sigma_rel): average.state_dict() for sigma_rel, average in self._tracked.items()}
