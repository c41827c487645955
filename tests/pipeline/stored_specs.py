"""Sampling specs whose stored samples are kept, for test_stored_formats.py."""

import dataclasses
import hashlib

from ddpm import Ancestral, Estimate, Heun
from pipeline.data.image_formats import Jpeg
from pipeline.data.shard_table import ShardRecord
from pipeline.generation.spec.edits import InpaintSpec
from pipeline.generation.spec.sampling_plan import SamplingSpec

SHA = hashlib.sha256(b"").hexdigest()
SHARD = ShardRecord(key=f"train/000000000-{SHA[:16]}.tar", size_bytes=10240, sha256=SHA, num_samples=7)
TAR = dataclasses.replace(SHARD, key=f"000000000-{SHA}.tar")
ESTIMATE = Estimate(value=3.75, standard_error=0.02)
SPEC = SamplingSpec(
    model_digest=SHA,
    guide_digest=None,
    calibration_digest=None,
    request=InpaintSpec(
        revision=1, inputs_digest=SHA, num_inputs=7, label=None, mask_digest=SHA, jump_length=10, num_resamples=10
    ),
    sampler=Ancestral(num_steps=250, spacing="quadratic", variance="fixed_large"),
    sampler_revision=Ancestral.revision,
    seed=3,
    num_classes=10,
    shard_size=500,
    batch_size=125,
    image_size=(24, 40),
    channels=3,
    num_levels=256,
)
PLAIN_SPEC = dataclasses.replace(
    SPEC, request=None, sampler=Heun(num_steps=18, churn=10.0), sampler_revision=Heun.revision, num_classes=None
)
JPEG_SPEC = dataclasses.replace(PLAIN_SPEC, image_format=Jpeg(quality=90), container="parquet")
TICK_SPEC = dataclasses.replace(PLAIN_SPEC, tick="2026-11-22T03:00Z")
