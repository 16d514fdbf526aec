"""Module tables in, plotly figures out: what each arm keeps of the gain of tuning everything, and how arms learn. Intervals are always drawn."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from lens_affect.module_table import ModuleTable, mean_curve
from lens_affect.plotting_patching import ARM_COLOURS
from lens_affect.style import PALETTE, draw_band, set_layout


def _colour(label: str) -> str:
    return ARM_COLOURS.get(label.replace(",", " ").split()[0], PALETTE[-1])


def plot_retention(tables: ModuleTable | Mapping[str, ModuleTable], *, title: str | None = None) -> go.Figure:
    """Share of the gain of tuning everything that each arm keeps, with its interval; its share of the parameters and of the tuned score beside it.

    Args:
        tables: one, or several by name (equal rank, equal size, another measure); each name gets a group of bars.
        title: a finding; by default the gate against its best sibling in the first table.

    Raises:
        ValueError: no table, or none with a retention.
    """
    several = _by_name(tables)
    shown = _rows({name: t.arms[t.arms["arm"] != t.reference] for name, t in several.items()})
    if shown.empty or bool(shown["retention"].isna().all()):
        raise ValueError(
            "received no arm with a retention; the reference arm must be there and must have gained for certain: plot_gains shows arms without"
        )
    figure, place = _bars(shown, "retention", len(several) > 1)
    for column, symbol, name, scale in (
        ("share_of_parameters", "line-ew", "share of the parameters", 1.0),
        ("percent_of_tuned", "circle-open", "share of the tuned score (the paper's number)", 100.0),
    ):
        marker = {"symbol": symbol, "size": 18 if symbol == "line-ew" else 9, "color": "#000000", "line": {"width": 2}}
        figure.add_scatter(x=place, y=shown[column] / scale, mode="markers", marker=marker, name=name)
    _draw_level(figure, 1.0, "dot")
    first = next(iter(several.values()))
    set_layout(
        figure, title or _retention_title(first), "arm", f"share of what {first.reference} gains ({first.metric})"
    )
    return figure


def _by_name(tables: ModuleTable | Mapping[str, ModuleTable]) -> dict[str, ModuleTable]:
    return {"": tables} if isinstance(tables, ModuleTable) else dict(tables)


def _rows(arms: Mapping[str, Any]) -> Any:
    return pd.concat([t.assign(group=name) for name, t in arms.items()], ignore_index=True) if arms else pd.DataFrame()


def _bars(shown: Any, column: str, grouped: bool) -> tuple[go.Figure, list[Any]]:
    """One bar per arm with its interval, and where the bars stand."""
    place = [list(shown["group"]), list(shown["arm"])] if grouped else list(shown["arm"])
    figure = go.Figure()
    figure.add_bar(
        x=place,
        y=shown[column],
        marker_color=[_colour(a) for a in shown["arm"]],
        marker_opacity=0.5,  # or the intervals are lost on a dark bar
        error_y={
            "array": shown[f"{column}_high"] - shown[column],
            "arrayminus": shown[column] - shown[f"{column}_low"],
            "color": "#000000",
            "thickness": 2,
        },
        showlegend=False,
    )
    return figure, place


def plot_gains(tables: ModuleTable | Mapping[str, ModuleTable], *, title: str | None = None) -> go.Figure:
    """What each arm gains over the untuned model, with its interval over seeds and examples; also where tuning everything gained nothing for certain.

    Args:
        tables: one, or several by name (equal rank, equal size); each name gets a group of bars.
        title: a finding; by default what the gate (without one, the best arm) and everything gain in the first table.

    Raises:
        ValueError: no table with a gain.
    """
    several = _by_name(tables)
    shown = _rows({name: t.arms for name, t in several.items()})
    if shown.empty or bool(shown["gain"].isna().all()):
        raise ValueError("received no arm with a gain; give a table of compare_arms with a run that did not explode")
    figure, _ = _bars(shown, "gain", len(several) > 1)
    _draw_level(figure, 0.0, "solid")
    first = next(iter(several.values()))
    set_layout(figure, title or _gains_title(first), "arm", f"gain over the untuned model ({first.metric})")
    return figure


def _draw_level(figure: go.Figure, level: float, dash: str) -> None:
    """A line from edge to edge; plotly's own add_hline is not drawn where bars stand in groups."""
    line = {"color": "#7F7F7F", "dash": dash, "width": 1.5}
    figure.add_shape(type="line", xref="paper", x0=0, x1=1, y0=level, y1=level, line=line)


def _gains_title(table: ModuleTable) -> str:
    """The gate, or the arm that gains most, beside everything."""
    known: Any = table.arms[table.arms["gain"].notna()]
    arms: Any = known.sort_values("gain", ascending=False)
    single = arms[arms["arm"] != table.reference]
    gates = single[single["arm"].str.startswith("gate")]
    named = [*(gates if len(gates) else single).head(1).to_dict("records")]
    named += arms[arms["arm"] == table.reference].to_dict("records")
    told = ", ".join(f"{r['arm']} gains {r['gain']:+.3f} [{r['gain_low']:+.3f}, {r['gain_high']:+.3f}]" for r in named)
    return (
        f"{table.provenance.title}: {told}<br>({table.metric} {table.base:.3f} untuned; "
        f"detectable between two arms {table.detectable:.3f})"
    )


def _retention_title(table: ModuleTable) -> str:
    arms: Any = table.arms[(table.arms["arm"] != table.reference) & table.arms["retention"].notna()]
    gates = arms[arms["arm"].str.startswith("gate")]
    others = arms[~arms["arm"].str.startswith("gate")].sort_values("retention")
    start = f"{table.provenance.title}: "
    if gates.empty or others.empty:
        best = arms.sort_values("retention").iloc[-1]
        return f"{start}{best['arm']} keeps most of the gain ({best['retention']:.2f})"
    gate, other = gates.iloc[0], others.iloc[-1]
    pair: Any = table.contrast(gate["arm"], other["arm"])
    seen = "no difference was seen" if pair["low"] <= 0 <= pair["high"] else "the difference is beyond chance"
    return (
        f"{start}{gate['arm']} keeps {gate['retention']:.2f} of the gain, {other['arm']} {other['retention']:.2f}; {seen}"
        f"<br>(difference {pair['difference']:+.3f} [{pair['low']:+.3f}, {pair['high']:+.3f}] in {table.metric}; "
        f"detectable {pair['detectable']:.3f})"
    )


def plot_learning(curves: pd.DataFrame, *, column: str = "validation_loss", title: str | None = None) -> go.Figure:
    """Validation loss over steps of every arm: mean over seeds, band from the lowest to the highest seed.

    Args:
        curves: of module_table.learning_curves.
        column: `validation_loss`, `validation_exact` or `train_loss`.
        title: a finding; by default the arm that is best at its last step.

    Raises:
        ValueError: no curves, or an unknown column.
    """
    allowed: Sequence[str] = ("validation_loss", "validation_exact", "train_loss")
    if column not in allowed or curves.empty:
        raise ValueError(
            f"received column {column!r} and {len(curves)} rows; allowed are {list(allowed)} of at least one run"
        )
    table = mean_curve(curves, column).dropna()
    figure, dashes, seen = go.Figure(), ("solid", "dash", "dot"), dict[str, int]()
    for arm, part in table.groupby("arm", sort=False):
        colour = _colour(str(arm))
        again = seen.get(colour, 0)
        seen[colour] = again + 1
        x = part["step"].to_numpy()
        draw_band(figure, x, part["lowest"].to_numpy(), part["highest"].to_numpy(), colour, None)
        line = {"color": colour, "dash": dashes[again % len(dashes)]}
        figure.add_scatter(x=x, y=part["mean"], mode="lines+markers", line=line, name=str(arm))
    last: Any = table.sort_values("step").groupby("arm").last()["mean"]
    best = last.idxmax() if column == "validation_exact" else last.idxmin()
    n = max(curves.groupby("arm")["seed"].nunique().tolist())
    heading = title or f"{best} ends lowest: {np.round(last[best], 3)}; bands: lowest to highest of up to {n} seeds"
    if title is None and column == "validation_exact":
        heading = heading.replace("lowest:", "highest:", 1)
    highest, lowest = float(table["highest"].to_numpy().max()), float(table["lowest"].to_numpy().min())
    # labels fall from ten nats to one and a half, and the arms differ at the end; a shorter log axis would have no ticks
    if column == "validation_loss" and highest >= 2 * lowest:
        set_layout(figure, heading, "training steps", "validation loss (nats, log scale)")
        figure.update_yaxes(type="log", dtick="D2")
    else:
        set_layout(figure, heading, "training steps", column.replace("_", " ") + " (nats)" * column.endswith("loss"))
    return figure
