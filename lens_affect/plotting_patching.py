"""Patching maps in, plotly figures out. Titles state the finding; intervals and random donors are always drawn."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from lens_affect.patching import SAME, PatchingMap
from lens_affect.statistics import jackknife_interval
from lens_affect.style import draw_band, set_layout

SIBLINGS = ("gate", "up", "attn_out", "mlp_out")
"""What plot_siblings draws by default: the gate, its fair rival, and the two ceilings."""
SITE_COLOURS = {
    "gate": "#D55E00",
    "up": "#0072B2",
    "mlp_out": "#000000",
    "attn_out": "#009E73",
    "q": "#56B4E9",
    "k": "#CC79A7",
    "v": "#E69F00",
}
"""Colour of a patched site; sites that carry the same patch (patching.SAME) share it."""
ARM_COLOURS = {
    **SITE_COLOURS,
    "o": "#7F7F7F",
    "down": SITE_COLOURS["mlp_out"],
    "attention": SITE_COLOURS["attn_out"],
    "mlp": "#882255",
    "all": "#332288",
    "random": "#7F7F7F",
}
"""Colour of weights that are compared: a module or a group, as of the patched site where there is one."""


def plot_patching(found: PatchingMap, *, position: str | None = None, title: str | None = None) -> go.Figure:
    """Normalized effect of every site at every layer; cells beyond a random donor are marked.

    Args:
        found: of patch_sites.
        position: one label of its position axis; the last by default.
        title: a finding; by default the cell with the largest effect.

    Raises:
        ValueError: a position that is not there.
    """
    place = position or found.positions[-1]
    if place not in found.positions:
        raise ValueError(f"received position {place!r}; this map has {list(found.positions)}")
    table = found.to_frame()
    table = pd.DataFrame(table[table["position"] == place])
    wide = {
        c: table.pivot(index="site", columns="layer", values=c).loc[list(found.sites)] for c in ("effect", "p_family")
    }
    figure = _heatmap(wide["effect"], "%{y}, layer %{x}: %{z:.3f}")
    _mark(figure, wide["p_family"], found)
    x_title = f"layer (0-based block); dots: family-wise p < 0.05 against {found.null}"
    set_layout(figure, title or _patching_title(found, table), x_title, "site")
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def plot_positions(found: PatchingMap, site: str, *, title: str | None = None) -> go.Figure:
    """Normalized effect of one site by layer and position, counted from the end of the text; cells beyond a random donor are marked.

    Args:
        found: of patch_sites, with positions `each`.
        site: one of its sites.
        title: a finding; by default the cell with the largest effect, among positions that half of the pairs have.

    Raises:
        ValueError: a site that was not patched.
    """
    if site not in found.sites:
        raise ValueError(f"received site {site!r}; this map has {list(found.sites)}")
    table = found.to_frame()
    table = pd.DataFrame(table[table["site"] == site])
    wide = {
        c: table.pivot(index="layer", columns="position", values=c).loc[list(found.layers), list(found.positions)]
        for c in ("effect", "p_family", "n")
    }
    figure = _heatmap(wide["effect"], "layer %{y}, position %{x}: %{z:.3f} (%{customdata} pairs)", wide["n"])
    _mark(figure, wide["p_family"], found)
    x_title = f"position, counted from the end (-1: last); dots: family-wise p < 0.05 against {found.null}"
    common = pd.DataFrame(table[2 * table["n"] >= table["n"].max()])  # a position that few pairs reach is no finding
    set_layout(figure, title or _patching_title(found, common), x_title, "layer (0-based block)")
    figure.update_xaxes(type="category")
    return figure


def _heatmap(values: pd.DataFrame, hover: str, beside: pd.DataFrame | None = None) -> go.Figure:
    """Effects in blue and red around 0, rows down."""
    limit = max(float(np.nanmax(np.abs(values.to_numpy(float)))), 1e-6)
    return go.Figure(
        go.Heatmap(
            z=values.to_numpy(float),
            x=list(values.columns),
            y=list(values.index),
            customdata=None if beside is None else beside.to_numpy(),
            colorscale="RdBu_r",
            zmin=-limit,
            zmax=limit,
            colorbar={"title": "effect (0: nothing, 1: all)"},
            hovertemplate=f"{hover}<extra></extra>",
        )
    )


def _mark(figure: go.Figure, p: pd.DataFrame, found: PatchingMap) -> None:
    """A dot on each cell beyond its null."""
    marked = [(x, y) for y in p.index for x in p.columns if p.loc[y, x] < 0.05]
    figure.add_scatter(
        x=[x for x, _ in marked],
        y=[y for _, y in marked],
        mode="markers",
        marker={"symbol": "circle", "size": 4, "color": "#000000"},
        name=f"family-wise p < 0.05 against {found.null}",
        hoverinfo="skip",
    )


def plot_siblings(
    found: PatchingMap,
    *,
    sites: Sequence[str] | None = None,
    per_change: bool = False,
    title: str | None = None,
) -> go.Figure:
    """The gate beside its siblings over depth, each with its interval over topics and, dotted, its random donor.

    Args:
        found: of patch_sites, with positions `all` or `last`.
        sites: which of its sites; by default those of SIBLINGS that were patched, or else its first four.
        per_change: effects divided by the relative change of the residual stream that the patch causes.
        title: a finding; by default the layer where the first site differs most from the second.

    Raises:
        ValueError: a site that was not patched, or a map of each position.
    """
    sites = sites or [s for s in SIBLINGS if s in found.sites] or found.sites[:4]
    missing = [s for s in sites if s not in found.sites]
    if missing or len(found.positions) != 1:
        raise ValueError(
            f"received sites {list(sites)} and a map of {list(found.sites)} at positions {list(found.positions)[:3]}; one figure shows patched "
            "sites at one position: patch_sites(positions='all' or 'last')"
        )
    depth = (np.array(found.layers) + 1) / found.n_layers
    figure = go.Figure()
    whole, without = found.normalized(per_change=per_change)
    interval = jackknife_interval(whole, without)
    random = found.normalized(donor="random", per_change=per_change)[0] if "random" in found.controls else None
    for site in sites:
        i, colour = found.sites.index(site), SITE_COLOURS.get(SAME.get(site, site), "#7F7F7F")
        draw_band(figure, depth, interval.low[i, :, 0], interval.high[i, :, 0], colour, None, opacity=0.15)
        figure.add_scatter(
            x=depth, y=whole[i, :, 0], mode="lines+markers", line={"color": colour}, marker={"size": 5}, name=site,
            customdata=list(found.layers), hovertemplate=f"{site}, layer %{{customdata}}: %{{y:.3f}}<extra></extra>",
        )  # fmt: skip
        if random is not None:
            figure.add_scatter(
                x=depth, y=random[i, :, 0], mode="lines", line={"color": colour, "dash": "dot", "width": 1},
                name=f"{site}, random donor", showlegend=False, hovertemplate=f"{site}, random donor: %{{y:.3f}}<extra></extra>",
            )  # fmt: skip
    figure.add_hline(y=0, line={"color": "#666666", "width": 1})
    unit = "effect per relative change of resid_post" if per_change else "effect (0: nothing, 1: all)"
    set_layout(
        figure,
        title
        or _siblings_title(
            found, sites[0], [s for s in ("up", "attn_out") if s in sites[1:]] or sites[1:2], per_change
        ),
        "depth: (layer + 1) / layers; dotted: random donor",
        unit,
    )
    figure.update_layout(margin={"t": 110}, title={"font": {"size": 15}})
    return figure


def _patching_title(found: PatchingMap, table: pd.DataFrame) -> str:
    best: Any = table.loc[table["effect"].idxmax()]
    return (
        f"{found.provenance.title}, {found.name}, {found.direction} by {found.measured}, position {best['position']}<br>the largest effect is {best['effect']:.2f} "
        f"[{best['low']:.2f}, {best['high']:.2f}], {best['site']} at layer {best['layer']} (n = {best['n']} pairs)"
    )


def _siblings_title(found: PatchingMap, first: str, rivals: Sequence[str], per_change: bool) -> str:
    parts = []
    for rival in rivals:
        table = found.compare(first, rival, per_change=per_change)
        layers, mean = table.iloc[:-1], table.iloc[-1]
        above, below = (layers[side]["layer"].tolist() for side in (layers["low"] > 0, layers["high"] < 0))
        where = f"beyond {rival} at layer {', '.join(map(str, above))}" if above else f"beyond {rival} at no layer"
        behind = f", behind it at {', '.join(map(str, below))}" if below else ""
        of_mean = f"{mean['difference']:+.3f} [{mean['low']:+.3f}, {mean['high']:+.3f}]"
        parts.append(f"{first} is {where}{behind} (mean over layers {of_mean})")
    head = (
        f"{found.provenance.title}, {found.name}, {found.direction} by {found.measured}, position {found.positions[0]}"
    )
    return f"{head}; family-wise 95 %<br>" + "<br>".join(parts)
