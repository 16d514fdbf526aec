"""Weight deltas and ablation tables in, plotly figures out. Titles state the finding; intervals are always drawn."""

from typing import Any

import numpy as np
import plotly.graph_objects as go

from lens_affect.deltas import ModuleDelta
from lens_affect.plotting_patching import SITE_COLOURS
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
COLOURS = {
    **SITE_COLOURS,
    "o": "#7F7F7F",
    "down": "#000000",
    "attention": "#009E73",
    "mlp": "#882255",
    "all": "#332288",
}
"""Colour of an arm; those of a patched site where there is one."""


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
        title: a finding; by default the most selective arm.
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
            marker={"size": 9, "color": COLOURS.get(arm, PALETTE[i % len(PALETTE)])},
            name=arm,
            customdata=rows[["affect_loss", "control_loss", "scale"]].to_numpy(),
            hovertemplate=f"{arm}: %{{y:.2f}} (affect %{{customdata[0]:.2f}}, control %{{customdata[1]:.2f}}, scale %{{customdata[2]:.3g}})<extra></extra>",
        )
    figure.add_hline(y=0, line={"color": "#666666", "width": 1})
    set_layout(figure, title or str(found).replace("\n", "<br>"), "blocks", "affect lost - control lost (SD)")
    figure.update_xaxes(tickvals=list(range(len(bands))), ticktext=bands, range=[-0.5, len(bands) - 0.5])
    return figure
