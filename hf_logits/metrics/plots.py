"""Pictures of results, where people would rather look: on axes that are passed, or on new ones."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


Shares = Mapping[str, float | int] | Sequence[float | int]


def _axes(axes: Any) -> Any:
    """The axes to draw on; with none given those of a new figure."""
    if axes is not None:
        return axes
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install matplotlib.") from error
    return pyplot.subplots(layout="constrained")[1]


def reliability_diagram(result: Mapping[str, Any], *, axes: Any = None, label: str | None = None) -> Any:
    """Accuracy against confidence, a point for each bin, as large as the share of the answers in it.

    Args:
        result (`Mapping`): of [`CalibrationError`].
        axes (`matplotlib.axes.Axes`, *optional*): where to draw; several results may go to the same.
        label (`str`, *optional*): for the legend, in front of the expected calibration error.

    Returns:
        `matplotlib.axes.Axes`
    """
    if "bins" not in result:
        raise ValueError(f"A reliability diagram needs the bins of CalibrationError; the result has {sorted(result)}.")
    bins = result["bins"]
    if not bins:
        raise ValueError("The result has no bins: nothing was measured.")
    axes, total = _axes(axes), sum(one["count"] for one in bins)
    if not any(line.get_gid() == "perfect" for line in axes.get_lines()):
        axes.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1, gid="perfect")
    x, y = [one["confidence"] for one in bins], [one["accuracy"] for one in bins]
    name = f"{label + ', ' if label else ''}ECE {result['ece']:.3f}"
    (line,) = axes.plot(x, y, linewidth=1, label=name)
    axes.scatter(x, y, s=[20 + 380 * one["count"] / total for one in bins], color=line.get_color(), alpha=0.6)
    axes.set(xlim=(0, 1), ylim=(-0.02, 1.02), xlabel="confidence", ylabel="accuracy")
    axes.legend()
    return axes


def position_histogram(
    chosen: Shares,
    expected: Shares | None = None,
    *,
    axes: Any = None,
) -> Any:
    """How often each position is chosen, beside how often it should be.

    Args:
        chosen (`Mapping` or `list` of `float`):
            Counts or shares by position: of the letters that a model answered, or `first` and `second` of `by_position` from
            [`JudgePosition`]. They are drawn as shares of their sum.
        expected (`Mapping` or `list` of `float`, *optional*): the same for the right answers. By default all positions alike.
        axes (`matplotlib.axes.Axes`, *optional*): where to draw.

    Returns:
        `matplotlib.axes.Axes`
    """
    found = _shares("chosen", chosen)
    wanted = dict.fromkeys(found, 1 / len(found)) if expected is None else _shares("expected", expected)
    if set(wanted) != set(found):
        raise ValueError(
            f"chosen has the positions {list(found)} and expected has {list(wanted)}; name the same ones."
        )
    axes, places = _axes(axes), range(len(found))
    axes.bar(places, list(found.values()), width=0.7, label="chosen")
    axes.plot(places, [wanted[name] for name in found], "_", color="black", markersize=28, label="expected")
    axes.set_xticks(places, list(found))
    axes.set(xlabel="position", ylabel="share", ylim=(0, 1.08 * max([*found.values(), *wanted.values()])))
    axes.legend()
    return axes


def _shares(what: str, values: Shares) -> dict[str, float]:
    named = dict(values) if isinstance(values, Mapping) else {str(place): one for place, one in enumerate(values)}
    total = sum(named.values())
    if len(named) < 2 or not math.isfinite(total) or total <= 0 or min(named.values()) < 0:
        raise ValueError(f"{what} must be counts or shares of two positions or more, not all 0; got {values!r}.")
    return {name: one / total for name, one in named.items()}


def steering_tradeoff(
    curves: Mapping[str, Sequence[tuple[float, float, float]]],
    *,
    axes: Any = None,
    cost: str = "perplexity / plain",
    effect: str = "wanted share",
) -> Any:
    """What steering brings against what it costs: for each method a curve, whose points are labelled with the strength.

    Args:
        curves (`Mapping[str, list[tuple[float, float, float]]]`): `(strength, cost, effect)` by method, in the order of a curve.
        axes (`matplotlib.axes.Axes`, *optional*): where to draw.
        cost, effect (`str`, *optional*): what the numbers are, for the axes.

    Returns:
        `matplotlib.axes.Axes`
    """
    if not curves or not all(curves.values()):
        raise ValueError(f"Each method needs a point (strength, cost, effect) at least; got {dict(curves)!r}.")
    for method, points in curves.items():
        if any(len(point) != 3 or not all(map(math.isfinite, point)) for point in points):
            raise ValueError(f"Points are three finite numbers (strength, cost, effect); {method!r} has {points!r}.")
    axes = _axes(axes)
    for method, points in curves.items():
        axes.plot([point[1] for point in points], [point[2] for point in points], marker="o", label=method)
        for strength, paid, gained in points:
            axes.annotate(f"{strength:g}", (paid, gained), xytext=(4, 4), textcoords="offset points", fontsize="small")
    axes.set(xlabel=cost, ylabel=effect)
    axes.legend()
    return axes
