"""From pixels to the bytes of an output shard: encoded images, what is said of each, and the container.

Pure: a function of the spec, the names of the classes, ids, labels and pixels. No model, no device and no storage, so
that it can run beside the device that makes the next batch. What is written names no machine, no time, and not how the
model was called: the same model under two names gives the same bytes. A change of these bytes under an unchanged spec
raises `SamplingSpec.format_version`.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from pipeline.config_io import identity
from pipeline.data.parquet_shards import pack_parquet
from pipeline.data.shards import Sample, pack_shard
from pipeline.generation.spec.sampling_plan import SamplingSpec

_COLUMNS_OF_THEIR_OWN = ("name", "num_steps", "guidance_scale")


def encode_samples(
    spec: SamplingSpec,
    class_names: Sequence[str],
    ids: Sequence[int],
    labels: Sequence[int | None],
    pixels: UInt8[np.ndarray, "n h w c"],
    metas: Sequence[Mapping[str, Any]],
) -> list[Sample]:
    """Encode some images of an output shard; any cut into calls gives the same samples.

    Args:
        spec: What was made.
        class_names: Names of the model's classes; empty if it has none.
        ids: Sample ids [N].
        labels: The class that each was made as [N]; None for models without classes.
        pixels: Images [N, H, W, C], uint8, C = 1 or 3.
        metas: What else the metadata of each says of where it came from [N]: inputs of an edit, row of a label plan.

    Returns:
        The samples, each with what it was made of. The image itself carries its id and the digests of model and spec.
    """
    digests = {"model_digest": spec.model_digest, "spec_digest": spec.digest}
    common = {**_common(spec), **digests}
    samples = []
    for sample_id, label, image, more in zip(ids, labels, pixels, metas, strict=True):
        texts = {"sample_id": str(sample_id), **digests}
        meta = {**common, "sample_id": sample_id, "label": label, **more}
        if label is not None and class_names:
            meta["class_name"] = class_names[label]
        samples.append(
            Sample(
                key=_key(sample_id),
                image=spec.image_format.encode(image, {f"ddpm:{key}": text for key, text in texts.items()}),
                extension=spec.image_format.extension,
                cls=label,
                meta=meta,
            )
        )
    return samples


def pack_samples(
    spec: SamplingSpec, class_names: Sequence[str], samples: Sequence[Sample], without: Collection[int] = ()
) -> bytes:
    """Pack the samples of an output shard, all of them and in the order of their ids, into the spec's container.

    Args:
        spec: What was made.
        class_names: Names of the model's classes; empty if it has none, or none for them.
        samples: The samples, at least one.
        without: Ids of those that were taken down. Where they are all, the container is an empty one: readers of
            shards need no rule for it.
    """
    keys = {_key(sample_id) for sample_id in without}
    if spec.container == "parquet":
        return pack_parquet(samples, class_names or [str(label) for label in range(spec.num_classes or 0)], keys)
    return pack_shard(sample for sample in samples if sample.key not in keys)


def _key(sample_id: int) -> str:
    return f"{sample_id:012d}"


def _common(spec: SamplingSpec) -> dict[str, Any]:
    """What is the same of all samples of a run, beside the digests that every image carries."""
    sampler = identity(spec.sampler)
    common: dict[str, Any] = {
        "seed": spec.seed,
        "sampler": spec.sampler.name,
        "num_steps": spec.sampler.num_steps,
        "guidance_scale": spec.sampler.guidance_scale,
        "sampler_options": {name: value for name, value in sampler.items() if name not in _COLUMNS_OF_THEIR_OWN},
    }
    if spec.guide_digest is not None:
        common["guide_digest"] = spec.guide_digest
    if spec.request is not None:
        common["request"] = identity(spec.request)
    return common
