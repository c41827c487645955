"""Line charts as PNG bytes. The only module that knows matplotlib; it keeps none of its global state."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field

from matplotlib.figure import Figure

_PANEL_INCHES, _HEIGHT_INCHES, _DPI = 5.4, 4.2, 110
_COLOURS, _DASHES = 10, ("-", "--", ":")


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line."""

    label: str
    """What stands in the legend."""
    x: Sequence[float]
    """Abscissae [N]."""
    y: Sequence[float]
    """Ordinates [N]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """Lines over one pair of axes."""

    title: str
    """What stands above it."""
    lines: Sequence[Line]
    """The lines; those without points are left out."""
    log_y: bool = False
    """Logarithmic ordinate, if anything is above 0."""
    limits_y: tuple[float, float] | None = None
    """Ends of the ordinate; None for those that fit the lines."""
    levels: dict[str, float] = field(default_factory=dict)
    """Horizontal lines to compare with, by name."""


def line_charts(panels: Sequence[Panel], *, x_label: str, log_x: bool = False, markers: bool = False) -> bytes:
    """Panels side by side over the same abscissa; equal arguments give equal bytes.

    Args:
        panels: At least one; lines with the same label look the same in all.
        x_label: What the abscissa is.
        log_x: Logarithmic abscissa.
        markers: Mark each point.

    Returns:
        A PNG.
    """
    figure = Figure(figsize=(_PANEL_INCHES * len(panels), _HEIGHT_INCHES), layout="constrained")
    labels = list(dict.fromkeys(line.label for panel in panels for line in panel.lines))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, panel in zip(axes, panels, strict=True):
        for line in panel.lines:
            if len(line.x):
                order = labels.index(line.label)
                ax.plot(
                    line.x,
                    line.y,
                    label=line.label,
                    color=f"C{order % _COLOURS}",
                    linestyle=_DASHES[order // _COLOURS % len(_DASHES)],
                    marker="o" if markers else None,
                    markersize=3.5,
                    linewidth=1.4,
                )
        for name, level in panel.levels.items():
            ax.axhline(level, color="0.5", linewidth=1, linestyle="-.", label=name)
        ax.set_title(panel.title, fontsize=10)
        ax.set_xlabel(x_label)
        if log_x:
            ax.set_xscale("log")
        if panel.log_y and any(y > 0 for line in panel.lines for y in line.y):
            ax.set_yscale("log")
        if panel.limits_y is not None:
            ax.set_ylim(*panel.limits_y)
        ax.grid(alpha=0.3)
        if ax is axes[0] or not {line.label for line in panel.lines} <= {line.label for line in panels[0].lines}:
            ax.legend(fontsize=7)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=_DPI, metadata={"Software": None})
    return png.getvalue()
