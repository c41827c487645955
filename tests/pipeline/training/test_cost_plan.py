"""Memory, hours and money of a run, foretold."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ddpm import ModelConfig, build_network
from ddpm.networks.cost import cost_key, num_parameters
from ddpm.networks.memory import step_memory
from pipeline.config_io import to_json
from pipeline.data.data_order import DataConfig, DataOrder
from pipeline.errors import ConfigError
from pipeline.presets import PRESETS
from pipeline.stores.storage import open_store
from pipeline.training import cost_plan
from pipeline.training.checkpoints.ema_snapshots import PostHocEmaConfig
from pipeline.training.cost_plan import GPU_BENCHMARK, fixed_bytes, largest_within, memory_plan, time_plan
from pipeline.training.run_record import RUN_RECORD, RateRecord, RunRecord
from pipeline.training.train_config import (
    OptimizerConfig,
    RunIdentity,
    TrainConfig,
    WorkerConfig,
    data_order,
)
from tests.pipeline.training.small_runs import MODEL
from tests.pipeline.training.step_cases import make_task

GIB = 2**30


def config_of(workers: int = 2, **changes: Any) -> TrainConfig:
    of_workers = WorkerConfig(num_workers=workers, use_gpu=changes.pop("use_gpu", False))
    return make_task(**{"global_batch": 24, "data": DataConfig(lanes=4), "workers": of_workers} | changes).config


def order_of(config: TrainConfig) -> DataOrder:
    return data_order(config, make_task().manifest)


def test_the_parts_of_a_workers_memory() -> None:
    config = config_of(optimizer=OptimizerConfig(more_ema_halflives_images=(5, 6)))
    weights = 4 * num_parameters(MODEL)
    assert fixed_bytes(config, MODEL) == (1 + 1 + 2 + 3) * weights, "gradient, moments, three averages"
    tracked = PostHocEmaConfig(snapshot_interval_steps=10)
    assert fixed_bytes(dataclasses.replace(config, post_hoc_ema=tracked), MODEL) == (1 + 1 + 2 + 3 + 2) * weights
    ((name, text),) = memory_plan(config, MODEL, order_of(config))
    assert name == "memory" and text.endswith("for 12 images at once")
    ((_, text),) = memory_plan(config_of(3), MODEL, order_of(config))
    assert text.endswith("for 12 images at once"), "of the worker with two of four lanes"
    ((_, text),) = memory_plan(config_of(micro_batch=4), MODEL, order_of(config))
    assert text.endswith("for 4 images at once")


def test_memory_grows_by_the_same_for_each_image_which_is_what_the_largest_size_is_found_by() -> None:
    config = config_of()
    for size, smaller in ((48, 24), (12, 8), (4, 3)):
        needed = (fixed_bytes(config, MODEL) + step_memory(MODEL, size).peak) / 0.92
        assert largest_within(needed * 1.02, config, MODEL, 48) == size
        assert largest_within(needed * 0.98, config, MODEL, 48) == smaller
    assert largest_within(1000, config, MODEL, 12) is None


def test_bf16_and_checkpointing_take_less() -> None:
    unet = ModelConfig(image_size=(32, 32), channels=3)
    plain = step_memory(unet, 16).peak
    copies = 2 * num_parameters(unet)  # of the weights, in bf16, that autocast keeps during a pass
    assert step_memory(unet, 16, bf16=True).peak - copies < 0.6 * plain
    assert step_memory(unet, 16, gradient_checkpointing=True).peak < 0.4 * plain


def test_a_gpu_is_told_what_fits_and_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(use_gpu=True)
    (_, (name, text)) = memory_plan(config, MODEL, order_of(config))
    assert name == "of a GPU's"
    assert text == "24 GiB at most 12 at once, 40 GiB at most 12 at once, 80 GiB at most 12 at once"
    monkeypatch.setattr(cost_plan, "_GPU_SIZES_GIB", (0.0001, 24))
    (_, (_, text)) = memory_plan(config, MODEL, order_of(config))
    assert text.startswith("0.0001 GiB not even 1, 24 GiB at most 12 at once; --gradient-checkpointing or --prec")
    small = dataclasses.replace(config, gradient_checkpointing=True, precision="bf16")
    (_, (_, text)) = memory_plan(small, MODEL, order_of(config))
    assert text.endswith("; take a smaller network")


def test_a_machine_that_has_not_so_much_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of()
    most = fixed_bytes(config, MODEL) + step_memory(MODEL, 12).peak
    monkeypatch.setattr(cost_plan.psutil, "virtual_memory", lambda: SimpleNamespace(total=2 * most * 0.9))
    (_, (name, text)) = memory_plan(config, MODEL, order_of(config))
    assert name == "too much" and text.endswith("for 2 workers: --micro-batch 6 would fit")
    elsewhere = dataclasses.replace(config.cluster, address="10.0.0.1:6379")
    assert len(memory_plan(dataclasses.replace(config, cluster=elsewhere), MODEL, order_of(config))) == 1


def test_a_network_that_looks_at_values_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def looks(*_: Any, **__: Any) -> None:
        raise RuntimeError("a tensor without content")

    monkeypatch.setattr(cost_plan, "step_memory", looks)
    config = config_of()
    assert memory_plan(config, MODEL, order_of(config)) == [
        ("memory", "not foretold, since the network looks at values (RuntimeError)")
    ]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_fits_one_gpu_of_80_gib(name: str) -> None:
    train = PRESETS[name]().train
    size = PRESETS[name]().prepare.image_size
    of_images = (8, 8) if name.startswith("digits") else (int(str(size)), int(str(size)))
    model = ModelConfig(
        network=train.network,
        schedule=train.schedule,
        image_size=of_images,
        channels=1 if name.startswith("digits") else 3,
        num_classes=1000 if train.class_conditional else None,
    )
    at_once = largest_within(80 * GIB, train, model, train.global_batch)
    print(f"{name}: of {train.global_batch} images {at_once} at once")
    assert at_once is not None


@pytest.mark.gpu
@pytest.mark.parametrize("bf16", [False, True])
def test_what_is_foretold_is_near_what_a_gpu_counts(bf16: bool) -> None:
    model, device = ModelConfig(image_size=(32, 32), channels=3), torch.device("cuda")
    network = build_network(model).to(device).train()
    x_t, t = torch.zeros(32, 3, 32, 32, device=device), torch.zeros(32, dtype=torch.int64, device=device)
    for _ in range(2):  # the second has its gradients already
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            prediction = network(x_t, t, None)
        torch.autograd.backward(prediction.float().square().mean())
    measured = torch.cuda.max_memory_allocated() - before
    assert measured == pytest.approx(step_memory(model, 32, bf16=bf16).peak, rel=0.2)


# ---- hours and money


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def test_hours_and_money_follow_from_a_speed(here: Path) -> None:
    config = config_of(steps=3_600_000, throughput=240.0, price_per_device_hour=2.5, use_gpu=True)
    assert time_plan(config, MODEL) == [
        ("time", "about 100 h 00 min at 240 img/s, as given"),
        ("cost", "about 500.00, at 2.5 an hour for each of 2 devices"),
    ]
    (line,) = time_plan(config_of(), MODEL)
    assert line == ("time", "not known before it is measured; --throughput IMAGES_PER_S foretells it")


def test_the_speed_of_the_outputs_run_is_known(here: Path) -> None:
    config = config_of(steps=300, output=str(here / "run"))
    rate = RateRecord(images_per_s=20.0, num_workers=2)
    identity = RunIdentity.of(config, make_task().manifest)
    open_store(config.output).create(RUN_RECORD, to_json(RunRecord(run_id=None, identity=identity, rate=rate)))
    assert time_plan(config, MODEL)[0][1] == f"about 6 min 00 s at 20 img/s, as the run in {config.output} had"
    four = dataclasses.replace(config, workers=WorkerConfig(num_workers=4))
    assert time_plan(four, MODEL)[0][1].startswith("about 3 min 00 s at 40 img/s, as the run in ")
    assert time_plan(four, MODEL)[0][1].endswith(" had, with 2 workers, times 2")


def test_a_gpu_that_was_measured_is_known(here: Path) -> None:
    row = {
        "network": "ours", "cost_key": cost_key(MODEL), "precision": "bf16", "compile": False, "channels_last": False,
        "images_per_s_median": 50.0,
    }  # fmt: skip
    file = here / GPU_BENCHMARK
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"figures": [row | {"network": "diffusers", "images_per_s_median": 1.0}, row]}))
    config = config_of(use_gpu=True, precision="bf16", steps=100)
    assert time_plan(config, MODEL)[0][1] == f"about 24.0 s at 100 img/s, as one GPU had in {GPU_BENCHMARK}, times 2"
    for other in (dataclasses.replace(config, precision="tf32"), config_of(precision="bf16")):
        assert "not known" in time_plan(other, MODEL)[0][1], "another mode; no GPU"
    file.write_text('{"figures": [{"network": "ours"}]}')
    with pytest.raises(ConfigError, match=rf"^{GPU_BENCHMARK}: not what jobs/benchmark.py gpu writes \('cost_key'\); "):
        time_plan(config, MODEL)
