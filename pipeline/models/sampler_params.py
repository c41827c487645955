"""The parameters of a registered model: every option of every sampler, flat, as MLflow wants them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

from ddpm import DDIM, SAMPLERS, Sampler

DEFAULT_SAMPLER = DDIM()
"""What makes the images if nothing is asked for."""


def sampler_options() -> dict[str, Any]:
    """Defaults of all options by name, those that all samplers share first; None where an option is off."""
    options: dict[str, Any] = {}
    for kind in (type(DEFAULT_SAMPLER), *SAMPLERS.values()):
        for field in dataclasses.fields(kind):
            if field.name != "name":
                options.setdefault(field.name, field.default)
    return options


def is_interval(name: str) -> bool:
    """Whether an option is a pair of numbers."""
    kind = next(kind for kind in SAMPLERS.values() if name in kind.__dataclass_fields__)
    hint = get_type_hints(kind)[name]
    return tuple in {getattr(option, "__origin__", None) for option in (hint, *get_args(hint))}


def sampler_of_params(values: Mapping[str, Any]) -> Sampler:
    """The sampler that parameters name.

    Args:
        values: `sampler`, the name, and options by name; what is left out has its default. MLflow fills in all
            defaults, so that an option of another sampler may be there as long as it has its own.

    Raises:
        ValueError: If the sampler or an option is unknown, or an option belongs to another sampler.
    """
    values = dict(values)
    name = values.pop("sampler", DEFAULT_SAMPLER.name)
    if name not in SAMPLERS:
        raise ValueError(f"sampler: must be {' or '.join(SAMPLERS)}, got {name!r}; choose one of them")
    defaults, own = sampler_options(), SAMPLERS[name].__dataclass_fields__
    options = {}
    for option, value in values.items():
        if option not in defaults:
            raise ValueError(f"{option}: is no parameter of this model, got {value!r}; leave it out")
        if is_interval(option):
            value = _interval(option, value)
        if option in own:
            options[option] = value
        elif value != defaults[option]:
            raise ValueError(f"{option}: is no option of {name}, got {value!r}; leave it out or choose another sampler")
    return SAMPLERS[name](**options)


def _interval(name: str, value: Any) -> tuple[float, float] | None:
    numbers = [float(number) for number in value]
    if not numbers and sampler_options()[name] is None:
        return None
    if len(numbers) != 2:
        raise ValueError(f"{name}: must be two numbers, got {numbers}; give the ends of an interval")
    return numbers[0], numbers[1]
