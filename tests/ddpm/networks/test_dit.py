"""The DiT against the paper's figures, against diffusers' own, and piece by piece."""

import dataclasses
import math
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from ddpm import DiT, DiTConfig, ModelConfig, count_parameters, flops_per_image
from ddpm.networks.dit import grid_size
from ddpm.networks.dit_layers import SelfAttention, position_embedding
from ddpm.networks.layers import sinusoidal_embedding
from ddpm.networks.model_config import construct

DiTTransformer2DModel: Any = diffusers.DiTTransformer2DModel  # its constructor is not typed
SMALL = DiTConfig(patch_size=2, hidden_size=24, depth=2, num_heads=3, mlp_ratio=2.5)

# Peebles & Xie 2023, tables 1 and 4, patches of 2: million parameters and Gflops, a multiplication and an addition one.
PUBLISHED = {
    "S/2": (DiTConfig(hidden_size=384, depth=12, num_heads=6), 33, 6.06),
    "B/2": (DiTConfig(hidden_size=768, depth=12, num_heads=12), 130, 23.01),
    "L/2": (DiTConfig(hidden_size=1024, depth=24, num_heads=16), 458, 80.71),
    "XL/2": (DiTConfig(hidden_size=1152, depth=28, num_heads=16), 675, 118.64),
}


def latents(config: DiTConfig) -> ModelConfig:
    """What the paper's figures are for: 32x32x4 latents, 1000 classes, a learned variance."""
    network = dataclasses.replace(config, learned_variance=True)
    return ModelConfig(network=network, image_size=(32, 32), channels=4, num_classes=1000)


def small_dit(num_classes: int | None = None, *, num_timesteps: int = 1000, **changes: Any) -> DiT:
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, **changes)
    return DiT(config, image_size=(8, 8), channels=3, num_classes=num_classes, num_timesteps=num_timesteps)


def on_meta(config: ModelConfig) -> DiT:
    with torch.device("meta"):
        network = construct(config)
    assert isinstance(network, DiT)
    return network


def randomise(net: nn.Module) -> None:
    """Weights with which every layer matters: no zeros."""
    torch.manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2)


def train(net: DiT, num_steps: int, num_classes: int | None = None) -> None:
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for step in range(num_steps + 1):
        x_t, eps = torch.randn(2, 6, 3, 8, 8, generator=generator)
        t = torch.randint(1000, (6,), generator=generator)
        label = None if num_classes is None else torch.arange(6) % (num_classes + 1)
        optimizer.zero_grad()
        (net(x_t, t, label) - eps).square().mean().backward()
        if step < num_steps:
            optimizer.step()


# --- the paper's figures ----------------------------------------------------------------------------------------------


def layer(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def parameters_from_the_paper(width: int, depth: int) -> int:
    """Counted off figure 3 and section 3.2, for patches of 2 of 4 channels, 8 of them out, and 1000 classes and one."""
    block = 4 * layer(width, width)  # query, key, value, projection
    block += layer(width, 4 * width) + layer(4 * width, width)  # pointwise feedforward
    block += layer(width, 6 * width)  # two each of shift, scale and gate
    final = layer(width, 2 * width) + layer(width, 2 * 2 * 8)
    conditioning = layer(256, width) + layer(width, width) + 1001 * width
    return layer(2 * 2 * 4, width) + conditioning + depth * block + final


def multiply_adds_from_the_paper(width: int, depth: int) -> int:
    """For 256 tokens; what depends on timestep and class alone is done once."""
    tokens = 256
    block = tokens * 12 * width**2 + 2 * tokens**2 * width + 6 * width**2
    final = 2 * width**2 + tokens * width * 32
    return tokens * 16 * width + 256 * width + width**2 + depth * block + final


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_papers_parameters_and_gflops(name: str) -> None:
    dit, published_millions, published_gflops = PUBLISHED[name]
    config = latents(dit)
    parameters, multiply_adds = count_parameters(on_meta(config)), flops_per_image(config) // 2
    print(f"DiT-{name}: {parameters:,} parameters (published {published_millions} M), {multiply_adds / 1e9:.3f} Gflops")
    assert parameters == parameters_from_the_paper(dit.hidden_size, dit.depth)
    assert round(parameters / 1e6) == published_millions
    assert flops_per_image(config) == 2 * multiply_adds_from_the_paper(dit.hidden_size, dit.depth)
    # The paper's counter adds one operation per entry of each layer norm; the rest agrees to its last digit.
    norms = (2 * dit.depth + 1) * 256 * dit.hidden_size
    assert round((multiply_adds + norms) / 1e9, 2) == published_gflops
    assert multiply_adds / 1e9 == pytest.approx(published_gflops, rel=1e-3)


# --- diffusers --------------------------------------------------------------------------------------------------------


def diffusers_weights(net: DiT) -> dict[str, Tensor]:
    """Our weights under the names, and in the order of channels, of diffusers' DiT."""
    width, patch = net.final.projection.in_features, net.patch_size
    ours = net.state_dict()
    first = ours["time_embedding.linear_1.weight"]
    cosines_first = torch.cat([first[:, 128:], first[:, :128]], dim=1)
    embedder = {
        "timestep_embedder.linear_1.weight": cosines_first,
        "timestep_embedder.linear_1.bias": ours["time_embedding.linear_1.bias"],
        "timestep_embedder.linear_2.weight": ours["time_embedding.linear_2.weight"],
        "timestep_embedder.linear_2.bias": ours["time_embedding.linear_2.bias"],
        "class_embedder.embedding_table.weight": ours["label_embedding.weight"],
    }
    patches = ours["patch_embedding.weight"]
    theirs = {
        "pos_embed.proj.weight": patches.reshape(width, -1, patch, patch),
        "pos_embed.proj.bias": ours["patch_embedding.bias"],
        "proj_out_1.weight": ours["final.emb_projection.weight"],
        "proj_out_1.bias": ours["final.emb_projection.bias"],
    }
    for kind in ("weight", "bias"):  # channels last there, first here
        rows = ours[f"final.projection.{kind}"].unflatten(0, (-1, patch, patch))
        theirs[f"proj_out_2.{kind}"] = rows.movedim(0, 2).flatten(0, 2)
    names = {
        "emb_projection": "norm1.linear",
        "attention.query": "attn1.to_q",
        "attention.key": "attn1.to_k",
        "attention.value": "attn1.to_v",
        "attention.projection": "attn1.to_out.0",
        "mlp_1": "ff.net.0.proj",
        "mlp_2": "ff.net.2",
    }
    for index in range(len(net.blocks)):
        prefix = f"transformer_blocks.{index}."
        theirs |= {f"{prefix}norm1.emb.{name}": tensor for name, tensor in embedder.items()}
        for our_name, their_name in names.items():
            for kind in ("weight", "bias"):
                theirs[f"{prefix}{their_name}.{kind}"] = ours[f"blocks.{index}.{our_name}.{kind}"]
    return theirs


def diffusers_dit(config: ModelConfig) -> Any:
    dit = config.network
    assert isinstance(dit, DiTConfig)
    return DiTTransformer2DModel(
        num_attention_heads=dit.num_heads,
        attention_head_dim=dit.hidden_size // dit.num_heads,
        in_channels=config.channels,
        out_channels=config.channels * (2 if dit.learned_variance else 1),
        num_layers=dit.depth,
        sample_size=config.image_size[0],
        patch_size=dit.patch_size,
        num_embeds_ada_norm=config.num_classes,
        norm_eps=1e-6,  # of the second norm; the first has it anyway
    )


@pytest.mark.parametrize("learned_variance", [False, True])
@pytest.mark.parametrize("patch_size", [2, 4])
def test_outputs_equal_diffusers(patch_size: int, learned_variance: bool) -> None:
    dit = DiTConfig(patch_size=patch_size, hidden_size=48, depth=3, num_heads=4, learned_variance=learned_variance)
    config = ModelConfig(network=dit, image_size=(16, 16), channels=3, num_classes=10)
    net = DiT(dit, image_size=(16, 16), channels=3, num_classes=10).eval()
    randomise(net)
    oracle = diffusers_dit(config).eval()
    oracle.load_state_dict(diffusers_weights(net), strict=True)
    x_t = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    t, label = torch.tensor([0, 1, 250, 500, 999]), torch.tensor([0, 3, 9, 10, 5])  # 10 is the null label
    with torch.no_grad():
        ours = net(x_t, t, label)
        theirs = oracle(x_t, timestep=t, class_labels=label).sample
    assert ours.std() > 0.3  # a network of zeros would agree as well
    assert (ours - theirs).abs().max() <= 1e-5
    assert not torch.allclose(ours, net(x_t, t, label.flip(0)), atol=1e-3)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_the_published_networks_equal_diffusers(name: str) -> None:
    """Theirs repeats the embedder of timestep and class in every block, as copies that are trained together."""
    config = latents(PUBLISHED[name][0])
    net = on_meta(config)
    with torch.device("meta"):
        oracle = diffusers_dit(config)
    shapes = {key: tensor.shape for key, tensor in diffusers_weights(net).items()}
    assert shapes == {key: tensor.shape for key, tensor in oracle.state_dict().items()}
    repeated = sum(tensor.numel() for key, tensor in oracle.state_dict().items() if ".norm1.emb." in key)
    depth = PUBLISHED[name][0].depth
    assert count_parameters(net) == count_parameters(oracle) - repeated // depth * (depth - 1)


# --- the network ------------------------------------------------------------------------------------------------------


def test_first_prediction_is_zero_and_every_block_the_identity() -> None:
    net = small_dit(num_classes=3)
    x_t = torch.randn(2, 3, 8, 8)
    assert torch.equal(net(x_t, torch.tensor([3, 700])), torch.zeros_like(x_t))
    tokens = torch.randn(2, 16, 24)
    for block in net.blocks:
        assert torch.equal(block(tokens, torch.randn(2, 24)), tokens)


def test_initial_weights() -> None:
    net = DiT(DiTConfig(hidden_size=96, depth=1, num_heads=4), image_size=(8, 8), channels=3, num_classes=50)
    for name, parameter in net.state_dict().items():
        if name.endswith("bias") or "emb_projection" in name or name == "final.projection.weight":
            assert not parameter.any(), name
        elif name.startswith(("time_embedding", "label_embedding")):
            assert parameter.std() == pytest.approx(0.02, rel=0.1), name
        else:
            # The authors have query, key and value in one matrix, three times as high.
            fused = 3 if name.split(".")[-2] in ("query", "key", "value") else 1
            fans = fused * parameter.shape[0] + parameter.shape[1]
            assert parameter.abs().max() <= math.sqrt(6 / fans), name
            assert parameter.std() == pytest.approx(math.sqrt(2 / fans), rel=0.05), name


def test_query_key_and_value_start_as_a_fused_matrix_does() -> None:
    """Their variance beside that of the matrix that the authors draw: equal, where it was twice as much."""
    torch.manual_seed(0)
    attention = SelfAttention(96, num_heads=4)
    fused = nn.init.xavier_uniform_(torch.empty(3 * 96, 96))
    ours = torch.cat([attention.query.weight, attention.key.weight, attention.value.weight]).detach()
    assert ours.var().item() / fused.var().item() == pytest.approx(1, abs=0.04)  # six sigma of 27,648 entries
    assert ours.abs().max().item() == pytest.approx(fused.abs().max().item(), rel=1e-3)


def test_the_authors_frequencies_of_t_where_asked() -> None:
    net, authors = small_dit(), small_dit(embedding_divisor="half")
    t = torch.tensor([1, 500])
    for one, divisor in ((net, "half_minus_1"), (authors, "half")):
        sines = sinusoidal_embedding(t, 256, divisor)
        expected = one.time_embedding.linear_2(nn.functional.silu(one.time_embedding.linear_1(sines)))
        torch.testing.assert_close(one.time_embedding(t), expected)
    assert not torch.equal(net.time_embedding(t), authors.time_embedding(t))
    with pytest.raises(ValueError, match=r"^embedding_divisor: must be half_minus_1 or half, got 'full'"):
        DiTConfig(embedding_divisor="full")  # type: ignore[arg-type]


def test_gradient_reaches_every_parameter_once_the_zeros_are_gone() -> None:
    net = small_dit(num_classes=3)
    train(net, 3, num_classes=3)
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        if name.endswith("key.bias"):  # adds the same to all logits of a query: softmax does not see it
            assert parameter.grad.abs().max() < 1e-6, name
        else:
            assert parameter.grad.abs().max() > 1e-7, name


def test_labels_and_t_act_after_training_and_none_is_the_null_label() -> None:
    net = small_dit(num_classes=3)
    train(net, 3, num_classes=3)
    x_t, t = torch.randn(1, 3, 8, 8).expand(4, -1, -1, -1), torch.full((4,), 500)
    with torch.no_grad():
        eps_hat, without, later = net(x_t, t, torch.arange(4)), net(x_t, t), net(x_t, t + 1)
    for first in range(4):
        for second in range(first):
            assert (eps_hat[first] - eps_hat[second]).abs().max() > 1e-4
    torch.testing.assert_close(without, eps_hat[3:].expand_as(without), rtol=0, atol=1e-6)
    assert (without - later).abs().max() > 1e-5
    assert net.null_label == 3 and small_dit().null_label is None
    assert not [name for name in small_dit().state_dict() if "label" in name]


def test_the_embedding_of_t_is_scaled_with_the_length_of_the_chain() -> None:
    long, short = small_dit(), small_dit(num_timesteps=250)
    train(long, 3)
    short.load_state_dict(long.state_dict())
    x_t, t = torch.randn(3, 3, 8, 8), torch.tensor([0, 70, 249])
    assert torch.equal(short(x_t, t), long(x_t, 4 * t))
    assert not torch.equal(short(x_t, t), long(x_t, t))
    assert torch.equal(long(x_t, t.double()), long(x_t, t))
    between = long(x_t, t.double() + 0.5)
    assert not torch.equal(between, long(x_t, t)) and not torch.equal(between, long(x_t, t + 1))


def test_a_learned_variance_takes_as_many_channels_again_and_comes_second() -> None:
    net = small_dit(learned_variance=True)
    with torch.no_grad():
        net.final.projection.bias[: 3 * 4] = 1.0  # three channels of 2x2 pixels
    out = net(torch.randn(2, 3, 8, 8), torch.tensor([3, 700]))
    assert out.shape == (2, 6, 8, 8)
    assert torch.equal(out[:, :3], torch.ones(2, 3, 8, 8)) and not out[:, 3:].any()


def test_places_matter() -> None:
    """Without their embedding, permuted patches would give permuted predictions."""
    net = small_dit()
    randomise(net)
    x_t, t = torch.randn(1, 3, 8, 8), torch.tensor([10])
    turned = torch.roll(x_t, 2, dims=3)  # by one patch
    with torch.no_grad():
        assert (torch.roll(net(x_t, t), 2, dims=3) - net(turned, t)).abs().max() > 1e-2
        net.position_embedding.zero_()
        torch.testing.assert_close(torch.roll(net(x_t, t), 2, dims=3), net(turned, t), rtol=0, atol=1e-5)
    assert "position_embedding" not in net.state_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x_t": torch.zeros(2, 3, 8, 4)}, r"^x_t: must be \[B, 3, 8, 8\], got \[2, 3, 8, 4\]"),
        ({"t": torch.zeros(3, dtype=torch.int64)}, r"^t: must be \[B\] with B = 2, got \[3\]"),
        ({"label": torch.tensor([0, 4])}, r"^label: must be in \[0, 3\] \(3 is the null label\), got 4"),
    ],
)
def test_wrong_inputs_are_named(arguments: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"x_t": torch.zeros(2, 3, 8, 8), "t": torch.zeros(2, dtype=torch.int64), "label": None}
    with pytest.raises(ValueError, match=message):
        small_dit(num_classes=3)(**{**good, **arguments})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_size": 0}, r"^patch_size: must be at least 1, got 0"),
        ({"depth": 0}, r"^depth: must be at least 1, got 0"),
        ({"hidden_size": 0}, r"^hidden_size: must be at least 1, got 0"),
        ({"hidden_size": 390}, r"^hidden_size: must be a multiple of 4 .*, got 390"),
        ({"num_heads": 0}, r"^num_heads: must be at least 1, got 0"),
        ({"num_heads": 5}, r"^num_heads: must divide hidden_size \(384\), got 5"),
        ({"mlp_ratio": 0.0}, r"^mlp_ratio: must leave a hidden layer of at least 1, got 0.0"),
        ({"mlp_ratio": math.inf}, r"^mlp_ratio: "),
        ({"mlp_ratio": math.nan}, r"^mlp_ratio: "),
    ],
)
def test_impossible_configs_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiTConfig(**fields)


def test_patches_must_fill_the_image() -> None:
    assert grid_size(DiTConfig(patch_size=4), (64, 64)) == (16, 16)
    assert grid_size(DiTConfig(patch_size=4), (24, 40)) == (6, 10)
    for image_size, side in (((0, 64), 0), ((30, 64), 30), ((64, 30), 30), ((24, 42), 42)):
        with pytest.raises(
            ValueError, match=rf"^image_size: must be a multiple of network.patch_size \(4\), got {side}; "
        ):
            grid_size(DiTConfig(patch_size=4), image_size)
        with pytest.raises(ValueError, match=rf"^image_size: .* got {side}; "):
            DiTConfig(patch_size=4).check_fits(image_size)


# --- rectangles -------------------------------------------------------------------------------------------------------


def turned(net: DiT) -> DiT:
    """The network that does with rows what this one does with columns: its patches and their places turned."""
    channels, height, width = net.image_shape
    patch, other = net.patch_size, DiT(SMALL, image_size=(width, height), channels=channels, num_classes=None)
    state = net.state_dict()
    entries = state["patch_embedding.weight"].unflatten(1, (channels, patch, patch))
    state["patch_embedding.weight"] = entries.mT.flatten(1)
    for kind in ("weight", "bias"):
        rows = state[f"final.projection.{kind}"].unflatten(0, (channels, patch, patch))
        state[f"final.projection.{kind}"] = rows.transpose(1, 2).flatten(0, 2)
    other.load_state_dict(state)
    down, across = net.grid
    other.position_embedding.copy_(net.position_embedding.unflatten(0, (down, across)).transpose(0, 1).flatten(0, 1))
    return other


def test_rectangles() -> None:
    """Rows and columns are treated alike, and are not confused, though there are as many patches either way."""
    net = DiT(SMALL, image_size=(24, 40), channels=3, num_classes=None).eval()
    randomise(net)
    assert net.grid == (12, 20) and net.image_shape == (3, 24, 40)
    assert torch.equal(net.position_embedding, position_embedding((12, 20), 24))
    # Of turned images it has the same halves, the other one first.
    assert torch.equal(turned(net).position_embedding.roll(12, dims=1), position_embedding((20, 12), 24))
    x_t, t = torch.randn(2, 3, 24, 40), torch.tensor([10, 700])
    with torch.no_grad():
        expected = net(x_t, t)
        assert expected.shape == (2, 3, 24, 40) and expected.std() > 0.3
        torch.testing.assert_close(turned(net)(x_t.mT, t).mT, expected, rtol=0, atol=1e-5)
        upright = DiT(SMALL, image_size=(40, 24), channels=3, num_classes=None).eval()
        upright.load_state_dict(net.state_dict())  # nothing in it is of a size
        assert (upright(x_t.mT, t).mT - expected).abs().max() > 0.1
    with pytest.raises(ValueError, match=r"^x_t: must be \[B, 3, 24, 40\], got \[2, 3, 40, 24\]"):
        net(x_t.mT, t)
