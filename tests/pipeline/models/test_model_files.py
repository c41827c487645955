"""Model files: equal bytes for equal models, nothing damaged gets through, nothing is unpickled."""

import dataclasses
import hashlib
import io
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ddpm import DiffusionModel, DiTConfig, ModelConfig, ScheduleConfig, UNetConfig, build_network
from pipeline.errors import CheckpointError, FormatVersionError, ModelMissingError
from pipeline.models.model_files import (
    MODEL_JSON,
    SOURCE_JSON,
    WEIGHTS,
    ModelCard,
    ModelFiles,
    encode_model,
    load_model,
    pack_model,
    read_card,
    read_model_files,
)
from pipeline.stores.storage import open_store

_UNET = UNetConfig(base_channels=8, channel_multipliers=(1,), num_res_blocks=1, attention_resolutions=(), num_groups=4)
CONFIG = ModelConfig(
    network=_UNET, schedule=ScheduleConfig(name="cosine"), image_size=(8, 8), channels=1, num_classes=3
)
CARD = ModelCard(config=CONFIG, class_names=("a", "b", "c"), dataset_digest="d" * 64, train_step=7)
SOURCE = b'{"nets.py":"x = 1\\n"}\n'


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return build_network(CONFIG, seed=3)


@pytest.fixture(scope="module")
def files(network: nn.Module) -> ModelFiles:
    return encode_model(CARD, network.state_dict(), None)


def test_round_trip_is_bit_exact(network: nn.Module, files: ModelFiles) -> None:
    card, loaded = load_model(files)
    assert (card.config, card.class_names, card.train_step) == (CONFIG, CARD.class_names, 7)
    assert isinstance(loaded.network, nn.Module) and not loaded.network.training
    x_t, t, label = torch.randn(2, 1, 8, 8), torch.tensor([0, 999]), torch.tensor([0, 2])
    network.eval()
    assert torch.equal(loaded.network(x_t, t, label), network(x_t, t, label))


def test_a_model_is_what_its_card_says() -> None:
    """Everything that a sampler has to know beside the weights comes from the card."""
    config = ModelConfig(
        network=dataclasses.replace(_UNET, prediction_type="v", learned_variance=True),
        schedule=ScheduleConfig(name="linear", num_timesteps=30),
        image_size=(8, 16),
        channels=3,
        num_levels=65_536,
        num_classes=5,
    )
    card, loaded = load_model(encode_model(ModelCard(config=config), build_network(config).state_dict(), None))
    expected = DiffusionModel.of(config, loaded.network)
    assert card.config == config
    for name in ("image_shape", "prediction_type", "learned_variance", "null_label", "num_levels", "variance"):
        assert getattr(loaded, name) == getattr(expected, name), name
    assert (loaded.image_shape, loaded.null_label, loaded.num_levels) == ((3, 8, 16), 5, 65_536)
    assert torch.equal(loaded.schedule.alpha_bar, expected.schedule.alpha_bar)


def test_equal_models_have_equal_bytes_whatever_the_order_of_their_tensors(
    network: nn.Module, files: ModelFiles
) -> None:
    reversed_order = dict(reversed(list(network.state_dict().items())))
    assert encode_model(CARD, reversed_order, None) == files


def test_digest_is_over_names_lengths_and_contents(network: nn.Module) -> None:
    files = encode_model(CARD, network.state_dict(), SOURCE)
    text = b""
    for name, data in (
        (b"model.json", files.card_json),
        (b"weights.safetensors", files.weights),
        (b"source.json", SOURCE),
    ):
        text += name + b"\0" + str(len(data)).encode() + b"\0" + data
    assert files.digest == hashlib.sha256(text).hexdigest()
    moved = ModelFiles(card_json=files.card_json + files.weights[:1], weights=files.weights[1:], source=SOURCE)
    assert moved.digest != files.digest, "the same bytes, cut elsewhere, are another model"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_changed_byte_gets_through(data: st.DataObject) -> None:
    files = encode_model(CARD, {"w": torch.arange(6.0)}, SOURCE)
    name = data.draw(st.sampled_from([MODEL_JSON, WEIGHTS, SOURCE_JSON]))
    content = bytearray(files.as_dict()[name])
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    field = {MODEL_JSON: "card_json", WEIGHTS: "weights", SOURCE_JSON: "source"}[name]
    damaged = dataclasses.replace(files, **{field: bytes(content)})
    assert damaged.digest != files.digest
    if name == MODEL_JSON:  # a card with another class name is a valid card: the digest is what tells
        return
    with pytest.raises(CheckpointError, match=name):
        read_card(damaged)


@pytest.mark.parametrize("length", [0, 1, 8, -1])
def test_weights_cut_short_are_refused(files: ModelFiles, length: int) -> None:
    with pytest.raises(CheckpointError, match=r"weights.safetensors .* sha256 differs"):
        load_model(dataclasses.replace(files, weights=files.weights[:length]))


@pytest.mark.parametrize(
    "card_json", [b"", b"{", b"[]", b'{"format_version":2}', b"\xff\xfe", b'{"format_version":2,"x":2}']
)
def test_a_card_that_is_none_is_refused_in_one_line(files: ModelFiles, card_json: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"s3://b/c/model\.json") as caught:
        read_card(dataclasses.replace(files, card_json=card_json), "s3://b/c")
    assert "\n" not in str(caught.value)


def test_a_dit_is_stored_and_loaded() -> None:
    dit = DiTConfig(hidden_size=16, depth=1, num_heads=2, learned_variance=True)
    config = dataclasses.replace(CONFIG, network=dit)
    network = build_network(config, seed=3).eval()
    torch.nn.init.normal_(network.get_parameter("final.projection.weight"))
    card, loaded = load_model(encode_model(ModelCard(config=config), network.state_dict(), None))
    x_t, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    answer = loaded.network(x_t, t, None)
    assert card.config == config and torch.equal(answer, network(x_t, t)) and answer.any()


@pytest.mark.parametrize(("version", "advice"), [(1, "train the model again"), (3, "update this program")])
def test_another_version_is_refused_by_its_number(files: ModelFiles, version: int, advice: str) -> None:
    other = files.card_json.replace(b'"format_version":2', b'"format_version":%d' % version)
    assert other != files.card_json
    with pytest.raises(
        FormatVersionError, match=rf"^m/model\.json: has format_version {version}, .* reads 2; {advice}"
    ):
        read_card(dataclasses.replace(files, card_json=other), "m")


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    proof = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (proof,))

    pickled = pickle.dumps(Bomb())
    archive = io.BytesIO()
    torch.save({"w": torch.zeros(1), "bomb": Bomb()}, archive)
    for weights in (pickled, archive.getvalue()):
        with pytest.raises(CheckpointError, match="do not fit"):
            load_model(pack_model(CARD, weights, None))
    assert not proof.exists()


def test_weights_of_another_network_are_refused(network: nn.Module) -> None:
    other = dataclasses.replace(CONFIG, num_classes=5)
    with pytest.raises(CheckpointError, match="do not fit the network 'unet'") as caught:
        load_model(encode_model(ModelCard(config=other), network.state_dict(), None))
    assert "\n" not in str(caught.value)


def test_tied_weights_are_kept() -> None:
    first = nn.Linear(4, 4, bias=False)
    second = nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    tied = nn.Sequential(first, second)
    files = encode_model(CARD, tied.state_dict(), None)
    assert read_card(files).weights_sha256 == hashlib.sha256(files.weights).hexdigest()


def test_class_names_must_fit_the_classes() -> None:
    with pytest.raises(ValueError, match="class_names: one per class, got 2 names for 3 classes"):
        ModelCard(config=CONFIG, class_names=("a", "b"))


def test_files_travel_between_processes(files: ModelFiles) -> None:
    assert pickle.loads(pickle.dumps(files)) == files  # noqa: S301 - what Ray does


@pytest.mark.parametrize("prefix", ["", "step-000000007-ab", "deep/er/"])
def test_read_from_a_store(network: nn.Module, tmp_path: Path, prefix: str) -> None:
    store = open_store(str(tmp_path))
    files = encode_model(CARD, network.state_dict(), SOURCE)
    for name, content in {**files.as_dict(), "optimizer.safetensors": b"not ours"}.items():
        store.write(f"{prefix.strip('/')}/{name}".lstrip("/"), content)
    assert read_model_files(store, prefix) == files


@pytest.mark.parametrize(
    ("missing", "error"), [(MODEL_JSON, ModelMissingError), (WEIGHTS, CheckpointError), (SOURCE_JSON, CheckpointError)]
)
def test_a_missing_file_is_named(network: nn.Module, tmp_path: Path, missing: str, error: type[Exception]) -> None:
    store = open_store(str(tmp_path))
    for name, content in encode_model(CARD, network.state_dict(), SOURCE).as_dict().items():
        if name != missing:
            store.write(f"step-1/{name}", content)
    with pytest.raises(error, match=f"step-1.*{missing}") as caught:
        read_model_files(store, "step-1")
    assert "\n" not in str(caught.value)
