"""Curves, vectors and comparisons in, plotly figures out. Titles state the finding; intervals and nulls are always drawn."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lens_affect.anisotropy import Anisotropy
from lens_affect.axes import valence_arousal
from lens_affect.comparison import FACTORS, METRICS, MethodComparison
from lens_affect.geometry import FEWEST_EMOTIONS
from lens_affect.localization import EMBEDDING, LocalizationCurve
from lens_affect.nulls import p_text
from lens_affect.stimuli import EMOTIONS
from lens_affect.style import EMOTION_COLOURS, EMOTION_MARKERS, PALETTE, QUADRANT_COLOURS, draw_band, set_layout
from lens_affect.vectors import EmotionVectors


def plot_curves(
    curves: LocalizationCurve | Sequence[LocalizationCurve],
    *,
    title: str | None = None,
    bar: float | Sequence[float] | None = None,
) -> go.Figure:
    """Localization curves of one score over depth, each with its interval, its null band and its family-wise threshold.

    Args:
        curves: one or several with the same score, such as both extraction methods or several models.
        title: a finding; by default where the first curve is best.
        bar: level of a bag of words on the texts, drawn as a line; or one level for each curve where they are read from different texts, drawn in
            the colours of the curves.

    Raises:
        ValueError: curves of different scores; another number of levels than of curves.
    """
    several = [curves] if isinstance(curves, LocalizationCurve) else list(curves)
    if len({c.score for c in several}) != 1:
        raise ValueError(f"received curves of {sorted({c.score for c in several})}; one figure shows one score")
    first = several[0]
    figure = go.Figure()
    for curve, colour in zip(several, ("#999999",) if len(several) == 1 else PALETTE, strict=False):
        if curve.n_permutations:
            _null(figure, curve, colour, named=curve is first)
    for level, name, colour in _bars(several, bar):
        figure.add_hline(
            y=level,
            line={"dash": "dash", "color": colour, "width": 1},
            annotation={"text": name, "font": {"color": colour}},
            annotation_position="bottom right",
        )
    for curve, colour in zip(several, PALETTE, strict=False):
        draw_band(figure, curve.depth.numpy(), curve.low.numpy(), curve.high.numpy(), colour, None)
        figure.add_scatter(
            x=curve.depth.numpy(),
            y=curve.values.numpy(),
            mode="lines+markers",
            marker={
                "size": [9 if r == EMBEDDING else 5 for r in curve.rows],
                "symbol": ["diamond-open" if r == EMBEDDING else "circle" for r in curve.rows],
            },
            line={"color": colour},
            name=curve_name(curve, several),
            customdata=np.stack(
                [np.array(curve.rows), curve.low.numpy(), curve.high.numpy(), curve.p_family.numpy()], axis=1
            ),
            hovertemplate="layer %{customdata[0]}, depth %{x:.2f}<br>%{y:.3f} [%{customdata[1]:.3f}, %{customdata[2]:.3f}]<br>family-wise p %{customdata[3]:.3f}<extra></extra>",
        )
    set_layout(
        figure,
        title or curve_title(first),
        "depth: (layer + 1) / layers; open diamond at 0: token embedding",
        first.unit,
    )
    figure.update_xaxes(range=[-0.02, 1.02])
    return figure


def _bars(several: list[LocalizationCurve], bar: float | Sequence[float] | None) -> list[tuple[float, str, str]]:
    """Level, name and colour of each line for a bag of words."""
    if bar is None or isinstance(bar, int | float):
        return [] if bar is None else [(float(bar), "bag of words", "#000000")]
    if len(bar) != len(several):
        raise ValueError(
            f"received {len(bar)} levels for {len(several)} curves; allowed are one for all or one for each"
        )
    return [
        (float(level), f"bag of words, {curve.method}", colour)
        for level, curve, colour in zip(bar, several, PALETTE, strict=False)
    ]


def _null(figure: go.Figure, curve: LocalizationCurve, colour: str, *, named: bool) -> None:
    """Where shuffled labels fall, and the family-wise threshold; in the curve's own colour where there are several."""
    alone = colour == "#999999"
    names = ("95 % of shuffled labels", "5 % threshold over all layers")
    low, high = curve.null_low.numpy(), curve.null_high.numpy()
    draw_band(
        figure, curve.depth.numpy(), low, high, colour, names[0] if named else None, opacity=0.2 if alone else 0.08
    )
    figure.add_scatter(
        x=curve.depth.numpy(),
        y=curve.threshold.numpy(),
        mode="lines",
        line={"dash": "dot", "color": "#666666" if alone else colour},
        name=names[1],
        showlegend=named,
        hovertemplate="threshold %{y:.3f}<extra></extra>",
    )


def curve_name(curve: LocalizationCurve, among: Sequence[LocalizationCurve]) -> str:
    """What tells a curve from the others: its stimuli, its model, or both."""
    parts = []
    if len({c.provenance.title for c in among}) > 1:
        parts.append(curve.provenance.title)
    if len({c.method for c in among}) > 1 or not parts:
        parts.append(curve.method)
    return ", ".join(parts) + f" (n = {curve.n_texts})"


def curve_title(curve: LocalizationCurve) -> str:
    """The finding of one curve in a line."""
    i = curve.row(curve.best_layer)
    low, high = curve.best_depth_interval()
    return (
        f"{curve.provenance.title}<br>{curve.unit} is best at depth {curve.depth[i]:.2f} (95 % interval {low:.2f} to {high:.2f}): "
        f"{curve.values[i]:.2f} [{curve.low[i]:.2f}, {curve.high[i]:.2f}]"
    )


def plot_similarity(vectors: EmotionVectors, layer: int, *, title: str | None = None) -> go.Figure:
    """Heatmap of cosines between emotion vectors at one layer, emotions ordered by quadrant.

    Args:
        vectors: fitted emotion vectors.
        layer: 0-based block.
        title: a finding; a default states one.
    """
    order = sorted(
        vectors.emotions,
        key=lambda e: (list(QUADRANT_COLOURS).index(EMOTIONS[e].quadrant) if e in EMOTIONS else 9, e),
    )
    table = vectors.similarity(layer).loc[order, order]
    off = table.to_numpy()[~np.eye(len(order), dtype=bool)]
    pairs = table.where(~np.eye(len(order), dtype=bool)).stack()
    closest = pairs.idxmax()
    text = title or (
        f"{vectors.provenance.title}, layer {layer}, {vectors.source}<br>closest: {closest[0]} and {closest[1]} "  # pyright: ignore[reportIndexIssue]
        f"({pairs.max():.2f}); mean cosine {off.mean():.2f} after the {vectors.baseline} baseline"
    )
    figure = go.Figure(
        go.Heatmap(
            z=table.to_numpy(),
            x=order,
            y=order,
            zmin=-1,
            zmax=1,
            colorscale=[[0, "#0072B2"], [0.5, "#FFFFFF"], [1, "#D55E00"]],
            colorbar={"title": "cosine"},
            hovertemplate="%{y} and %{x}: %{z:.2f}<extra></extra>",
        )
    )
    set_layout(figure, text, "", "")
    figure.update_layout(width=760, height=720, margin={"t": 80, "l": 110, "r": 30, "b": 110})
    figure.update_yaxes(autorange="reversed")
    return figure


def plot_valence_arousal(vectors: EmotionVectors, layer: int, *, title: str | None = None) -> go.Figure:
    """Emotions on the first two principal components of their vectors, coloured by quadrant.

    Args:
        vectors: fitted emotion vectors.
        layer: 0-based block.
        title: a finding; a default states one.
    """
    table = vectors.principal_axes(layer)
    shares = table.attrs["explained"]
    text = title or f"{vectors.provenance.title}, layer {layer}, {vectors.source}<br>{_valence_finding(vectors, layer)}"
    figure = go.Figure()
    for quadrant, colour in QUADRANT_COLOURS.items():
        names = [e for e in table.index if e in EMOTIONS and EMOTIONS[e].quadrant == quadrant]
        part = table.loc[names]
        figure.add_scatter(
            x=part["pc1"],
            y=part["pc2"],
            mode="markers+text",
            text=names,
            textposition="top center",
            marker={"color": colour, "size": 10, "symbol": [EMOTION_MARKERS[n] for n in names]},
            name=f"valence {quadrant.split(', ')[0]}, arousal {quadrant.split(', ')[1]}",
            hovertemplate="%{text}: %{x:.2f}, %{y:.2f}<extra></extra>",
        )
    other = table.loc[[e for e in table.index if e not in EMOTIONS]]
    if len(other):
        figure.add_scatter(
            x=other["pc1"],
            y=other["pc2"],
            mode="markers+text",
            text=list(other.index),
            textposition="top center",
            marker={"color": "#7F7F7F", "size": 10},
            name="not placed",
        )
    set_layout(
        figure,
        text,
        f"first principal component ({shares[0]:.0%} of variance)",
        f"second principal component ({shares[1]:.0%})",
    )
    figure.update_layout(height=600)
    return figure


def _valence_finding(vectors: EmotionVectors, layer: int) -> str:
    """Which component follows valence, its correlation, and the p that pays for choosing between two components."""
    if sum(e in EMOTIONS for e in vectors.emotions) < FEWEST_EMOTIONS:
        return f"{len(vectors.emotions)} emotions on their first two components"
    found = valence_arousal(vectors, layer)
    component = found.best_components[0]
    if component == "none":
        return "all emotions lie on one side of valence"
    chance = p_text(float(found.p[0]), found.n_permutations)
    return f"valence lies closest to {component}: |r| = {found.best[0]:.2f} ({len(found.emotions)} emotions; best of two components, {chance})"


def plot_reliability(vectors: Sequence[EmotionVectors]) -> go.Figure:
    """Split-half reliability of the vectors over depth: mean over emotions, and the range from the worst to the best."""
    figure = go.Figure()
    for one, colour in zip(vectors, PALETTE, strict=False):
        depth = (np.array(one.layers) + 1) / one.n_layers
        values = one.reliability.numpy()
        draw_band(figure, depth, values.min(0), values.max(0), colour, None)
        figure.add_scatter(
            x=depth,
            y=values.mean(0),
            mode="lines+markers",
            line={"color": colour},
            marker={"size": 5},
            name=f"{one.source} (band: worst to best emotion)",
        )
    best = max(vectors, key=lambda v: float(v.reliability.mean(0).max()))
    top = float(best.reliability.mean(0).max())
    set_layout(
        figure,
        f"{best.provenance.title}<br>vectors of two halves of the topics agree up to {top:.2f} ({best.source}, mean over emotions)",
        "depth: (layer + 1) / layers",
        "split-half reliability (1 = same direction)",
    )
    return figure


def plot_emotions(curve: LocalizationCurve, *, title: str | None = None) -> go.Figure:
    """Score of every emotion at the best layer with interval and null mean, sorted.

    Raises:
        ValueError: the score has no values per emotion.
    """
    if curve.per_emotion.empty:
        raise ValueError(f"score {curve.score!r} has no values per emotion; use 'nearest_mean', 'logistic' or 'dprime'")
    frame = curve.per_emotion
    table = pd.DataFrame(frame[frame["row"] == str(curve.best_layer)]).sort_values(by="score")
    text = title or (
        f"{curve.provenance.title}, layer {curve.best_layer}, {curve.method}<br>told apart best: {table['emotion'].iloc[-1]} "
        f"({table['score'].iloc[-1]:.2f}); worst: {table['emotion'].iloc[0]} ({table['score'].iloc[0]:.2f})"
    )
    figure = make_subplots()
    figure.add_scatter(
        x=table["score"],
        y=table["emotion"],
        mode="markers",
        error_x={
            "type": "data",
            "symmetric": False,
            "array": (table["high"] - table["score"]).clip(lower=0),
            "arrayminus": (table["score"] - table["low"]).clip(lower=0),
        },
        marker={
            "color": [EMOTION_COLOURS.get(e, "#7F7F7F") for e in table["emotion"]],
            "size": 9,
            "symbol": [EMOTION_MARKERS.get(e, "circle") for e in table["emotion"]],
        },
        name="score with 95 % interval",
    )
    if curve.n_permutations:
        figure.add_scatter(
            x=table["null_mean"],
            y=table["emotion"],
            mode="markers",
            marker={"symbol": "line-ns-open", "color": "#666666", "size": 10},
            name="shuffled labels (mean)",
        )
    set_layout(figure, text, curve.unit, "")
    figure.update_layout(height=620, margin={"l": 110, "t": 80, "r": 30, "b": 110})
    return figure


FACTOR_COLOURS = dict(zip(FACTORS, PALETTE, strict=False))
"""Colour of each factor of a method comparison."""


def plot_methods(comparison: MethodComparison, *, metric: str = "accuracy", title: str | None = None) -> go.Figure:
    """What each choice changes against the reference, one at a time, with its interval over topics.

    Args:
        comparison: of compare_methods.
        metric: one of comparison.METRICS.
        title: a finding; a default states which factor carries the difference.

    Raises:
        ValueError: an unknown metric.
    """
    if metric not in METRICS:
        raise ValueError(f"received metric {metric!r}; allowed are {list(METRICS)}")
    effects = comparison.effects
    table = pd.DataFrame(effects[effects["metric"] == metric]).iloc[::-1]
    carrier = comparison.carrier(metric)
    claim = f"{metric} is carried by {carrier}" if carrier else f"no single choice changes {metric} beyond its noise"
    at = comparison.table
    start: Any = at[
        (at["metric"] == metric)
        & np.all([at[f] == v for f, v in zip(FACTORS, comparison.reference, strict=True)], axis=0)
    ]
    value = float(start["value"].to_numpy()[0])
    figure = go.Figure()
    for factor, colour in FACTOR_COLOURS.items():
        rows = table[table["factor"] == factor]
        if rows.empty:
            continue
        figure.add_scatter(
            x=rows["difference"],
            y=[f"{factor}: {level}" for level in rows["level"]],
            mode="markers",
            marker={
                "color": colour,
                "size": 10,
                "symbol": ["circle" if p < 0.05 else "circle-open" for p in rows["p_holm"]],
            },
            error_x={
                "type": "data",
                "symmetric": False,
                "array": (rows["high"] - rows["difference"]).clip(lower=0),
                "arrayminus": (rows["difference"] - rows["low"]).clip(lower=0),
                "color": colour,
            },
            name=factor,
            customdata=rows["p_holm"],
            hovertemplate="%{y}: %{x:+.3f}, Holm p %{customdata:.3g}<extra></extra>",
        )
    figure.add_vline(x=0, line={"color": "#666666", "width": 1})
    set_layout(
        figure,
        title
        or f"{comparison.provenance.title}, layer {comparison.layer}<br>{claim}<br>reference ({value:.2f}): {', '.join(comparison.reference)}",
        f"change of {METRICS[metric].split(' (')[0].split(':')[0]}; filled: p < 0.05 after Holm correction",
        "",
    )
    figure.update_layout(margin={"l": 190, "t": 110, "r": 30, "b": 110})
    return figure


def plot_anisotropy(measures: Anisotropy | Sequence[Anisotropy], *, title: str | None = None) -> go.Figure:
    """Mean cosine between neutral sentences over depth, with its interval.

    Args:
        measures: of one model or several.
        title: a finding; a default states the first model's range.
    """
    several = [measures] if isinstance(measures, Anisotropy) else list(measures)
    figure = go.Figure()
    for one, colour in zip(several, PALETTE, strict=False):
        table = one.table
        x = table["depth"].to_numpy(dtype=float)
        draw_band(figure, x, table["low"].to_numpy(dtype=float), table["high"].to_numpy(dtype=float), colour, None)
        figure.add_scatter(
            x=x,
            y=table["mean_cosine"],
            mode="lines+markers",
            line={"color": colour},
            marker={"size": 5},
            name=f"{one.provenance.title} (n = {one.n_sentences} sentences)",
            customdata=table[["row", "participation_ratio", "top3_share", "sink_ratio"]],
            hovertemplate="layer %{customdata[0]}: %{y:.3f}<br>participation ratio %{customdata[1]:.1f}, top three dimensions %{customdata[2]:.0%}, "
            "first token %{customdata[3]:.0f} times as long<extra></extra>",
        )
    first = several[0]
    layers = first.table[first.table["row"] != EMBEDDING]["mean_cosine"]
    set_layout(
        figure,
        title
        or f"{first.provenance.title}<br>neutral sentences lie within a cosine of {layers.min():.2f} to {layers.max():.2f} of each other, whatever they say",
        "depth: (layer + 1) / layers; 0: token embedding",
        "mean cosine, last token",
    )
    return figure
