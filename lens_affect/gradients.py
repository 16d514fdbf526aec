"""Attribution patching: every patch of a map at once, to first order, from one forward and one backward pass per batch.

The effect of replacing an activation is estimated by (source - own) times the gradient of the metric at the text's own activation
(Nanda 2023, "Attribution patching"). It costs two forward passes and one backward pass for all sites, layers and positions together, so larger models
can afford it; how far it can be trusted is measured beside the exact map (`agreement`).
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from lens_affect.adapter import LensModel, add_hooks, logits_of, model_info, run_trunk
from lens_affect.contrasts import ContrastPairs
from lens_affect.matching import MatchedPairs, match_pairs
from lens_affect.patching import GATE_AGAINST_SIBLINGS, PatchingMap, check_patching, places_of
from lens_affect.results import Stopwatch
from lens_affect.selfchecks import ensure_checked
from lens_affect.sites import resolve_site

ROWS_AT_ONCE = 8
"""Pairs per pass: the graph of a batch holds every activation and its gradient."""


def approximate_patches(
    model: LensModel,
    pairs: ContrastPairs,
    *,
    sites: Sequence[str] = GATE_AGAINST_SIBLINGS,
    layers: Sequence[int] | None = None,
    positions: str = "all",
    direction: str = "denoise",
    drop: bool | None = None,
    rows_at_once: int = ROWS_AT_ONCE,
    progress: Callable[[int, int], None] | None = None,
) -> PatchingMap:
    """First-order estimate of what patch_sites measures, for the logit difference.

    Args:
        model: a bridge or a HookedTransformer.
        pairs: texts of equal token length.
        sites: names from sites.SITES.
        layers: 0-based blocks; all by default.
        positions: `all`, `last` or `each`, as in patch_sites.
        direction: `denoise` or `noise`.
        drop: leave out pairs of unequal length, as in patch_sites.
        rows_at_once: pairs per pass.
        progress: called with (pairs done, pairs in all).

    Returns:
        A map without controls; `change` is NaN, as nothing was patched.

    Raises:
        ValueError: as patch_sites.
    """
    clock = Stopwatch()
    chosen = check_patching(model, sites, layers, positions, "logit_difference", direction, ())
    matched = match_pairs(model, pairs, drop=drop)
    ensure_checked(model)
    n, places = len(matched), places_of(matched, positions)
    effects = torch.full((n, len(sites), len(chosen), len(places)), torch.nan)
    gap = torch.empty(n)
    reader = _GradientReader(model, sites, chosen)
    for start in range(0, n, rows_at_once):
        rows = torch.arange(start, min(start + rows_at_once, n))
        products, gap[rows] = _one_batch(reader, matched, rows, direction)  # products: site, layer, row, position
        for k, place in enumerate(places.values()):
            for i, row in enumerate(rows.tolist()):
                first, last = int(matched.first[row]), int(matched.last[row])
                low, high = (first, last) if place is None else (last - place + 1, last - place + 1)
                if low >= first:
                    effects[row, :, :, k] = products[:, :, i, low : high + 1].sum(-1)
        if progress is not None:
            progress(int(rows[-1]) + 1, n)
    return PatchingMap(
        effect_raw=effects,
        change=torch.full_like(effects, torch.nan),
        controls={},
        control_changes={},
        gap=gap,
        sites=tuple(sites),
        layers=chosen,
        positions=tuple(places),
        groups=matched.pairs.groups,
        metric="logit_difference",
        read_layer=None,
        direction=direction,
        n_layers=int(model.cfg.n_layers),
        dropped=matched.dropped,
        words_left_out=matched.words_left_out,
        way="gradient: first order",
        seed=0,
        name=pairs.name,
        provenance=model_info(model).provenance.updated(
            stimuli_hash=matched.pairs.hash, bos=matched.bos, elapsed_seconds=clock.seconds
        ),
    )


class _GradientReader:
    """Activations of all sites and layers, and their gradients, of one batch at a time."""

    def __init__(self, model: LensModel, sites: Sequence[str], layers: Sequence[int]) -> None:
        self.model = model
        self.names = [[resolve_site(model, site).at(layer) for layer in layers] for site in sites]
        self._entry = resolve_site(model, "resid_pre").at(0)
        self._seen: dict[str, Tensor] = {}

    def _keep(self, name: str) -> tuple[str, Callable[..., Tensor | None]]:
        def hook(value: Tensor, hook: object = None) -> Tensor | None:
            if not value.requires_grad:
                self._seen[name] = value
                return None
            # A copy that is put back: what a hook returns is what is used, while the tensor it is shown may be a bystander.
            self._seen[name] = value.clone()
            return self._seen[name]

        return name, hook

    @staticmethod
    def _enter(value: Tensor, hook: object = None) -> Tensor:
        return value.detach().requires_grad_(True)  # the graph starts here, whether or not the weights want gradients

    def values(self, tokens: Tensor, mask: Tensor) -> list[list[Tensor]]:
        """Activations `[row, position, width]` by site and layer."""
        with add_hooks(self.model, [self._keep(name) for names in self.names for name in names]):
            run_trunk(self.model, tokens, mask)
        return [[self._seen[name].detach().flatten(2) for name in names] for names in self.names]

    def products(
        self, tokens: Tensor, mask: Tensor, metric: Callable[[Tensor], Tensor], sources: list[list[Tensor]]
    ) -> tuple[Float[Tensor, "site layer row position"], Float[Tensor, " row"]]:
        """(source - own) times gradient, summed over the width; and the metric per row."""
        hooks = [(self._entry, self._enter)] + [self._keep(name) for names in self.names for name in names]
        with torch.enable_grad(), add_hooks(self.model, hooks):
            value = metric(logits_of(self.model, tokens, mask))
            kept = [self._seen[name] for names in self.names for name in names]
            # Only these gradients: a backward pass would also compute that of every weight.
            gradients = iter(torch.autograd.grad(value.sum(), kept, allow_unused=True))
        found = []
        for names, of_site in zip(self.names, sources, strict=True):
            of_layers = []
            for name, source in zip(names, of_site, strict=True):
                own, gradient = self._seen[name].detach(), next(gradients)
                if gradient is None:  # nothing downstream reads it
                    gradient = torch.zeros_like(own)
                of_layers.append(((source - own.flatten(2)) * gradient.flatten(2)).sum(-1).float().cpu())
            found.append(torch.stack(of_layers))
        self._seen.clear()
        return torch.stack(found), value.detach().float().cpu()


def _one_batch(
    reader: _GradientReader, matched: MatchedPairs, rows: Tensor, direction: str
) -> tuple[Float[Tensor, "site layer row position"], Float[Tensor, " row"]]:
    mask, last, at = matched.mask[rows], matched.last[rows], torch.arange(len(rows))
    start, target = (matched.corrupted, matched.clean) if direction == "denoise" else (matched.clean, matched.corrupted)
    sign = 1.0 if direction == "denoise" else -1.0

    def metric(logits: Tensor) -> Tensor:
        return sign * matched.log_odds(logits[at, last], rows)

    with torch.no_grad():
        goal = metric(logits_of(reader.model, target[rows], mask)).cpu()
    products, value = reader.products(start[rows], mask, metric, reader.values(target[rows], mask))
    return products, goal - value


def agreement(exact: PatchingMap, approximate: PatchingMap) -> pd.DataFrame:
    """How well an approximate map tells the cells of an exact one apart, per site.

    Args:
        exact: of patch_sites.
        approximate: of approximate_patches, with the same pairs, sites, layers and positions.

    Returns:
        One row per site: `rho_cells` (rank correlation of the normalized effects over layers and positions), `rho_pairs` (the same over
        single pairs), `slope` (exact on approximate effect, least squares through 0; above 1 the approximation is too small), `n` cells.

    Raises:
        ValueError: maps of different pairs, sites, layers or positions.
    """
    for name in ("sites", "layers", "positions", "groups", "direction", "metric", "read_layer"):
        if getattr(exact, name) != getattr(approximate, name):
            raise ValueError(
                f"received maps with different {name} ({getattr(exact, name)!r:.80} and {getattr(approximate, name)!r:.80}); make both from the "
                "same pairs with the same arguments"
            )
    cells = [m.normalized()[0] for m in (exact, approximate)]
    table = []
    for i, site in enumerate(exact.sites):
        one, two = (c[i].ravel() for c in cells)
        a, b = (m.effect_raw[:, i].numpy().ravel() for m in (exact, approximate))
        known = np.isfinite(a) & np.isfinite(b)
        slope = float(np.dot(one, two) / np.dot(two, two)) if np.dot(two, two) else float("nan")
        table.append([site, _rank_correlation(one, two), _rank_correlation(a[known], b[known]), slope, len(one)])
    return pd.DataFrame(table, columns=["site", "rho_cells", "rho_pairs", "slope", "n"])


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1])
