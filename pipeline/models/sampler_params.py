"""The parameters of a registered model: every option of every sampler, flat, as MLflow wants them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

from ddpm import DDIM, SAMPLERS, Sampler

DEFAULT_SAMPLER = DDIM()
"""What makes the images if nothing is asked for."""
TRUST = "trust_model_code"
"""Key of the pyfunc's model_config: whether the code of a network of one's own may run."""


def sampler_options() -> dict[str, Any]:
    """Defaults of all options by name, those that all samplers share first; None where an option is off.

    Raises:
        ValueError: If two samplers have different defaults for one name.
    """
    options: dict[str, Any] = {}
    for kind in (type(DEFAULT_SAMPLER), *SAMPLERS.values()):
        for field in dataclasses.fields(kind):
            if field.name != "name" and options.setdefault(field.name, field.default) != field.default:
                raise ValueError(
                    f"{field.name}: must have one default in all samplers, got {field.default} in {kind.__name__}; "
                    "MLflow knows parameters by name alone"
                )
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
    options: dict[str, Any] = {}
    for option, value in values.items():
        if option not in defaults:
            raise ValueError(f"{option}: is no parameter of this model, got {value!r}; leave it out")
        if is_interval(option):
            value = tuple(value) or None
        if option in own:
            options[option] = _interval(option, value) if is_interval(option) else value
        elif value != defaults[option]:
            raise ValueError(f"{option}: is no option of {name}, got {value!r}; leave it out or choose another sampler")
    return SAMPLERS[name](**options)


def _interval(name: str, value: tuple[float, ...] | None) -> tuple[float, float] | None:
    if value is None and sampler_options()[name] is None:
        return None
    if value is None or len(value) != 2:
        raise ValueError(f"{name}: must be two numbers, got {value}; give the ends of an interval")
    return float(value[0]), float(value[1])
