"""Token views: a text whose tokens are coloured by a number, as a small piece of HTML or through CircuitsVis.

Ours needs no library, no script tag and no id: a slider carries its own handler, so a view works in Jupyter, on any page, and several times
on one. Nothing is loaded from anywhere, and every token is escaped.
"""

import html
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lens_affect.results import write_text_atomically

NEGATIVE, POSITIVE = (0, 114, 178), (213, 94, 0)
"""Blue and vermillion of Okabe and Ito, the ends of plotting's diverging scale; white is 0."""
_STRONGEST = 0.85
"""Opacity of the ends of the scale: black text on them keeps a contrast above 4.5."""
LIMIT_QUANTILE = 0.9
"""Share of the counted values, over all layers, that lies within the colour scale: the last layers are long and would make all others pale."""

_STYLE = (
    ".lav{background:#fff;color:#111;font:15px/1.9 system-ui,sans-serif;padding:.6em .8em;max-width:960px}"
    ".lav .t{white-space:pre-wrap;padding:.15em .1em;margin:0 1px;border-radius:2px;unicode-bidi:isolate}"
    ".lav .n{background:#eee;color:#666}"
    ".lav .b{display:inline-block;width:11em;height:.8em;margin:0 .5em;vertical-align:middle;border:1px solid #ccc}"
    ".lav .k{font-size:.8em;color:#444;line-height:1.5;margin-top:.6em}.lav input{vertical-align:middle;width:16em}.lav b{font-weight:600}"
)
# Colours and titles of all tokens, for the slider's value; the same rule as _cell.
_HANDLER = (
    "var r=this.closest('.lav'),d=JSON.parse(r.dataset.view),v=d.v[this.value];r.querySelector('output').textContent=d.l[this.value];"
    "r.querySelectorAll('.t').forEach(function(e,i){var x=v[i],c=d.s[i]&&x!==null;"
    "if(d.s[i])e.className=c?'t':'t n';"
    "e.style.background=c?'rgba('+(x<0?d.n:d.p)+','+(Math.min(Math.abs(x)/d.m,1)*d.o).toFixed(3)+')':'';"
    "e.title=(x===null?'not measured':(x<0?'\\u2212':'+')+Math.abs(x))+(d.s[i]?'':' (not counted)')+', position '+i})"
)


@runtime_checkable
class HasTokens(Protocol):
    """A result about the tokens of one text, such as DirectAttribution or LayerProjections."""

    @property
    def tokens(self) -> tuple[str, ...]:
        """The tokens as text."""
        ...

    @property
    def content(self) -> tuple[int, ...]:
        """Positions that count."""
        ...

    @property
    def emotion(self) -> str:
        """What the values are about."""
        ...


@dataclass(frozen=True)
class TokenView:
    """A view that shows itself in Jupyter and saves itself as a page."""

    html: str
    """A fragment that loads nothing: paste it into any page, as often as wanted."""
    title: str = "Tokens"
    """Title of the saved page."""

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a page of its own and return its path."""
        return write_page(path, self.title, [self.html])

    def _repr_html_(self) -> str:
        return self.html

    def __str__(self) -> str:
        return f"{self.title} ({len(self.html.encode()) / 1000:.0f} kB of HTML; .save(path) writes a page)"


def write_page(path: str | os.PathLike[str], title: str, fragments: Sequence[str]) -> Path:
    """Write fragments of HTML as one page that loads nothing.

    Args:
        path: where to.
        title: of the page; escaped here.
        fragments: HTML, already escaped.

    Returns:
        The path.
    """
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>body{{font:16px/1.5 system-ui,sans-serif;max-width:960px;margin:2rem auto;padding:0 1rem;"
        "color:#222}h1{font-size:1.3rem}h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse;font-size:.85rem}td,th{padding:.2rem "
        ".6rem;border-bottom:1px solid #eee;text-align:right}td:first-child,th:first-child{text-align:left}.note{color:#555;font-size:.9rem}</style>"
        f"</head>\n<body>\n<h1>{html.escape(title)}</h1>\n" + "\n".join(fragments) + "\n</body></html>\n"
    )
    return write_text_atomically(path, page)


def view_tokens(
    source: HasTokens | Sequence[str],
    values: Float[Tensor, " token"] | Float[Tensor, "layer token"] | Sequence[Any],
    *,
    layers: Sequence[int] | None = None,
    start_layer: int | None = None,
    counted: Sequence[int] | None = None,
    limit: float | int | None = None,
    unit: str = "",
    title: str | None = None,
) -> TokenView:
    """Show a text with its tokens coloured by a value: blue below 0, white at 0, vermillion above; with a slider over layers.

    Spaces, newlines and tabs inside tokens are made visible. Tokens that do not count are grey; their value is in the tooltip.

    Args:
        source: an attribution, layer projections, or plain tokens.
        values: one per token, or `[layer, token]`; NaN is shown as not measured.
        layers: names of the layer axis; the source's own, or 0, 1, ... by default.
        start_layer: the layer that is shown first; the middle one by default.
        counted: positions that set the colour scale; the source's content, or all, by default.
        limit: value of the full colour; by default the 0.9 quantile of the counted values' sizes over all layers, so that one scale
            serves every layer.
        unit: of the values, for the legend.
        title: a default names the emotion.

    Returns:
        The view; its fragment is below 40 KB for 30 layers and 60 tokens.

    Raises:
        ValueError: values that do not fit the tokens or layers, or a limit that is not positive.

    Example:
        >>> view_tokens(["I", " ran"], [0.1, -0.4]).save("view.html")  # doctest: +SKIP
    """
    tokens, grid, names, kept = _checked(source, values, layers, counted)
    if start_layer is not None and start_layer not in names:
        raise ValueError(f"received start_layer={start_layer}; allowed are {names[0]} to {names[-1]}")
    if limit is not None and not limit > 0:
        raise ValueError(f"received limit={limit}; allowed is a positive number")
    full = float(limit or _limit(grid, kept))
    first = len(names) // 2 if start_layer is None else names.index(start_layer)
    what = title or (f"Projection on {source.emotion}" if isinstance(source, HasTokens) else "Tokens")
    spans = "".join(_cell(token, grid[first, i].item(), i, i in kept, full) for i, token in enumerate(tokens))
    slider, data = "", ""
    if len(names) > 1:
        slider = (
            f'<div><label>layer <input type="range" min="0" max="{len(names) - 1}" value="{first}" oninput="{html.escape(_HANDLER)}"></label> '
            f"<output>{names[first]}</output> (of {names[0]} to {names[-1]})</div>"
        )
        view = {
            "v": [[_rounded(x) for x in row] for row in grid.tolist()],
            "l": list(names),
            "s": [int(i in kept) for i in range(len(tokens))],
            "m": full,
            "o": _STRONGEST,
            "n": ",".join(map(str, NEGATIVE)),
            "p": ",".join(map(str, POSITIVE)),
        }
        data = f' data-view="{html.escape(json.dumps(view, separators=(",", ":")))}"'
    fragment = f'<div class="lav"{data}><style>{_STYLE}</style><b>{html.escape(what)}</b>{slider}<div>{spans}</div>{_legend(full, unit, len(names) > 1)}</div>'
    return TokenView(fragment, what)


def _checked(
    source: HasTokens | Sequence[str], values: Any, layers: Sequence[int] | None, counted: Sequence[int] | None
) -> tuple[tuple[str, ...], Float[Tensor, "layer token"], tuple[int, ...], frozenset[int]]:
    """Tokens, values as `[layer, token]`, layer names and counted positions."""
    tokens = tuple(source.tokens if isinstance(source, HasTokens) else source)
    grid = torch.as_tensor(values).detach().float().cpu()
    if grid.ndim not in (1, 2) or grid.shape[-1] != len(tokens) or not grid.numel():
        raise ValueError(
            f"received values of shape {list(grid.shape)} for {len(tokens)} tokens; allowed are [{len(tokens)}] and [layers, {len(tokens)}]"
        )
    grid = grid.reshape(-1, len(tokens))
    own = getattr(source, "layers", None)
    given = layers if layers is not None else own if own is not None and len(own) == len(grid) else range(len(grid))
    names = tuple(given)
    if len(names) != len(grid):
        raise ValueError(f"received {len(names)} layers for {len(grid)} rows of values; allowed is one for each")
    given = counted if counted is not None else source.content if isinstance(source, HasTokens) else range(len(tokens))
    kept = frozenset(given)
    if any(not 0 <= i < len(tokens) for i in kept):
        raise ValueError(f"received counted positions up to {max(kept)}; allowed are 0 to {len(tokens) - 1}")
    return tokens, grid, names, kept


def _limit(grid: Float[Tensor, "layer token"], kept: frozenset[int]) -> float:
    sizes = grid[:, sorted(kept)].abs()
    sizes = sizes[sizes.isfinite()].double()
    found = torch.quantile(sizes, LIMIT_QUANTILE).item() if sizes.numel() else 0.0
    return float(f"{found:.3g}") or 1.0


def _rounded(value: float) -> float | None:
    return float(f"{value:.3g}") if math.isfinite(value) else None


def _cell(token: str, value: float, position: int, counts: bool, limit: float) -> str:
    x = _rounded(value)
    said = "not measured" if x is None else f"{'−' if x < 0 else '+'}{abs(x):g}"
    said += ("" if counts else " (not counted)") + f", position {position}"
    if not counts or x is None:
        look = ' class="t n"'
    else:
        colour = ",".join(map(str, NEGATIVE if x < 0 else POSITIVE))
        look = f' class="t" style="background:rgba({colour},{min(abs(x) / limit, 1) * _STRONGEST:.3f})"'
    return f'<span{look} title="{said}">{html.escape(visible(token))}</span>' + ("<br>" if "\n" in token else "<wbr>")


def visible(token: str) -> str:
    """A token with its spaces, newlines and tabs made visible; other control characters become a replacement character."""
    marked = token.replace(" ", "·").replace("\n", "↵").replace("\t", "→").replace("\r", "␍")
    return "".join(c if c.isprintable() else "�" for c in marked)


def _legend(limit: float, unit: str, layered: bool) -> str:
    ends = [f"rgba({','.join(map(str, c))},{_STRONGEST})" for c in (NEGATIVE, POSITIVE)]
    scale = "one scale for all layers; " if layered else ""
    return (
        f'<div class="k">−{limit:g}<span class="b" style="background:linear-gradient(90deg,{ends[0]},#fff,{ends[1]})"></span>+{limit:g} '
        f"{html.escape(unit)} ({scale}stronger values take the end colour; grey: not counted; hover for values; · space, ↵ newline)</div>"
    )


def circuitsvis_view(
    source: HasTokens | Sequence[str],
    values: Float[Tensor, " token"] | Float[Tensor, "layer token"] | Sequence[Any],
    *,
    layers: Sequence[int] | None = None,
    title: str | None = None,
) -> TokenView:
    """The same text through CircuitsVis' `colored_tokens_multi`, with its library inside: 1.3 MB that load nothing.

    For pages of their own (`.save`); notebooks and reports are better served by view_tokens. CircuitsVis' own object would link a content
    delivery network when printed, and ask the network when shown. Its colours are its own: blue is positive, red negative, each layer has
    its own scale, and every token counts, the attention sink too.

    Args:
        source: an attribution, layer projections, or plain tokens.
        values: one per token, or `[layer, token]`; must be finite.
        layers: names of the layer axis; the source's own, or 0, 1, ... by default.
        title: a default names the emotion.

    Returns:
        The view.

    Raises:
        ValueError: values that do not fit the tokens or layers, or are not finite (they cannot be written as JSON).
    """
    from circuitsvis.tokens import colored_tokens_multi

    tokens, grid, names, _ = _checked(source, values, layers, None)
    if not grid.isfinite().all():
        raise ValueError(
            "received values that are not finite; CircuitsVis shows finite numbers only: use view_tokens, which marks what is not measured"
        )
    # CircuitsVis writes tokens as JSON into a script tag, where "</script>" ends the script in spite of its quotes. So each "<" travels as
    # a private-use letter (removed from the text itself), which JSON writes as an escape, and that escape becomes the one of "<".
    stand_in = "\ue0f3"
    shown = [token.replace(stand_in, "").replace("<", stand_in) for token in tokens]
    view = colored_tokens_multi(shown, grid.T.contiguous(), [f"layer {n}" for n in names])
    what = title or (f"Projection on {source.emotion}" if isinstance(source, HasTokens) else "Tokens")
    fragment = view.local_src.replace('margin: 15px 0;"/>', 'margin: 15px 0;"></div>')
    return TokenView(fragment.replace(json.dumps(stand_in)[1:-1], "\\u003c"), what)
