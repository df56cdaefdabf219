# SPDX-License-Identifier: Apache-2.0
"""Plots as inline SVG that follows the page: its font, and its colours in light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib as mpl

mpl.use("svg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

# Stand-ins that the page's stylesheet replaces: matplotlib cannot write a CSS variable.
INK, FAINT, OURS, OTHER, THIRD, LIMIT = "#010203", "#010204", "#010205", "#010206", "#010207", "#010208"
_VARIABLES = {INK: "ink", FAINT: "faint", OURS: "ours", OTHER: "other", THIRD: "third", LIMIT: "limit"}


@dataclass
class Plot:
    """A plot while it is drawn (`axes`), and afterwards (`svg`)."""

    axes: Axes
    svg: str = ""


@contextmanager
def plot(name: str, title: str, x: str, y: str) -> Iterator[Plot]:
    """An empty plot to draw on; on leaving, its SVG."""
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,  # so that ids inside the SVG are the same in every run
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.titlelocation": "left",
        "axes.titlesize": 12,
        "legend.frameon": False,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
        **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), FAINT),
    }
    with mpl.rc_context(settings):
        figure, axes = plt.subplots(figsize=(7.2, 3.4), layout="constrained")
        axes.set(title=title, xlabel=x, ylabel=y)
        drawn = Plot(axes)
        yield drawn
        if entries := len(axes.get_legend_handles_labels()[0]):
            # Four beside each other are wider than the figure, and what is outside is cut off.
            figure.legend(loc="outside lower center", ncols=entries if entries < 4 else 2)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    drawn.svg = _inline(file.getvalue(), name, title)


def _inline(svg: str, name: str, title: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)  # the family is the page's
    svg = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
