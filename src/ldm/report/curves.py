"""Lines over steps as SVG to stand in a page: sharp at every size, in the page's font and color of ink."""

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

COLORS = ("#3b82f6", "#e8710a", "#12a150", "#a855f7", "#ef4444", "#0d9aa8")  # seen on white and on black alike
INK = "#0a0b0c"  # stands for the page's own
MOST_POINTS = 300
SIZE = (4.4, 2.7)  # inches of 72 units


class Curve(NamedTuple):
    """Values by step, and how they are drawn."""

    values: Mapping[int, float]
    color: str
    dashed: bool = False


def thin(values: Mapping[int, float]) -> tuple[list[float], list[float]]:
    """Return steps and values; of more than `MOST_POINTS` the means of neighbors, which also smooths."""
    steps, numbers = list(map(float, values)), list(values.values())
    size = -(-len(steps) // MOST_POINTS)
    cuts = range(0, len(steps), max(size, 1))
    mean = [sum(numbers[i : i + size]) / len(numbers[i : i + size]) for i in cuts]
    return [sum(steps[i : i + size]) / len(steps[i : i + size]) for i in cuts], mean


def draw(curves: Sequence[Curve], log: bool = False, from_zero: bool = False) -> str:
    """Draw curves over steps.

    Args:
        curves: of at least one value each.
        log: let the value axis be logarithmic where values are positive and span more than a decade.
        from_zero: let the value axis begin at zero.

    Returns:
        `<svg …>…</svg>` with `currentColor` for axes and text, and nothing in it that is fetched.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    lines = [thin(curve.values) for curve in curves]
    salt = hashlib.sha256(repr((lines, curves)).encode()).hexdigest()  # ids must differ from those of other plots
    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": salt, "text.parse_math": False, "font.size": 9.0,
        "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=SIZE)
        axes = figure.add_axes((0.13, 0.16, 0.83, 0.79))
        for curve, (steps, values) in zip(curves, lines, strict=True):
            marker = "o" if len(steps) <= 25 else ""
            line_style = (0, (3, 2)) if curve.dashed else "-"
            axes.plot(
                steps, values, color=curve.color, linestyle=line_style, linewidth=1.4, marker=marker, markersize=3
            )
        numbers = [value for _, values in lines for value in values]
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(_short))
        if log and min(numbers) > 0 and max(numbers) > 10 * min(numbers):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(
                LogLocator(subs=(1.0, 2.0, 5.0) if max(numbers) < 1e3 * min(numbers) else (1.0,))
            )
            axes.yaxis.set_minor_locator(LogLocator(subs="auto"))
            axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
            if from_zero:
                axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(_short))
        axes.set_xlim(left=0)  # so that the plots of a stage lie below each other
        axes.set_xlabel("step", labelpad=1)
        axes.grid(color=INK, alpha=0.12, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(length=2.5, width=0.6)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    return _for_a_page(file.getvalue())


def _short(value: float, _: Any = None) -> str:
    """Write a tick's number.

    >>> _short(12000.0), _short(0.00025), _short(1500.0)
    ('12k', '0.00025', '1,500')
    """
    if abs(value) >= 1e4:
        return f"{value / 1e6:.4g}M" if abs(value) >= 1e6 else f"{value / 1e3:.4g}k"
    return f"{value:,.0f}" if abs(value) >= 1e3 else f"{value:.4g}"


def _for_a_page(svg: str) -> str:
    """Leave out what a file of its own needs, and what would say more than one thing of the same id."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<defs>\s*</defs>|<!--.*?-->", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"(?:#)([\w-]+)(?=[\")])", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r"; font-family: [^;\"]*| transform=\"rotate\(-0 [^\"]*\"", "", svg).replace("xlink:href", "href")
    svg = re.sub(r"<svg[^>]*viewBox=\"([^\"]*)\"[^>]*>", r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    return re.sub(r"\n\s*", "\n", svg.replace(INK, "currentColor")).strip()
