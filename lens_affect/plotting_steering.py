"""Dose-responses and regime maps in, plotly figures out. Titles state the finding; intervals and random directions are always drawn."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from lens_affect.boundaries import Onsets
from lens_affect.doses import UNSTEERED, DoseResponse
from lens_affect.inside import InsideOutside
from lens_affect.regimes import REGIMES, RegimeMap, Thresholds
from lens_affect.steering_study import SteeringStudy
from lens_affect.style import EMOTION_COLOURS, EMOTION_MARKERS, draw_band, set_layout
from lens_affect.verification import CRITERIA, Verification

REGIME_COLOURS = {
    "surgical": "#009E73",
    "inert": "#BBBBBB",
    "undecided": "#FFFFFF",
    "degraded": "#E69F00",
    "repetitive_collapse": "#0072B2",
    "explosive": "#D55E00",
    "invalid": "#000000",
}
"""Colour of a regime, everywhere."""
MEASURES = {
    "perplexity_ratio": "perplexity, steered / unsteered (geometric mean)",
    "repetition": "repeated 3-grams, share",
    "kl": "KL from the unsteered model, nats per token",
    "change": "achieved change of the residual stream, |x' - x| / |x|",
}
"""What plot_dose draws, with its unit."""
TICKS = [m * 10.0**k for k in range(-3, 6) for m in (1, 2, 5)]
"""Of logarithmic axes."""


def plot_dose(dose: DoseResponse, *, measure: str = "perplexity_ratio", title: str | None = None) -> go.Figure:
    """One measure over strength, a line per emotion with its interval over topics, random directions dotted, thresholds as lines.

    Args:
        dose: of sweep_strengths.
        measure: a name from MEASURES.
        title: a finding; by default where the measure leaves the band of unchanged text, or its range.

    Raises:
        ValueError: an unknown measure.
    """
    if measure not in MEASURES:
        raise ValueError(f"received measure={measure!r}; allowed are {list(MEASURES)}")
    cells, figure = dose.to_frame(), go.Figure()
    start = 1.0 if measure == "perplexity_ratio" else 0.0
    for emotion in dose.emotions:
        own = pd.DataFrame(cells[(cells["kind"] == "steered") & (cells["emotion"] == emotion)]).sort_values(
            by="strength"
        )
        colour = EMOTION_COLOURS.get(emotion, "#7F7F7F")
        x, y = own["strength"].to_numpy(float), own[measure].to_numpy(float)
        draw_band(
            figure, x, own[f"{measure}_low"].to_numpy(float), own[f"{measure}_high"].to_numpy(float), colour, None, 0.12
        )
        figure.add_scatter(
            x=x, y=y, mode="lines+markers", name=emotion, line={"color": colour},
            marker={"symbol": EMOTION_MARKERS.get(emotion, "circle"), "size": 7},
            hovertemplate=f"{emotion} at %{{x:+g}}: %{{y:.3f}}<extra></extra>",
        )  # fmt: skip
    random = pd.DataFrame(cells[cells["kind"] == "random"]).sort_values(by="strength")
    if len(random):
        figure.add_scatter(
            x=random["strength"], y=random[measure], mode="lines", name="random directions", line={"color": "#000000", "dash": "dot"}
        )  # fmt: skip
    lines = _thresholds(dose, measure)
    for name, value in lines.items():
        figure.add_hline(y=value, line={"color": "#999999", "width": 1, "dash": "dash"})
        # On a logarithmic axis the place of an annotation is the logarithm.
        figure.add_annotation(
            x=1, xref="paper", xanchor="right", y=math.log10(value) if measure == "perplexity_ratio" else value, yanchor="bottom",
            text=name, showarrow=False, font={"size": 10},
        )  # fmt: skip
    set_layout(
        figure,
        title or _dose_title(dose, cells, measure),
        "strength (share of the residual stream's norm; 0: unsteered)",
        MEASURES[measure],
    )
    if measure == "perplexity_ratio":
        figure.update_yaxes(type="log", tickvals=TICKS, ticktext=[f"{t:g}" for t in TICKS])
    figure.add_vline(x=0, line={"color": "#CCCCCC", "width": 1})
    figure.add_scatter(
        x=[0], y=[start], mode="markers", marker={"color": "#7F7F7F", "symbol": "x"}, name="unsteered", showlegend=False
    )
    return figure


def _thresholds(dose: DoseResponse, measure: str) -> dict[str, float]:
    limits = Thresholds.of(dose)
    if measure == "perplexity_ratio":
        return {"1 / r_ok": 1 / limits.r_ok, "r_ok": limits.r_ok, "r_high": limits.r_high}
    return {"99 % of ordinary prose stays below": limits.repetition} if measure == "repetition" else {}


def _dose_title(dose: DoseResponse, cells: pd.DataFrame, measure: str) -> str:
    own = pd.DataFrame(cells[cells["kind"] == "steered"])
    strengths, values = own["strength"].to_numpy(float), own[measure].to_numpy(float)
    at = [s for s in dose.strengths if np.isfinite(values[strengths == s]).any()]
    if not at:
        return f"{dose.provenance.title}<br>no text at any strength"
    means = {s: _average(values[strengths == s], measure) for s in at}
    largest = max(means, key=lambda s: means[s])
    smallest = min(means, key=lambda s: means[s])
    layers = f"layer {dose.layers[0]}" if len(dose.layers) == 1 else f"{len(dose.layers)} layers"
    return (
        f"{dose.provenance.title}, {layers}, {len(dose.prompts)} prompts ({dose.name})<br>{MEASURES[measure].split(',')[0]}: from {means[smallest]:.2f} at "
        f"{smallest:+g} to {means[largest]:.2f} at {largest:+g} (mean of {len(dose.emotions)} emotions)"
    )


def _average(values: np.ndarray, measure: str) -> float:
    known = values[np.isfinite(values)]
    return math.exp(float(np.log(known).mean())) if measure == "perplexity_ratio" else float(known.mean())


def plot_regimes(found: RegimeMap, *, title: str | None = None) -> go.Figure:
    """Regime of every emotion (rows) at every strength (columns); the number is its bootstrap probability.

    Args:
        found: of classify_regimes.
        title: a finding; by default how many cells are in which regime.
    """
    own = pd.DataFrame(found.table[found.table["kind"] == "steered"])
    names = list(REGIMES)
    emotions = list(dict.fromkeys(own["emotion"]))
    columns = [f"{s:+g}" for s in found.strengths]
    code = np.full((len(emotions), len(columns)), np.nan)
    text = [[""] * len(columns) for _ in emotions]
    for emotion, strength, regime, row in zip(
        own["emotion"], own["strength"], own["regime"], own.to_dict("records"), strict=True
    ):
        i, k = emotions.index(emotion), found.strengths.index(float(strength))
        code[i, k] = names.index(str(regime))
        text[i][k] = f"{float(row[f'p_{regime}']):.2f}"
    edges: list[Any] = []
    for i, name in enumerate(names):
        edges += [[i / len(names), REGIME_COLOURS[name]], [(i + 1) / len(names), REGIME_COLOURS[name]]]
    figure = go.Figure(
        go.Heatmap(
            z=code, x=columns, y=emotions, text=text, texttemplate="%{text}", zmin=-0.5, zmax=len(names) - 0.5, colorscale=edges, xgap=2, ygap=2,
            colorbar={"tickvals": list(range(len(names))), "ticktext": [n.replace("_", " ") for n in names]},
            hovertemplate="%{y} at %{x}: probability %{text}<extra></extra>",
        )
    )  # fmt: skip
    counts = Counter(str(regime) for regime in own["regime"])
    most = ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in counts.most_common())
    head = f"{found.provenance.title}, {found.name}"
    set_layout(
        figure,
        title or f"{head}<br>of {len(own)} cells: {most}",
        "strength (share of the residual stream's norm); number: bootstrap probability",
        "",
    )
    figure.update_xaxes(type="category")
    return figure


def plot_verification(found: Verification, *, title: str | None = None) -> go.Figure:
    """Success rates of steering with Wilson intervals beside those of random directions, per strength and criterion.

    Args:
        found: of verify_steering.
        title: a finding; by default the paired difference at the declared strength.
    """
    table = found.to_frame()
    table = pd.DataFrame(table[table["pull"] == "all"])
    figure = go.Figure()
    colours = {"rises": "#0072B2", "strict": "#D55E00"}
    for criterion in CRITERIA:
        own = pd.DataFrame(table[table["criterion"] == criterion])
        x = [f"{s:+g}" for s in own["strength"]]
        rate, low, high = (own[c].to_numpy(float) for c in ("rate", "low", "high"))
        figure.add_scatter(
            x=x, y=rate, mode="markers", name=f"steered: {criterion}", marker={"color": colours[criterion], "size": 11},
            error_y={"type": "data", "symmetric": False, "array": high - rate, "arrayminus": rate - low},
            hovertemplate=f"{criterion} at %{{x}}: %{{y:.2f}}<extra></extra>",
        )  # fmt: skip
        figure.add_scatter(
            x=x, y=own["random"], mode="markers", name=f"random directions: {criterion}",
            marker={"color": colours[criterion], "size": 11, "symbol": "line-ew-open", "line": {"width": 3}},
            hovertemplate=f"random, {criterion} at %{{x}}: %{{y:.2f}}<extra></extra>",
        )  # fmt: skip
    gap, (successes, n) = found.difference(), found.successes()
    text = (
        f"{found.provenance.title}, strength {found.strength:+g}: target rises in {successes} of {n} scenarios<br>{float(gap.estimate):+.2f} "
        f"[{float(gap.low):+.2f}, {float(gap.high):+.2f}] against {found.n_random} random directions each"
    )
    set_layout(
        figure,
        title or text,
        "strength (share of the residual stream's norm)",
        "share of scenarios (bars: Wilson, 95 %)",
    )
    figure.update_xaxes(type="category")
    figure.update_yaxes(range=[-0.03, 1.03])
    return figure


def plot_scripts(study: SteeringStudy, *, title: str | None = None) -> go.Figure:
    """Share of texts with a letter of a script other than Latin, dose by dose, steered beside random directions.

    Args:
        study: of study_steering.
        title: a finding; by default the largest share.
    """
    table, figure = study.script_table(), go.Figure()
    plain = float(np.mean(np.asarray(table[table["kind"].isin(list(UNSTEERED))]["texts_with_foreign"], dtype=float)))
    for kind, colour, dash in (("steered", "#0072B2", "solid"), ("random", "#000000", "dot")):
        own = pd.DataFrame(table[table["kind"] == kind]).sort_values(by="strength")
        if own.empty:
            continue
        figure.add_scatter(
            x=own["strength"], y=own["texts_with_foreign"], mode="lines+markers", name=kind, line={"color": colour, "dash": dash},
            hovertemplate=f"{kind} at %{{x:+g}}: %{{y:.2f}}<extra></extra>",
        )  # fmt: skip
    figure.add_hline(
        y=plain,
        line={"color": "#999999", "width": 1, "dash": "dash"},
        annotation={"text": "unsteered", "font": {"size": 10}},
    )
    own = pd.DataFrame(table[table["kind"] == "steered"])
    most = own.sort_values(by="texts_with_foreign").to_dict("records")[-1]
    text = (
        f"{study.dose.provenance.title}, {study.dose.name}<br>foreign letters in {most['texts_with_foreign']:.2f} of the texts at {most['strength']:+g}, "
        f"in {plain:.2f} without steering"
    )
    set_layout(
        figure, title or text, "strength (share of the residual stream's norm)", "texts with foreign letters, share"
    )
    return figure


def plot_onsets(found: Onsets, *, title: str | None = None) -> go.Figure:
    """Share of damaged texts over the achieved change, a line per model, random directions dotted.

    Args:
        found: of compare_onsets.
        title: a finding; by default where half of each model's texts are damaged.
    """
    figure = go.Figure()
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
    models = list(dict.fromkeys(found.shares["model"]))
    for i, model in enumerate(models):
        for kind, dash in (("steered", "solid"), ("random", "dot")):
            own = pd.DataFrame(found.shares[(found.shares["model"] == model) & (found.shares["kind"] == kind)])
            if own.empty:
                continue
            figure.add_scatter(
                x=own["change"], y=own["any"], mode="lines+markers", name=f"{model}, {kind}", line={"color": colours[i % len(colours)], "dash": dash},
                hovertemplate=f"{model}, {kind}, change %{{x:.2f}}: %{{y:.2f}}<extra></extra>",
            )  # fmt: skip
    figure.add_hline(y=0.5, line={"color": "#999999", "width": 1, "dash": "dash"})
    set_layout(
        figure,
        title or "<br>".join(str(found).splitlines()),
        "achieved change of the residual stream, |x' - x| / |x|",
        "damaged texts, share",
    )
    figure.update_xaxes(type="log", tickvals=TICKS, ticktext=[f"{t:g}" for t in TICKS])
    figure.update_yaxes(range=[-0.03, 1.03])
    return figure


def plot_inside(found: InsideOutside, *, title: str | None = None) -> go.Figure:
    """Correlation of judge and projection per emotion with its interval, a colour per set of texts; grey: 95 % of relabellings.

    Args:
        found: of correlate_inside.
        title: a finding; by default the mean correlation of each set.
    """
    figure, means = go.Figure(), []
    emotions = list(dict.fromkeys(found.table["emotion"]))
    # Side by side around the emotion's place, bands of the null below the dots.
    looks = {"unsteered": ("#7F7F7F", -0.22), "steered": ("#0072B2", 0.0), "random": ("#000000", 0.22)}
    shown = [(t, found.table[(found.table["texts"] == t) & found.table["rho"].notna()]) for t in looks]
    for layer in ("null", "found"):
        for texts, part in shown:
            own, (colour, shift) = pd.DataFrame(part), looks[texts]
            if own.empty:
                continue
            x = np.array([emotions.index(e) + shift for e in own["emotion"]])
            rho, low, high, null_low, null_high = (
                own[c].to_numpy(float) for c in ("rho", "low", "high", "null_low", "null_high")
            )
            if layer == "null":
                middle = (null_low + null_high) / 2
                figure.add_scatter(
                    x=x, y=middle, mode="markers", showlegend=False, hoverinfo="skip", marker={"size": 1, "color": "#DDDDDD"},
                    error_y={"type": "data", "array": null_high - middle, "color": "#DDDDDD", "thickness": 8, "width": 0},
                )  # fmt: skip
                continue
            means.append(f"{texts} {rho.mean():.2f}")
            figure.add_scatter(
                x=x, y=rho, mode="markers", name=texts, marker={"color": colour, "size": 8}, customdata=own["emotion"],
                error_y={"type": "data", "symmetric": False, "array": high - rho, "arrayminus": rho - low},
                hovertemplate=f"{texts}, %{{customdata}}: %{{y:.2f}}<extra></extra>",
            )  # fmt: skip
    figure.update_xaxes(tickvals=list(range(len(emotions))), ticktext=emotions)
    figure.add_hline(y=0, line={"color": "#999999", "width": 1})
    set_layout(
        figure,
        title
        or f"{found.provenance.title}, layer {found.layer}<br>mean correlation of judge and projection: {', '.join(means)}",
        "",
        "rank correlation within doses (bars: 95 %)",
    )
    return figure
