"""Where a fine-tune changed the weights: every linear module and block, measured against its own size, its share of parameters and a control.

Absolute changes favour large matrices, so the share of the squared change stands beside the share of parameters; relative ones depend on the size
of the base weight. Neither says that the change is about affect: only a control fine-tune of the same size does. A large change is also not a
used one; transfers.py and ablations.py ask that.
"""

import html
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_affect.checkpoint_pairs import CheckpointPair, open_pair
from lens_affect.delta_agreement import DeltaAgreement, compare_changes
from lens_affect.lora import LowRank, multiplied
from lens_affect.results import Provenance, Stopwatch, git_state, load_result, package_versions, save_result
from lens_affect.sizes import MODULES
from lens_affect.spectra import (
    BLOCK_ENTRIES,
    effective_rank,
    product_singular_values,
    singular_values,
    spectral_norm,
    squared_norm,
)
from lens_affect.statistics import jackknife_interval, mean_interval


@dataclass(frozen=True)
class ModuleDelta:
    """How much each tensor changed from base to tuned."""

    modules: tuple[str, ...]
    """Module of each tensor: q, k, v, o, gate, up, down, or embed, unembed, norm, bias, other."""
    layers: tuple[int, ...]
    """0-based block of each tensor; -1 outside the blocks."""
    change_norm: Float[Tensor, " tensor"]
    """Frobenius norm of tuned minus base."""
    base_norm: Float[Tensor, " tensor"]
    """Frobenius norm of the base."""
    entries: Int[Tensor, " tensor"]
    """Number of entries that were compared."""
    change_spectral: Float[Tensor, " tensor"]
    """Largest singular value of the change; NaN where no spectrum was measured."""
    base_spectral: Float[Tensor, " tensor"]
    """Largest singular value of the base; NaN where no spectrum was measured."""
    effective_rank: Float[Tensor, " tensor"]
    """exp(entropy of the normalized singular values of the change); NaN where no spectrum was measured."""
    control_norm: Float[Tensor, " tensor"]
    """Frobenius norm of the control's change; NaN without a control."""
    n_layers: int
    """Blocks of the model."""
    control: str | None
    """Name of the control fine-tune."""
    base_source: str | None
    """What the base is opened by; None for a model in memory."""
    tuned_source: str | None
    """The same for the tuned side."""
    notes: tuple[str, ...]
    """What was left out or not checked."""
    provenance: Provenance
    """Both checkpoints, versions, time."""
    _pair: Any = field(default=None, init=False, repr=False, compare=False)

    def to_frame(self) -> pd.DataFrame:
        """One row per linear module and block: module, layer, depth, relative_frobenius, rms, spectral, effective_rank, share_of_change,
        share_of_parameters, concentration (their ratio: 1 is its fair share), change_norm, base_norm, parameters; with a control also
        ratio_to_control (of change norms) and concentration_to_control (of shares of change, so 1 where both fine-tunes land alike)."""
        rows: list[int] = self._linear
        change, base, size = (x[rows].double().numpy() for x in (self.change_norm, self.base_norm, self.entries))
        with np.errstate(invalid="ignore", divide="ignore"):
            share, of_size = change**2 / (change**2).sum(), size / size.sum()
            columns = {
                "module": [self.modules[i] for i in rows],
                "layer": [self.layers[i] for i in rows],
                "depth": [(self.layers[i] + 1) / self.n_layers for i in rows],
                "relative_frobenius": change / base,
                "rms": change / np.sqrt(size),
                "spectral": (self.change_spectral[rows] / self.base_spectral[rows]).double().numpy(),
                "effective_rank": self.effective_rank[rows].double().numpy(),
                "share_of_change": share,
                "share_of_parameters": of_size,
                "concentration": share / of_size,
                "change_norm": change,
                "base_norm": base,
                "parameters": self.entries[rows].numpy(),
            }
            if self.control is not None:
                other = self.control_norm[rows].double().numpy()
                columns["ratio_to_control"] = change / other
                columns["concentration_to_control"] = share / (other**2 / np.nansum(other**2))
        return pd.DataFrame(columns)

    @property
    def _linear(self) -> list[int]:
        order = {name: i for i, name in enumerate(MODULES)}
        found = [i for i, name in enumerate(self.modules) if name in order]
        return sorted(found, key=lambda i: (order[self.modules[i]], self.layers[i]))

    def others(self) -> pd.DataFrame:
        """What changed outside the linear modules: one row per kind (embed, unembed, norm, bias, other) with tensors, parameters, relative_frobenius, rms."""
        table: Any = pd.DataFrame(
            {
                "module": self.modules,
                "change": self.change_norm**2,
                "base": self.base_norm**2,
                "parameters": self.entries,
            }
        )
        table = table[~table["module"].isin(MODULES)].groupby("module", as_index=False, sort=False)
        found: Any = table.agg(
            tensors=("change", "size"), parameters=("parameters", "sum"), change=("change", "sum"), base=("base", "sum")
        )
        # norms of Gemma and biases start at 0, so a relative change may have nothing to be relative to: NaN where they moved
        found["relative_frobenius"] = np.sqrt((found["change"] / found["base"]).where(found["change"] > 0, 0.0))
        found["relative_frobenius"] = found["relative_frobenius"].where(np.isfinite(found["relative_frobenius"]))
        found["rms"] = np.sqrt(found["change"] / found["parameters"])
        return found.drop(columns=["change", "base"])

    def by_module(self) -> pd.DataFrame:
        """One row per linear module over all blocks: parameters, relative_frobenius and rms (pooled), spectral and effective_rank (means over blocks),
        share_of_change, share_of_parameters, concentration with low and high; with a control also ratio_to_control and
        concentration_to_control (geometric mean over blocks of the ratio of shares within each block) with its own low and high.

        Intervals are over blocks: they tell how evenly a module stands out over depth, not how a repeated fine-tune would vary (that takes seeds).
        """
        table: Any = self.to_frame()
        squared: Any = table.assign(change=table["change_norm"] ** 2, base=table["base_norm"] ** 2)
        found: Any = squared.groupby("module", as_index=False, sort=False).agg(
            parameters=("parameters", "sum"),
            change=("change", "sum"),
            base=("base", "sum"),
            spectral=("spectral", "mean"),
            effective_rank=("effective_rank", "mean"),
            share_of_change=("share_of_change", "sum"),
            share_of_parameters=("share_of_parameters", "sum"),
        )
        found.insert(2, "relative_frobenius", np.sqrt(found["change"] / found["base"]))
        found.insert(3, "rms", np.sqrt(found["change"] / found["parameters"]))
        found["concentration"] = found["share_of_change"] / found["share_of_parameters"]
        found["low"], found["high"] = self._concentration_limits(squared, list(found["module"]))
        if self.control is not None:
            other = table["change_norm"] / table["ratio_to_control"]
            sums = squared.assign(other=other**2).groupby("module", sort=False)[["change", "other"]].sum()
            found["ratio_to_control"] = np.sqrt(sums["change"] / sums["other"]).to_numpy()
            limits = [self._against_control(table, name) for name in found["module"]]
            for i, name in enumerate(("concentration_to_control", "control_low", "control_high")):
                found[name] = [limit[i] for limit in limits]
        return found.drop(columns=["change", "base"])

    @staticmethod
    def _concentration_limits(table: Any, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Delete-one-block jackknife of each module's share of change over its share of parameters."""
        change = table.pivot(index="layer", columns="module", values="change")[names].fillna(0.0).to_numpy(float)
        size = table.pivot(index="layer", columns="module", values="parameters")[names].fillna(0.0).to_numpy(float)

        def ratio(c: np.ndarray, s: np.ndarray) -> np.ndarray:
            with np.errstate(invalid="ignore", divide="ignore"):
                return (c / c.sum()) / (s / s.sum())

        if len(change) < 2:
            return np.full(len(names), np.nan), np.full(len(names), np.nan)
        without = np.stack([ratio(change.sum(0) - c, size.sum(0) - s) for c, s in zip(change, size, strict=True)])
        found = jackknife_interval(ratio(change.sum(0), size.sum(0)), without)
        return np.maximum(found.low, 0.0), found.high

    @staticmethod
    def _against_control(table: Any, name: str) -> tuple[float, float, float]:
        mine = table["change_norm"] ** 2
        other = (table["change_norm"] / table["ratio_to_control"]) ** 2
        with np.errstate(invalid="ignore", divide="ignore"):
            within = mine / mine.groupby(table["layer"]).transform("sum")
            ratio = np.log(within / (other / other.groupby(table["layer"]).transform("sum")))
        logs = ratio[table["module"] == name].to_numpy(float)
        if not len(logs) or not np.isfinite(logs).all():
            return math.nan, math.nan, math.nan
        interval = mean_interval(logs)
        return math.exp(interval.estimate), math.exp(interval.low), math.exp(interval.high)

    def compare(
        self, other: "ModuleDelta", *, rank: int = 8, progress: Callable[[int, int], None] | None = None
    ) -> "DeltaAgreement":
        """Do two fine-tunes of one base change a module alike? Cosine and principal angles, module by module and block by block.

        Both pairs are read again, one tensor at a time.

        Args:
            other: of another task, seed or strategy (full or LoRA).
            rank: directions of each change that are compared; fewer where a change has fewer.
            progress: called with (tensors done, tensors in all).

        Raises:
            ValueError: other shapes, or a result that was loaded and whose models were in memory.
        """
        names = (self.provenance.model, other.provenance.model)
        return compare_changes(self._opened(), other._opened(), names, self.provenance, rank=rank, progress=progress)

    def _opened(self) -> CheckpointPair:
        if self._pair is not None:
            return self._pair
        if self.base_source is None or self.tuned_source is None:
            raise ValueError(
                "received a loaded result whose models were in memory; run compare_modules again in this session, or from folders"
            )
        return open_pair(self.base_source, self.tuned_source, any_base=True)

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Save as a folder (see results.py)."""
        return save_result(self, folder, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "ModuleDelta":
        """Load what `save` wrote."""
        return load_result(cls, folder)

    def __str__(self) -> str:
        table: Any = self.by_module()
        n = len(set(self.to_frame()["layer"]))
        head = f"{self.provenance.title}: {len(self._linear)} linear modules in {n} blocks"
        if not float(table["relative_frobenius"].max()) > 0:
            return f"{head}; none changed"
        best: Any = table.loc[table["concentration"].idxmax()]
        largest: Any = table.loc[table["share_of_change"].idxmax()]
        text = (
            f"{head}\n{best['module']} has {best['concentration']:.2f} [{best['low']:.2f}, {best['high']:.2f}] times its share of parameters in the "
            f"squared change (95 % over blocks); most of the change, {largest['share_of_change']:.0%}, is in {largest['module']}, which holds "
            f"{largest['share_of_parameters']:.0%} of the parameters"
        )
        if self.control is None:
            return text + "\nno control fine-tune: nothing here says that this is about the task"
        high: Any = table.loc[table["concentration_to_control"].fillna(-1).idxmax()]
        return text + (
            f"\nagainst the control {self.control}, {high['module']} has {high['concentration_to_control']:.2f} [{high['control_low']:.2f}, "
            f"{high['control_high']:.2f}] times its share"
        )

    def _repr_html_(self) -> str:
        table = self.by_module().round(4)
        return f"<p>{html.escape(str(self)).replace(chr(10), '<br>')}</p>{table.to_html(index=False, border=0)}"


def compare_modules(
    base: Any,
    tuned: Any,
    *,
    control: Any = None,
    spectrum: bool = True,
    any_base: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ModuleDelta:
    """Measure what changed between two checkpoints, one tensor at a time.

    Memory beyond the libraries is at most about 16 bytes per entry of the largest linear module (1.1 GB for a 7B model) plus its Gram matrix;
    `delta_plans.plan_delta` states it, with the time, before anything is read.

    Args:
        base: a folder, hub id, catalogue name, GGUF file, Hugging Face model or TransformerBridge.
        tuned: the same, or a LoRA adapter (folder, hub id, PeftModel), which is read without merging.
        control: a fine-tune of the same base on something else (shuffled labels, a task without affect), or its ModuleDelta.
        spectrum: also singular values: spectral norms and effective rank (most of the time; NaN without).
        any_base: take an adapter whose config names another base.
        progress: called with (tensors done, tensors in all).

    Returns:
        The changes. `to_frame()` has one row per module and block.

    Raises:
        ValueError: checkpoints that do not fit each other, or a change that is not finite.
        FetchError: neither the package index nor the hub can be reached.

    Source: the measures that arXiv:2601.15906 leaves open, beside each other; effective rank after Roy and Vetterli (2007).

    Example:
        >>> compare_modules("base-folder", "tuned-folder").to_frame()  # doctest: +SKIP
    """
    watch = Stopwatch()
    pair = open_pair(base, tuned, any_base=any_base)
    beside = _control_norms(pair, control, any_base)
    total = len(pair.keys)
    rows = []
    for i, key in enumerate(pair.keys):
        part = pair.base.parts[key]
        rows.append(_measure(pair, key, spectrum and part.is_linear))
        if progress:
            progress(i + 1, total)
    rows += [_unchanged(pair, key, spectrum) for key in pair.untouched_keys]
    keys = (*pair.keys, *pair.untouched_keys)
    columns = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    parts = [pair.base.parts[key] for key in keys]
    commit, dirty = git_state()
    found = ModuleDelta(
        modules=tuple(p.module for p in parts),
        layers=tuple(p.layer for p in parts),
        **columns,
        control_norm=torch.tensor([beside[1].get(key, math.nan) for key in keys], dtype=torch.float64),
        n_layers=pair.base.n_layers,
        control=beside[0],
        base_source=pair.base.source,
        tuned_source=pair.tuned.source,
        notes=pair.notes,
        provenance=Provenance(
            model=f"{pair.base.title} -> {pair.tuned.title}",
            source=pair.base.source or "in memory",
            source_precision=pair.base.precision,
            versions=package_versions(),
            git_commit=commit,
            git_dirty=dirty,
            elapsed_seconds=watch.seconds,
        ),
    )
    object.__setattr__(found, "_pair", pair)  # what compare() reads again in this session
    return found


def _unchanged(pair: CheckpointPair, key: str, spectrum: bool) -> dict[str, float | int]:
    base = pair.base_weight(key)
    top = spectral_norm(base) if spectrum else math.nan
    zero = 0.0 if spectrum else math.nan
    return _row(0.0, squared_norm(base), base.numel(), zero, top, zero)


def _row(
    change: float, base: float, entries: int, change_spectral: float, base_spectral: float, rank: float
) -> dict[str, float | int]:
    return {
        "change_norm": math.sqrt(change),
        "base_norm": math.sqrt(base),
        "entries": entries,
        "change_spectral": change_spectral,
        "base_spectral": base_spectral,
        "effective_rank": rank,
    }


def _measure(pair: CheckpointPair, key: str, spectrum: bool) -> dict[str, float | int]:
    if not pair.base.parts[key].is_linear:
        return _measure_in_blocks(pair, key)
    change = pair.change(key)
    base = pair.base_weight(key)
    if isinstance(change, LowRank):
        _require_finite(squared_norm(change.left) + squared_norm(change.right), key)
        values = product_singular_values(change.left, change.right)
        squared = float(values.square().sum())
    else:
        squared = squared_norm(change)
        values = singular_values(change) if spectrum and squared > 0 and math.isfinite(squared) else torch.zeros(1)
    _require_finite(squared, key)
    base_squared = squared_norm(base)
    _require_finite(base_squared, key)
    if not spectrum:
        return _row(squared, base_squared, base.numel(), math.nan, math.nan, math.nan)
    return _row(squared, base_squared, base.numel(), float(values[0]), spectral_norm(base), effective_rank(values))


def _measure_in_blocks(pair: CheckpointPair, key: str) -> dict[str, float | int]:
    """Norms of a tensor that may be far larger than a module, some rows at a time."""
    squared = base_squared = 0.0
    entries = 0
    for rows in _row_blocks(pair, key):
        base = pair.base_weight(key, rows)
        squared += squared_norm(multiplied(pair.change(key, rows)))
        base_squared += squared_norm(base)
        entries += base.numel()
    _require_finite(squared, key)
    return _row(squared, base_squared, entries, math.nan, math.nan, math.nan)


def _row_blocks(pair: CheckpointPair, key: str) -> Iterator[slice]:
    shape = pair.base.parts[key].shape
    n = pair.rows.get(key, shape[0] if shape else 1)
    step = max(1, BLOCK_ENTRIES // max(1, math.prod(shape[1:])))
    for start in range(0, n, step):
        yield slice(start, min(n, start + step))


def _require_finite(squared: float, key: str) -> None:
    if not math.isfinite(squared):
        raise ValueError(
            f"received weights at {key} that are not finite; the fine-tune or its file is broken: take an earlier checkpoint"
        )


def _control_norms(pair: CheckpointPair, control: Any, any_base: bool) -> tuple[str | None, dict[str, float]]:
    """Name of the control, and the norm of its change by key."""
    if control is None:
        return None, {}
    found = control
    if not isinstance(control, ModuleDelta):
        found = compare_modules(pair.base, control, spectrum=False, any_base=any_base)
    norms = {
        (module, layer): float(norm)
        for module, layer, norm in zip(found.modules, found.layers, found.change_norm, strict=True)
        if module in MODULES
    }
    known = {
        key: norms[p.module, p.layer]
        for key, p in pair.base.parts.items()
        if p.is_linear and (p.module, p.layer) in norms
    }
    if set(known) != {key for key, part in pair.base.parts.items() if part.is_linear}:
        raise ValueError(
            f"received the control {found.provenance.model} with other modules or blocks than {pair.base.title}; allowed is a fine-tune of the same base"
        )
    return found.provenance.model.rsplit(" -> ", maxsplit=1)[-1], known
