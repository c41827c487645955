"""The package's public names."""

import types

import ddpm


def test_all_is_sorted_and_is_exactly_what_is_public() -> None:
    constants_then_classes = sorted(ddpm.__all__, key=lambda name: (not name.isupper(), name[0].islower(), name))
    assert ddpm.__all__ == constants_then_classes  # the order that ruff keeps; DDIM looks like a constant to it
    public = {
        name
        for name, value in vars(ddpm).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert set(ddpm.__all__) == public


def test_every_public_name_is_documented() -> None:
    aliases = {"Network", "PredictionType", "Spacing", "Variance"}  # Callable and Literal types carry no docstring
    assert [name for name in ddpm.__all__ if name not in aliases and not getattr(ddpm, name).__doc__] == []
