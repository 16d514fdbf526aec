"""Dose-responses and regime maps in, plotly figures out. Titles state the finding; intervals and random directions are always drawn."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lens_affect.boundaries import Onsets, RegimeBoundaries
from lens_affect.doses import UNSTEERED, DoseResponse
from lens_affect.inside import InsideOutside
from lens_affect.judgements import Judgement
from lens_affect.regimes import REGIMES, REPETITIVE, RegimeMap, Thresholds, in_words, judged_cells
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
BOUNDS = {
    "repetition": (0, 1),
    "probability": (0, 1),
    "gain": (-1, 1),
    "texts_with_foreign": (0, 1),
    "texts_in_foreign": (0, 1),
}
"""Values that a measure can have; others are at least 0."""
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
    dashes = _dashes(dose.emotions)
    for emotion in dose.emotions:
        own = cells[(cells["kind"] == "steered") & (cells["emotion"] == emotion)]
        _draw_measure(
            figure, pd.DataFrame(own), measure, emotion, EMOTION_COLOURS.get(emotion, "#7F7F7F"), dashes[emotion]
        )
    random = pd.DataFrame(cells[cells["kind"] == "random"])
    if len(random):
        _draw_measure(figure, random, measure, "random directions", "#000000", "dot")
    lines = _thresholds(dose, measure)
    for name, value in lines.items():
        figure.add_hline(y=value, line={"color": "#999999", "width": 1, "dash": "dash"})
        # On a logarithmic axis the place of an annotation is the logarithm.
        figure.add_annotation(
            x=1, xref="paper", xanchor="right", y=math.log10(value) if measure == "perplexity_ratio" else value, yanchor="bottom",
            text=name, showarrow=False, font={"size": 11}, bgcolor="rgba(255,255,255,0.7)",
        )  # fmt: skip
    unit = f"<br>{dose.perplexity_unit}" if measure == "perplexity_ratio" else ""
    set_layout(
        figure,
        title or _dose_title(dose, cells, measure),
        "strength (share of the residual stream's norm; 0: unsteered)",
        MEASURES[measure] + unit,
    )
    if measure == "perplexity_ratio":
        figure.update_yaxes(type="log")
        if dose.unit == "token":  # ratios per byte span too little for these ticks
            figure.update_yaxes(tickvals=TICKS, ticktext=[f"{t:g}" for t in TICKS])
    figure.add_vline(x=0, line={"color": "#CCCCCC", "width": 1})
    # The first unsteered text is what ratios are taken against.
    plain = pd.DataFrame(cells[cells["kind"].isin(UNSTEERED)])[measure].to_numpy(float)
    start = 1.0 if measure == "perplexity_ratio" else _average(plain, measure)
    figure.add_scatter(x=[0], y=[start], mode="markers", marker={"color": "#000000", "symbol": "x", "size": 9}, name="unsteered")  # fmt: skip
    return figure


def _draw_measure(
    figure: go.Figure, own: pd.DataFrame, measure: str, name: str, colour: str, dash: str, **panel: Any
) -> None:
    """One line over strength with its interval; a random direction has no markers."""
    own = own.sort_values(by="strength")
    x, y = own["strength"].to_numpy(float), own[measure].to_numpy(float)
    # Limits of a mean may lie where the measure has no values.
    low, high = (own[f"{measure}_{end}"].to_numpy(float).clip(*BOUNDS.get(measure, (0, np.inf))) for end in ("low", "high"))  # fmt: skip
    band = {key: value for key, value in panel.items() if key in ("row", "col")}
    known = np.isfinite(low) & np.isfinite(high)
    draw_band(figure, x[known], low[known], high[known], colour, None, 0.07 if dash == "dot" else 0.12, **band)
    figure.add_scatter(
        x=x, y=y, mode="lines" if dash == "dot" else "lines+markers", name=name, line={"color": colour, "dash": dash},
        marker={"symbol": EMOTION_MARKERS.get(name, "circle"), "size": 7}, hovertemplate=f"{name} at %{{x:+g}}: %{{y:.3f}}<extra></extra>", **panel,
    )  # fmt: skip


def _dashes(emotions: Sequence[str]) -> dict[str, str]:
    """Lines of emotions of one quadrant have one colour, and a dash each."""
    seen, found = Counter(), {}
    for emotion in emotions:
        colour = EMOTION_COLOURS.get(emotion, "")
        found[emotion] = ("solid", "dash", "longdash", "dashdot")[seen[colour] % 4]
        seen[colour] += 1
    return found


def _thresholds(dose: DoseResponse, measure: str) -> dict[str, float]:
    limits = Thresholds.of(dose)
    if measure == "perplexity_ratio":
        return {"1 / r_ok": 1 / limits.r_ok, "r_ok": limits.r_ok, "r_high": limits.r_high}
    if measure != "repetition":
        return {}
    prose = float(dose.limits[-1])
    said = f"99 % of ordinary prose of {dose.longest} tokens stays below {prose:.2f}"
    floor = f"tuned floor {REPETITIVE:.2f} ({said})"
    return {said if prose >= REPETITIVE else floor: limits.repetition}


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


def plot_judged(dose: DoseResponse, judgement: Judgement, *, title: str | None = None) -> go.Figure:
    """What the judge sees of the target over strength: its probability, and its gain over random directions of the same strength, a colour per emotion.

    Args:
        dose: of sweep_strengths.
        judgement: of `dose.texts`, in that order.
        title: a finding; by default the largest gain, and in how many cells it lies above 0.

    Raises:
        ValueError: a judge that can name none of the emotions.
    """
    cells = judged_cells(dose, judgement)
    if cells.empty:
        raise ValueError(
            f"received a judgement by {judgement.title}, which names none of {list(dose.emotions)}; use another judge"
        )
    against = "random directions" if np.isfinite(cells["random"].to_numpy(float)).any() else "the unsteered texts"
    heads = (f"probability (dotted: {against})", f"gain over {against}")
    figure = make_subplots(rows=1, cols=2, subplot_titles=heads, horizontal_spacing=0.1)
    dashes = _dashes(list(dict.fromkeys(cells["emotion"])))
    for emotion, dash in dashes.items():
        own = pd.DataFrame(cells[cells["emotion"] == emotion]).sort_values(by="strength")
        colour = EMOTION_COLOURS.get(emotion, "#7F7F7F")
        for column, name in enumerate(("probability", "gain"), start=1):
            _draw_measure(figure, own, name, emotion, colour, dash, row=1, col=column, legendgroup=emotion, showlegend=column == 1)  # fmt: skip
        figure.add_scatter(
            x=own["strength"], y=own["random"].fillna(own["unsteered"]), mode="lines", showlegend=False, line={"color": colour, "dash": "dot"},
            hovertemplate=f"{emotion} under {against} at %{{x:+g}}: %{{y:.3f}}<extra></extra>", row=1, col=1,
        )  # fmt: skip
    figure.add_hline(y=0, line={"color": "#000000", "dash": "dot", "width": 1.5}, row=1, col=2)  # pyright: ignore[reportArgumentType]
    best = cells.sort_values(by="gain").to_dict("records")[-1]
    above = int((cells["gain_low"].to_numpy(float) > 0).sum())
    text = (
        f"{dose.provenance.title}, {judgement.title}<br>largest gain over {against}: {best['emotion']} {best['gain']:+.2f} [{best['gain_low']:+.2f}, "
        f"{best['gain_high']:+.2f}] at {best['strength']:+g}; above 0 in {above} of {len(cells)} cells"
    )
    set_layout(
        figure, title or text, "strength (share of the residual norm)", "probability of the target (bands: 95 %)"
    )
    figure.update_yaxes(title_text="difference in probability (bands: 95 %)", row=1, col=2)
    figure.update_layout(margin_t=130)  # room for the panels' own titles
    figure.update_annotations(font_size=13)
    return figure


def plot_boundaries(found: Sequence[RegimeBoundaries], *, title: str | None = None) -> go.Figure:
    """Every strength that a bisection tried, coloured by its regime, a row per emotion; grey: the brackets in which one regime gives way to another.

    Args:
        found: of locate_boundaries, of one model.
        title: a finding; by default the boundaries of one emotion, or where the first regime of several ends.

    Raises:
        ValueError: nothing to draw.
    """
    if not found:
        raise ValueError("received no boundaries; use locate_boundaries, or study_steering(..., bisected=[...])")
    figure, seen = go.Figure(), set()
    for row, one in enumerate(found):
        for side, edge in enumerate(one.boundaries):
            figure.add_shape(
                type="rect", x0=edge.low, x1=edge.high, y0=row - 0.22, y1=row + 0.22, fillcolor="#DDDDDD", line={"color": "#FFFFFF", "width": 3}, layer="below"
            )  # fmt: skip
            figure.add_annotation(  # neighbours on either side of the row: their numbers would overlap
                x=math.log10(math.sqrt(edge.low * edge.high)), y=row + (0.24 if side % 2 == 0 else -0.24), yanchor="bottom" if side % 2 == 0 else "top",
                showarrow=False, font={"size": 11}, text=f"{edge.low:.3g} to {edge.high:.3g}",
            )  # fmt: skip
        for regime, part in one.table.groupby("regime", sort=False):
            figure.add_scatter(
                x=part["strength"], y=[row] * len(part), mode="markers", name=in_words(str(regime)), showlegend=regime not in seen, legendgroup=str(regime),
                marker={"color": REGIME_COLOURS[str(regime)], "size": 13, "line": {"color": "#444444", "width": 1}}, customdata=part["p"],
                hovertemplate=f"{one.emotion} at %{{x:.3g}}: {in_words(str(regime))}, probability %{{customdata:.2f}}<extra></extra>",
            )  # fmt: skip
            seen.add(regime)
    n = int(found[0].table["n"].to_numpy()[0])
    set_layout(
        figure,
        title or f"{found[0].provenance.title}, {found[0].name}:<br>{_told(found)}",
        f"strength (share of the residual stream's norm); {n} texts at each, grey: bracket of a boundary",
        "",
    )
    figure.update_xaxes(type="log", tickvals=TICKS, ticktext=[f"{t:g}" for t in TICKS])
    figure.update_yaxes(tickvals=list(range(len(found))), ticktext=[one.emotion for one in found], range=[-0.6, len(found) - 0.4])  # fmt: skip
    height = 90 * len(found)
    margin = figure.to_dict()["layout"]["margin"]
    figure.update_layout(height=height + margin["t"] + margin["b"], legend_y=-70 / height)
    return figure


def _told(found: Sequence[RegimeBoundaries]) -> str:
    if len(found) == 1:
        parts = [
            f"{in_words(b.below)} to {in_words(b.above)} at {b.low:.3g} to {b.high:.3g}" for b in found[0].boundaries
        ]
        return f"{found[0].emotion}: {'; '.join(parts) or 'no boundary between the strengths tried'}"
    first = [one.boundaries[0] for one in found if one.boundaries]
    if not first:
        return "no boundary between the strengths tried"
    low, high = min(b.low for b in first), max(b.high for b in first)
    return f"the first regime ends between {low:.3g} and {high:.3g} in {len(first)} of {len(found)} emotions"


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
            colorbar={"tickvals": list(range(len(names))), "ticktext": list(map(in_words, names))},
            hovertemplate="%{y} at %{x}: probability %{text}<extra></extra>",
        )
    )  # fmt: skip
    counts = Counter(str(regime) for regime in own["regime"])
    most = ", ".join(f"{in_words(name)} {n}" for name, n in counts.most_common())
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
    """Success rates of steering with Wilson intervals beside those of random directions and of another emotion, per strength and criterion.

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
        looks = {"random": ("random directions", "line-ew-open", 3), "spread": ("random in the emotions' spread", "x-thin-open", 2), "other": ("another emotion", "diamond-open", 2)}  # fmt: skip
        for control, (words, symbol, width) in looks.items():
            if bool(own[control].notna().any()):
                figure.add_scatter(
                    x=x, y=own[control], mode="markers", name=f"{words}: {criterion}",
                    marker={"color": colours[criterion], "size": 11, "symbol": symbol, "line": {"width": width}},
                    hovertemplate=f"{words}, {criterion} at %{{x}}: %{{y:.2f}}<extra></extra>",
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
    """Share of texts with a letter of a script other than Latin, dose by dose, steered beside random directions, with intervals over topics.

    Args:
        study: of study_steering.
        title: a finding; by default the largest share.
    """
    words = ("foreign letters in {} of the texts", "texts with foreign letters, share")
    return _plot_foreign(study, study.script_table(), "texts_with_foreign", *words, title)


def plot_languages(study: SteeringStudy, *, title: str | None = None) -> go.Figure:
    """Share of texts that lingua calls another language than English, dose by dose, steered beside random directions, with intervals over topics.

    Args:
        study: of study_steering.
        title: a finding; by default the largest share.

    Raises:
        ModuleNotFoundError: lingua is not installed.
    """
    words = ("{} of the texts in another language than English", "texts in another language than English, share")
    return _plot_foreign(study, study.language_table(), "texts_in_foreign", *words, title)


def _plot_foreign(
    study: SteeringStudy, table: pd.DataFrame, column: str, finding: str, axis: str, title: str | None
) -> go.Figure:
    figure = go.Figure()
    plain = float(np.mean(np.asarray(table[table["kind"].isin(list(UNSTEERED))][column], dtype=float)))
    for kind, colour, dash in (("random", "#000000", "dot"), ("steered", "#0072B2", "solid")):
        own = pd.DataFrame(table[table["kind"] == kind])
        if len(own):
            _draw_measure(figure, own, column, "random directions" if kind == "random" else kind, colour, dash)
    figure.add_hline(
        y=plain,
        line={"color": "#999999", "width": 1, "dash": "dash"},
        annotation={"text": "unsteered", "font": {"size": 11}},
    )
    own, random = (pd.DataFrame(table[table["kind"] == kind]) for kind in ("steered", "random"))
    most = max(own.to_dict("records"), key=lambda row: row[column])
    share = f"{most[column]:.2f} [{most[f'{column}_low']:.2f}, {most[f'{column}_high']:.2f}]"
    where = f" (at {most['strength']:+g}, n = {most['n']})" if most[column] else f" (n = {most['n']} at each strength)"
    against = f"under random directions at most {random[column].to_numpy(float).max():.2f}, " if len(random) else ""
    text = f"{study.dose.provenance.title}, {study.dose.name}<br>{finding.format(f'at most {share}')}{where}<br>{against}{plain:.2f} without steering"
    set_layout(figure, title or text, "strength (share of the residual stream's norm)", axis)
    figure.update_yaxes(range=[-0.02, max(0.2, 1.05 * float(table[f"{column}_high"].to_numpy(float).max()))])
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
