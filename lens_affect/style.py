"""How figures look and how they are saved: colours, bands, layout; an interactive page, its numbers and a picture.

Colours are Okabe and Ito's, safe for colour-blind readers; each emotion has one colour and marker everywhere.
"""

import functools
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from lens_affect.results import write_text_atomically
from lens_affect.stimuli import EMOTIONS

log = logging.getLogger(__name__)

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
_MARKERS = ("circle", "square", "diamond", "triangle-up", "x")
QUADRANT_COLOURS = {
    "positive, high": "#E69F00",
    "positive, low": "#009E73",
    "negative, high": "#D55E00",
    "negative, low": "#0072B2",
}
EMOTION_COLOURS = {name: QUADRANT_COLOURS[e.quadrant] for name, e in EMOTIONS.items()}
"""Colour of an emotion: that of its quadrant of the valence-arousal plane."""
_IN_QUADRANT = {
    name: [n for n in EMOTIONS if EMOTIONS[n].quadrant == e.quadrant].index(name) for name, e in EMOTIONS.items()
}
EMOTION_MARKERS = {
    name: _MARKERS[i % len(_MARKERS)] + ("-open" if i >= len(_MARKERS) else "") for name, i in _IN_QUADRANT.items()
}
"""Marker of an emotion: tells it from the others of its quadrant."""
WIDTH, HEIGHT = 900, 480


def draw_band(
    figure: go.Figure,
    x: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    colour: str,
    name: str | None,
    opacity: float = 0.2,
    **panel: int,
) -> None:
    """Fill between two lines; without a name it is not in the legend. `row` and `col` name a panel."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    figure.add_scatter(
        x=np.concatenate([x, x[::-1]]),
        y=np.concatenate([low, high[::-1]]),
        fill="toself",
        fillcolor=f"rgba({red},{green},{blue},{opacity})",
        mode="lines",
        line={"width": 0},
        name=name,
        showlegend=name is not None,
        hoverinfo="skip",
        **panel,
    )


def set_layout(figure: go.Figure, title: str, x: str, y: str) -> None:
    """Title, axes with their units, legend below."""
    figure.update_layout(
        title={"text": title, "font": {"size": 15}, "x": 0.02, "xanchor": "left"},
        template="simple_white",
        width=WIDTH,
        height=HEIGHT,
        margin={"t": 60 + 20 * title.count("<br>"), "l": 70, "r": 30, "b": 110},
        legend={"orientation": "h", "y": -0.24, "x": 0},
    )
    figure.update_xaxes(title_text=x)
    figure.update_yaxes(title_text=y)


def save_figure(figure: go.Figure, path: str | os.PathLike[str], *results: Any) -> Path:
    """Save a figure as HTML (sharing one plotly.min.js per folder), its numbers as JSON, and a PNG where a browser is found.

    Args:
        figure: what a plot function returned.
        path: without suffix.
        results: what the figure shows; their tables and provenance go into the JSON.

    Returns:
        The path of the HTML file.
    """
    place = Path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    title = figure.to_dict()["layout"]["title"]["text"]
    numbers = []
    for result in results:
        table = pd.DataFrame(result.to_frame()).to_json(orient="split", index=False, double_precision=10)
        numbers.append({"title": title, "table": json.loads(str(table)), "provenance": result.provenance.__dict__})
    # A model's name may hold a dot, so nothing is taken for a suffix.
    page, picture, data = (place.parent / f"{place.name}{end}" for end in (".html", ".png", ".json"))
    write_text_atomically(data, json.dumps(numbers, indent=1, default=str))
    figure.write_html(page, include_plotlyjs="directory")
    try:
        _quiet_browser()
        figure.write_image(picture, scale=2)
    except Exception as error:  # kaleido raises kinds of its own; the interactive figure is there already
        _say_no_pictures("".join(str(error).strip().splitlines()[:1]))
    return page


@functools.cache
def _quiet_browser() -> None:
    """What draws pictures logs a traceback, and goes on, for every line of the browser's that is no message to it, some of them after a picture is done."""
    logging.getLogger("choreographer").setLevel(logging.CRITICAL)


@functools.cache  # once, however many figures there are
def _say_no_pictures(reason: str) -> None:
    log.warning(
        "figures are saved as HTML without a PNG%s; for PNGs install the group `figures` and a Chromium (BROWSER_PATH)",
        f" ({reason})" if reason else "",
    )
