"""What an inpainting must beat: the same images with their hidden pixels filled in without any model.

Three fills, each for the same inputs and the same known pixels: plain grey, the mean of all training images, and the
mean of the training images of the class that was asked for. The last one is told as much as the model is.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, UInt8

from pipeline.data.image_stream import LabelledImages
from pipeline.data.pictures import image_grid
from pipeline.generation.requests.edit_inputs import EditRequest, RowReader

FILL_NAMES = ("grey_fill", "mean_fill", "class_mean_fill")
_GREY = 128
_ROWS_AT_ONCE = 1000


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Fills:
    """Fills for the inputs of an inpainting."""

    edit: EditRequest
    """The inpainting."""
    num_images: int
    """Images, from the first input on."""
    mean: Float64[np.ndarray, "h w c"]
    """Mean training image."""
    class_means: Float64[np.ndarray, "k h w c"] | None
    """Mean training image of each class; None without labels."""

    @classmethod
    def fit(
        cls, edit: EditRequest, num_images: int, train: Iterable[LabelledImages], num_classes: int | None
    ) -> "Fills":
        """Take the means of training images; a class without any gets the mean of all."""
        sums: Float64[np.ndarray, "k h w c"] = np.zeros((num_classes or 1, *edit.inputs.image_shape))
        counts = np.zeros(len(sums))
        for group in train:
            labels = group.labels if num_classes is not None else np.zeros(len(group), dtype=np.int64)
            assert labels is not None, "the dataset's classes are the model's"
            np.add.at(sums, labels, group.images)
            np.add.at(counts, labels, 1)
        mean = sums.sum(0) / counts.sum()
        places = counts[:, None, None, None]
        by_class = np.where(places > 0, sums / np.maximum(places, 1), mean)
        return cls(edit=edit, num_images=num_images, mean=mean, class_means=None if num_classes is None else by_class)

    @property
    def streams(self) -> dict[str, Callable[[], Iterator[LabelledImages]]]:
        """How to open the filled images, by the name of the fill."""
        names = FILL_NAMES if self.class_means is not None else FILL_NAMES[:2]
        return {name: lambda name=name: self._stream(name) for name in names}  # type: ignore[misc]

    def _stream(self, name: str) -> Iterator[LabelledImages]:
        for given in self._given():
            yield LabelledImages(images=self._fill(name, given), labels=given.labels)

    def _given(self) -> Iterator[LabelledImages]:
        """The inputs, with the classes that were asked for."""
        reader = RowReader(self.edit.inputs)
        for start in range(0, self.num_images, _ROWS_AT_ONCE):
            given = reader.read(range(start, min(start + _ROWS_AT_ONCE, self.num_images)))
            label = self.edit.spec.label
            labels = given.labels if label is None else np.full(len(given), label)
            yield LabelledImages(images=given.images, labels=labels)

    def _fill(self, name: str, given: LabelledImages) -> UInt8[np.ndarray, "n h w c"]:
        known = self.edit.known
        assert known is not None, "an inpainting has a mask"
        filling: Float64[np.ndarray, "..."] = np.array(_GREY, dtype=np.float64)
        if name == "mean_fill":
            filling = self.mean
        elif name == "class_mean_fill":
            assert self.class_means is not None and given.labels is not None
            filling = self.class_means[given.labels]
        keep: Bool[np.ndarray, "1 h w 1"] = known[None, :, :, None]
        return np.where(keep, given.images, filling.round().astype(np.uint8))

    def picture(self, made: UInt8[np.ndarray, "n h w c"]) -> bytes:
        """The first inputs, as they were hidden, filled with the best mean there is, and completed by the model.

        Args:
            made: The model's first completions.
        """
        given = next(self._given())[: len(made)]
        best = FILL_NAMES[2] if self.class_means is not None else FILL_NAMES[1]
        rows = [given.images, self._fill(FILL_NAMES[0], given), self._fill(best, given), made]
        return image_grid(np.concatenate(rows), columns=len(made))
