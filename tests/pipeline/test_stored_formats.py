"""Every stored format: one stored sample is kept and read, its digest is golden, and other versions are refused.

`python -m tests.pipeline.test_stored_formats` writes the samples of formats that have none yet; a sample that exists is
never written anew: a change that cannot read it raises the format's version, and adds a sample of its own.
"""

import dataclasses
import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ddpm import ModelConfig, ObjectiveConfig, ScheduleConfig, UNetConfig
from pipeline.config_io import digest, read_record, to_json
from pipeline.data.manifest import ManifestRecord, SplitRecord
from pipeline.data.prepare import Quarantine
from pipeline.data.shard_parts import PartRecord
from pipeline.errors import ConfigError, FormatVersionError
from pipeline.evaluation.report import EvaluationRecord, Figure
from pipeline.evaluation.studies.bound_comparison import BoundComparison
from pipeline.evaluation.studies.ema_sweep import EmaSweep, EmaSweepRow
from pipeline.evaluation.studies.sampler_table import SamplerComparison, SamplerRow
from pipeline.generation.output.commits import CommitRecord, Provenance
from pipeline.generation.output.manifest import GenerationManifest
from pipeline.generation.output.plan_record import PlanRecord
from pipeline.generation.output.removals import RemovalRecord
from pipeline.generation.output.tick_records import TickRecord
from pipeline.generation.spec.sampling_plan import SamplingSpec
from pipeline.models.calibration import Calibration
from pipeline.models.model_files import ModelCard
from pipeline.stores.lease import LeaseRecord
from pipeline.training.checkpoints.checkpoint_files import FileRecord
from pipeline.training.checkpoints.checkpoint_records import CheckpointRecord, PinRecord
from pipeline.training.checkpoints.ema_snapshots import SnapshotList, SnapshotRecord
from pipeline.training.checkpoints.state_files import Position
from pipeline.training.metrics.unsent_metrics import UnsentMetrics, UnsentPoint
from pipeline.training.run_record import RateRecord, RollbackRecord, RunRecord
from pipeline.training.train_config import DataIdentity, OptimizerConfig, PostHocEmaIdentity, RunIdentity
from tests.pipeline.cost_records import COST_RECORDS
from tests.pipeline.stored_specs import ESTIMATE, JPEG_SPEC, PLAIN_SPEC, SHA, SPEC, TAR, TICK_SPEC

FOLDER = Path(__file__).with_name("stored")
IDENTITY = RunIdentity(
    network=UNetConfig(),
    schedule=ScheduleConfig(name="cosine"),
    objective=ObjectiveConfig(),
    class_conditional=True,
    label_drop=0.1,
    horizontal_flip=False,
    global_batch=128,
    seed=0,
    optimizer=OptimizerConfig(ema_ramp_up_ratio=None),
    data=DataIdentity(lanes=8, window_shards=4),
    post_hoc_ema=PostHocEmaIdentity(sigma_rels=(0.05, 0.1)),
    dataset_digest=SHA,
)

RECORDS: dict[str, Any] = {
    "dataset_manifest": ManifestRecord(
        name="digits",
        source="digits",
        image_size=(24, 40),
        channels=3,
        class_names=("cat", "dog"),
        splits={"train": SplitRecord(parts=(PartRecord(key=f"_manifest/train/00000-00001-{SHA}.parquet"),))},
        num_quarantined=1,
    ),
    "quarantine": Quarantine(reasons={"cat/broken.png": "png: does not decode"}),
    "run": RunRecord(run_id="0123456789abcdef", identity=IDENTITY),
    "run_with_key": RunRecord(
        run_id=None,
        identity=dataclasses.replace(IDENTITY, fork_from="models:/ddpm/3"),
        run_key="0123456789abcdef",
        has_checkpoints=True,
        fork_digest=SHA,
    ),
    "run_that_went_back": RunRecord(
        run_id="0123456789abcdef",
        identity=IDENTITY,
        run_key="0123456789abcdef",
        has_checkpoints=True,
        begun_at_s=1795997420.25,
        num_restarts=3,
        rollback=RollbackRecord(to_step=400, from_step=460, left_out_steps=(431, 440, 442), is_done=True),
    ),
    "run_with_rate": RunRecord(
        run_id="0123456789abcdef",
        identity=IDENTITY,
        has_checkpoints=True,
        rate=RateRecord(images_per_s=763.5, num_workers=2),
    ),
    "lease": LeaseRecord(token="0123456789abcdef", holder="process 7 on h", duration_s=60.0, num_renewals=3),
    "checkpoint": CheckpointRecord(
        step=400, prefix="step-000000400-01234567", files=(FileRecord(name="model.json", size_bytes=300, sha256=SHA),)
    ),
    "pin": PinRecord(prefix="step-000000400-01234567", registered_as="ddpm"),
    "position": Position(step=400, skipped_steps=(17,), num_averaged_images=51_072),
    "position_of_parts": Position(step=400, skipped_steps=(), num_averaged_images=51_200, micro_batch=32),
    "unsent_metrics": UnsentMetrics(
        points=(
            UnsentPoint(key="loss", value="0.30000000000000004", step=50, time_ms=1795997420250),
            UnsentPoint(key="grad_norm", value="nan", step=50, time_ms=1795997420250),
        )
    ),
    "snapshots": SnapshotList(
        snapshots=(
            SnapshotRecord(
                step=400,
                num_images=51_072,
                prefix="step-000000400-0123456789abcdef",
                sigma_rels=(0.05,),
                files=(FileRecord(name="sigma_rel-0.05.safetensors", size_bytes=300, sha256=SHA),),
            ),
        )
    ),
    "model_card": ModelCard(
        config=ModelConfig(image_size=(32, 32), channels=3, num_classes=2),
        class_names=("cat", "dog"),
        dataset_digest=SHA,
        train_step=400,
        weights_sha256=SHA,
    ),
    "calibration": Calibration(
        model_digest=SHA, dataset_digest=SHA, num_images=100, clip_x_0=True, x_0_error=(0.001, 0.5)
    ),
    "sampling_spec": PLAIN_SPEC,
    "sampling_spec_of_jpegs": JPEG_SPEC,
    "sampling_spec_of_tick": TICK_SPEC,
    "tick": TickRecord(
        tick="2026-11-22T03:00Z",
        asked_model="models:/ddpm@champion",
        model_uri="models:/ddpm/1",
        asked_guide_model=None,
        guide_uri=None,
        seed=7,
        spec=TICK_SPEC,
        spec_digest=TICK_SPEC.digest,
        prefix=TICK_SPEC.digest[:16],
    ),
    "commit": CommitRecord(
        index=0,
        first_id=0,
        num_samples=7,
        key=TAR.key,
        size_bytes=10240,
        sha256=SHA,
        model_digest=SHA,
        spec_digest=SHA,
        made=Provenance(
            host="h", device="cpu", software="python 3, torch 2", started_at_utc="2026-11-27T00:00:00+00:00", wall_s=1.5
        ),
    ),
    "generation_manifest": GenerationManifest(
        spec=SPEC,
        spec_digest=SPEC.digest,
        model_uri="models:/ddpm/1",
        guide_uri=None,
        class_names=("cat", "dog"),
        num_images=7,
        parts=(PartRecord(key=f"_manifest/00000-00001-{SHA}.parquet"),),
    ),
    "plan": PlanRecord(spec_digest=SPEC.digest, shard_size=4, num_images=7),
    "removal": RemovalRecord(
        index=0,
        sequence=0,
        ids=(3, 5),
        reason="asked for",
        old_key=TAR.key,
        old_sha256=SHA,
        old_size_bytes=10240,
        key=TAR.key,
        sha256=SHA,
        size_bytes=8192,
        num_samples=5,
        removed_at_utc="2026-11-27T00:00:00+00:00",
    ),
    **COST_RECORDS,
    "evaluation": EvaluationRecord(
        model="models:/ddpm/1",
        model_digest=SHA,
        spec_digest=SHA,
        dataset_digest=SHA,
        num_images=7,
        figures={"frechet_pixels": Figure(model=0.18, real=0.14, gaussian=0.22)},
    ),
    "evaluation_with_errors": EvaluationRecord(
        model="models:/ddpm/1",
        model_digest=SHA,
        spec_digest=SHA,
        dataset_digest=SHA,
        num_images=7,
        figures={
            "frechet_pixels": Figure(
                model=0.24,
                real=0.22,
                gaussian=0.28,
                standard_error=0.01,
                real_standard_error=0.026,
                gaussian_standard_error=0.015,
                num_images=7,
                num_real_sets=5,
            )
        },
        warnings=("models:/ddpm/1 does not say what it was trained on",),
    ),
    "sampler_comparison_with_errors": SamplerComparison(
        model="models:/ddpm/1",
        model_digest=SHA,
        dataset_digest=SHA,
        num_images=7,
        wall_s=60.0,
        real_frechet_pixels=0.22,
        real_label_agreement=0.99,
        rows=(
            SamplerRow(
                sampler="heun",
                max_evaluations=10,
                num_evaluations=9,
                frechet_pixels=0.2,
                label_agreement=0.98,
                rms_to_reference=0.01,
                frechet_standard_error=0.01,
                agreement_standard_error=0.005,
                frechet_better_than=("ddim, eta 1",),
                agreement_better_than=("ddim, eta 0",),
            ),
        ),
        num_seeds=2,
        num_compared_images=7,
        num_real_sets=5,
        real_frechet_standard_error=0.026,
        real_agreement_standard_error=0.005,
        warnings=("models:/ddpm/1 does not say what it was trained on",),
    ),
    "bound_comparison_with_warnings": BoundComparison(
        model="models:/ddpm/2",
        baseline="models:/ddpm/1",
        dataset_digest=SHA,
        num_images=7,
        of_model={"bits_per_dim": ESTIMATE},
        of_baseline={"bits_per_dim": ESTIMATE},
        difference={"bits_per_dim": ESTIMATE},
        warnings=("models:/ddpm/1 does not say what it was trained on",),
    ),
    "ema_sweep_with_errors": EmaSweep(
        train="artifacts/train",
        checkpoint="artifacts/train/checkpoints/step-000000400-01234567",
        num_snapshots=16,
        num_images=7,
        rows=(
            EmaSweepRow(
                sigma_rel=0.05,
                residual=0.001,
                model_digest=SHA,
                figures={"eps_mse": 0.13},
                standard_errors={"eps_mse": 0.001},
            ),
        ),
        real={"frechet_pixels": 0.22},
        real_standard_errors={"frechet_pixels": 0.026},
        warnings=("models:/ddpm/1 does not say what it was trained on",),
    ),
    "calibration_with_warnings": Calibration(
        model_digest=SHA,
        dataset_digest=SHA,
        num_images=100,
        clip_x_0=True,
        x_0_error=(0.001, 0.5),
        warnings=("models:/ddpm/1 does not say what it was trained on",),
    ),
    "sampler_comparison": SamplerComparison(
        model="models:/ddpm/1",
        model_digest=SHA,
        dataset_digest=SHA,
        num_images=7,
        wall_s=60.0,
        real_frechet_pixels=0.14,
        real_label_agreement=0.99,
        rows=(
            SamplerRow(
                sampler="heun",
                max_evaluations=10,
                num_evaluations=9,
                frechet_pixels=0.2,
                label_agreement=0.98,
                rms_to_reference=0.01,
            ),
        ),
    ),
    "bound_comparison": BoundComparison(
        model="models:/ddpm/2",
        baseline="models:/ddpm/1",
        dataset_digest=SHA,
        num_images=7,
        of_model={"bits_per_dim": ESTIMATE},
        of_baseline={"bits_per_dim": ESTIMATE},
        difference={"bits_per_dim": ESTIMATE},
    ),
    "ema_sweep": EmaSweep(
        train="artifacts/train",
        checkpoint="artifacts/train/checkpoints/step-000000400-01234567",
        num_snapshots=16,
        num_images=7,
        rows=(EmaSweepRow(sigma_rel=0.05, residual=0.001, model_digest=SHA, figures={"eps_mse": 0.13}),),
    ),
}


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.v{RECORDS[name].format_version}.json"


@pytest.mark.parametrize("name", RECORDS)
def test_a_stored_sample_is_read(name: str) -> None:
    record = RECORDS[name]
    data = path_of(name).read_bytes()
    assert read_record(type(record), data, name, remedy="make it again") == record
    assert to_json(record) == data, "what is written now is what was written then"


def test_digests_are_golden() -> None:
    golden = json.loads((FOLDER / "digests.json").read_text())
    assert {name: digest(record) for name, record in RECORDS.items()} == golden


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize(("version", "advice"), [(1, "make it again"), (999, "update this program"), (None, "again")])
def test_another_version_is_refused_by_name(name: str, version: int | None, advice: str) -> None:
    tree = json.loads(path_of(name).read_bytes())
    del tree["format_version"]
    if version is not None:
        tree["format_version"] = version
    with pytest.raises(FormatVersionError, match=rf"^place/{name}: has .*format_version.*{advice}"):
        read_record(type(RECORDS[name]), json.dumps(tree).encode(), f"place/{name}", remedy="make it again")


OLDER = sorted(path for path in FOLDER.glob("*.v*.json") if path not in {path_of(name) for name in RECORDS})


@pytest.mark.parametrize("path", OLDER, ids=lambda path: path.stem)
def test_a_sample_of_an_older_version_is_refused_by_name(path: Path) -> None:
    name, _, version = path.stem.rpartition(".v")
    with pytest.raises(FormatVersionError, match=f"^{name}: has format_version {version}, .*make it again"):
        read_record(type(RECORDS[name]), path.read_bytes(), name, remedy="make it again")


def test_every_record_with_a_version_is_here() -> None:
    root = Path(__file__).parents[2]
    versioned = set[type]()
    for path in (root / "pipeline").rglob("*.py"):
        if "format_version: int" in path.read_text():
            module = importlib.import_module(".".join(path.relative_to(root).with_suffix("").parts))
            versioned |= {
                value
                for value in vars(module).values()
                if "format_version" in getattr(value, "__dataclass_fields__", {})
                and value.__module__ == module.__name__
            }
    assert versioned == {type(record) for record in RECORDS.values()}


@dataclass(frozen=True, kw_only=True)
class Nested:
    format_version: int = 2
    spec: SamplingSpec


def test_versions_inside_a_record_are_compared_too() -> None:
    tree = json.loads(to_json(Nested(spec=SPEC)))
    tree["spec"]["format_version"] = 1
    with pytest.raises(FormatVersionError, match="here: spec: has format_version 1"):
        read_record(Nested, json.dumps(tree).encode(), "here", remedy="make it again")


@pytest.mark.parametrize("name", RECORDS)
def test_damage_is_no_version(name: str) -> None:
    with pytest.raises(ConfigError):
        read_record(type(RECORDS[name]), path_of(name).read_bytes()[:-10], name, remedy="make it again")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for each in RECORDS:
        if not path_of(each).exists():
            path_of(each).write_bytes(to_json(RECORDS[each]))
    digests = {name: digest(record) for name, record in RECORDS.items()}
    (FOLDER / "digests.json").write_text(json.dumps(digests, indent=1, sort_keys=True) + "\n")
