"""Weight deltas, scores of modules and ablation tables in, plotly figures out. Titles state the finding; intervals are always drawn."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from lens_affect.deltas import ModuleDelta
from lens_affect.part_scores import PartScores
from lens_affect.plotting_patching import ARM_COLOURS
from lens_affect.selectivity import AblationTable
from lens_affect.style import PALETTE, set_layout

MEASURES = {
    "concentration": "share of change / share of parameters",
    "concentration_to_control": "share of change / the control's",
    "share_of_change": "share of the squared change",
    "relative_frobenius": "|change| / |base|",
    "spectral": "spectral norm of change / base",
    "effective_rank": "effective rank",
}
"""What a delta's heatmap can show, with the words on its scale."""
_RATIOS = ("concentration", "concentration_to_control")


def plot_delta(found: ModuleDelta, *, measure: str = "concentration", title: str | None = None) -> go.Figure:
    """Change of every linear module at every block as a heatmap.

    Args:
        found: of compare_modules.
        measure: a key of MEASURES; ratios are coloured on a log scale around 1, each module's fair share.
        title: a finding; by default where most of the change is, against the share of parameters.

    Raises:
        ValueError: an unknown measure, one that was not made, or a delta of 0.
    """
    table: Any = found.to_frame()
    if measure not in MEASURES or measure not in table or not np.isfinite(table[measure].to_numpy(float)).any():
        raise ValueError(
            f"received measure {measure!r}; this delta has {[m for m in MEASURES if m in table and table[m].notna().any()]}"
        )
    wide: Any = table.pivot(index="module", columns="layer", values=measure).loc[list(dict.fromkeys(table["module"]))]
    values = wide.to_numpy(float)
    ratio = measure in _RATIOS
    with np.errstate(divide="ignore"):
        shown = np.log2(values) if ratio else values
    shown = np.where(np.isfinite(shown), shown, np.nan)
    limit = max(float(np.nanmax(np.abs(shown))), 0.1) if ratio else None
    bar: dict[str, Any] = {"title": {"text": MEASURES[measure].replace(" / ", "<br>/ ")}}
    if ratio and limit:
        ticks = np.linspace(-limit, limit, 5)
        bar |= {"tickvals": ticks.tolist(), "ticktext": [f"{2**t:.2g}" for t in ticks]}
    figure = go.Figure(
        go.Heatmap(
            z=shown,
            x=list(wide.columns),
            y=list(wide.index),
            customdata=values,
            colorscale="RdBu_r" if ratio else "Viridis",
            zmin=-limit if limit else 0.0,
            zmax=limit,
            colorbar=bar,
            hovertemplate="%{y}, layer %{x}: %{customdata:.4g}<extra></extra>",
        )
    )
    set_layout(figure, title or _delta_title(found), "layer (0-based block)", "module")
    figure.update_yaxes(autorange="reversed", showgrid=False)
    lines = 1 + str(figure.to_dict()["layout"]["title"]["text"]).count("<br>")
    figure.update_layout(margin={"t": 40 + 22 * lines}, title={"y": 0.95, "yanchor": "top"})
    return figure


def _delta_title(found: ModuleDelta) -> str:
    lines = str(found).splitlines()
    text = lines[1] if len(lines) > 1 else "nothing changed"
    first, _, second = text.partition("; ")
    return "<br>".join([found.provenance.title, first, *([second] if second else []), *lines[2:]])


def plot_selectivity(found: AblationTable, *, title: str | None = None) -> go.Figure:
    """Affect lost minus control lost of every arm in every band of blocks, with 95 % intervals; above 0 affect suffers more than the control.

    Args:
        found: of scan_ablations.
        title: a finding; by default the most selective place, and whether its interval lies above 0.
    """
    table: Any = found.to_frame()
    bands, arms = list(dict.fromkeys(found.bands)), list(dict.fromkeys(found.arms))
    figure = go.Figure()
    for i, arm in enumerate(arms):
        rows: Any = table[table["arm"] == arm]
        at = [bands.index(band) + 0.6 * ((i + 0.5) / len(arms) - 0.5) for band in rows["band"]]
        figure.add_scatter(
            x=at,
            y=rows["selectivity"],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": (rows["high"] - rows["selectivity"]).tolist(),
                "arrayminus": (rows["selectivity"] - rows["low"]).tolist(),
            },
            mode="markers",
            marker={"size": 9, "color": ARM_COLOURS.get(arm, PALETTE[i % len(PALETTE)])},
            name=arm,
            customdata=rows[["affect_loss", "control_loss", "scale"]].to_numpy(),
            hovertemplate=f"{arm}: %{{y:.2f}} (affect %{{customdata[0]:.2f}}, control %{{customdata[1]:.2f}}, scale %{{customdata[2]:.3g}})<extra></extra>",
        )
    figure.add_hline(y=0, line={"color": "#666666", "width": 1})
    set_layout(figure, title or _selectivity_finding(found), "blocks", f"affect lost - {found.control_name} lost (SD)")
    figure.update_xaxes(tickvals=list(range(len(bands))), ticktext=bands, range=[-0.5, len(bands) - 0.5])
    return figure


def _selectivity_finding(found: AblationTable) -> str:
    table: Any = found.to_frame()
    name, control = found.provenance.title, found.control_name
    if table["selectivity"].isna().all() or found.how == "zero":
        return str(found).replace("; ", "<br>")
    best: Any = table.loc[table["selectivity"].idxmax()]
    most = (
        f"{best['arm']} in blocks {best['band']}, {best['selectivity']:.2f} [{best['low']:.2f}, {best['high']:.2f}] SD"
    )
    n, of = int((table["low"] > 0).sum()), int(table["selectivity"].notna().sum())
    return f"{name}: affect is lost more than {control} in {n} of {of} places<br>(interval above 0, not corrected); most: {most}"


PART_WORDS = {
    "transfer": "brought by the<br>module alone",
    "revert": "lost without<br>its change",
    "random_equal_norm": "lost with noise<br>in its place",
    "equal_damage": "lost at equal<br>damage to language",
}
"""What is done to a module, on the axis."""


def plot_parts(found: PartScores | Sequence[PartScores], *, title: str | None = None) -> go.Figure:
    """Share of the gain of tuning that each module brings alone, or that goes with it, with 95 % intervals over seeds and examples.

    Args:
        found: of score_parts or join_parts, one or several kinds.
        title: a finding; by default the gate against its best sibling, for the first kind.

    Raises:
        ValueError: nothing, or nothing that has a share.
    """
    several = [found] if isinstance(found, PartScores) else list(found)
    tables: list[Any] = [part.to_frame() for part in several]
    if not any(bool(table["share"].notna().any()) for table in tables):
        raise ValueError("received no module with a share of the gain; tuning must have gained something for certain")
    arms = list(dict.fromkeys(arm for part in several for arm in part.arms))
    figure = go.Figure()
    for i, arm in enumerate(arms):
        rows = [table[table["arm"] == arm].to_dict("records") for table in tables]
        known = [(at, row[0]) for at, row in enumerate(rows) if row and np.isfinite(row[0]["share"])]
        figure.add_scatter(
            x=[at + 0.7 * ((i + 0.5) / len(arms) - 0.5) for at, _ in known],
            y=[row["share"] for _, row in known],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [row["share_high"] - row["share"] for _, row in known],
                "arrayminus": [row["share"] - row["share_low"] for _, row in known],
            },
            mode="markers",
            marker={"size": 9, "color": ARM_COLOURS.get(arm, PALETTE[i % len(PALETTE)])},
            name=arm,
            customdata=[(row["score"], row["n"], row["n_seeds"]) for _, row in known],
            hovertemplate=f"{arm}: %{{y:.2f}} (score %{{customdata[0]:.3f}}, n = %{{customdata[1]}}, %{{customdata[2]}} seeds)<extra></extra>",
        )
    figure.add_hline(y=0, line={"color": "#666666", "width": 1})
    figure.add_hline(y=1, line={"color": "#7F7F7F", "width": 1, "dash": "dot"})
    set_layout(figure, title or _parts_title(several[0]), "", "share of the gain of tuning everything")
    words = [PART_WORDS[part.kind] for part in several]
    figure.update_xaxes(tickvals=list(range(len(words))), ticktext=words, range=[-0.5, len(words) - 0.5])
    return figure


def _parts_title(found: PartScores) -> str:
    table: Any = found.to_frame().dropna(subset=["share"]).set_index("arm")
    singles = [arm for arm in table.index if "+" not in arm and arm not in ("mlp", "all", "gate")]
    if "gate" not in table.index or not singles:
        return str(found).replace("\n", "<br>")
    other = max(singles, key=lambda arm: table.loc[arm, "share"])
    try:
        pair = found.contrast("gate", other)
    except ValueError:  # measured at other seeds
        return str(found).replace("\n", "<br>")
    seen = "no difference was seen" if pair.low <= 0 <= pair.high else "the difference is beyond chance"
    verb = "brings" if found.kind == "transfer" else "takes with it"
    return (
        f"{found.provenance.title}: the gate {verb} {table.loc['gate', 'share']:.2f} of the gain, {other} {table.loc[other, 'share']:.2f}; {seen}"
        f"<br>(difference {pair.estimate:+.3f} [{pair.low:+.3f}, {pair.high:+.3f}] in {found.metric}, {len(found.before)} examples, {pair.n_seeds} seeds)"
    )
