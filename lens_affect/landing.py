"""Where tuning lands, over several seeds and beside fine-tunes on something else.

One fine-tune says how evenly a module stands out over depth (deltas.py); whether it would stand out again takes seeds, and whether that has to do
with the task takes a control. Both are here: intervals are over seeds, and a seed of the task is paired with the same seed of the control.
"""

import html
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lens_affect.checkpoint_pairs import require_same_base
from lens_affect.deltas import compare_modules
from lens_affect.results import Provenance, load_result, save_result
from lens_affect.sizes import choose_modules
from lens_affect.statistics import Interval, mean_interval
from lens_affect.tuned import Tuned


@dataclass(frozen=True)
class Landing:
    """Change of every linear module in several fine-tunes of one base."""

    table: pd.DataFrame
    """One row per run and module: run, seed, module, parameters, relative_frobenius, rms, share_of_change, share_of_parameters, concentration."""
    provenance: Provenance
    """Of the base."""

    def to_frame(self) -> pd.DataFrame:
        """The table."""
        return self.table.copy()

    @property
    def runs(self) -> tuple[str, ...]:
        """What was tuned on, the first one being the claim's."""
        return tuple(dict.fromkeys(self.table["run"]))

    def by_module(self) -> pd.DataFrame:
        """One row per run and module: means over seeds of relative_frobenius and concentration, low and high of the latter (t over seeds), n_seeds."""
        rows = []
        grouped: Any = self.table.groupby(["run", "module"], sort=False)
        for (run, module), part in grouped:
            values = np.log(part["concentration"].to_numpy(float))
            found = mean_interval(values) if len(values) > 1 else None
            limits = (math.exp(found.low), math.exp(found.high)) if found else (math.nan, math.nan)
            row = [run, module, float(part["relative_frobenius"].mean()), math.exp(values.mean()), *limits, len(part)]
            rows.append(row)
        columns = ["run", "module", "relative_frobenius", "concentration", "low", "high", "n_seeds"]
        return pd.DataFrame(rows, columns=columns)

    def ratio(self, module: str, other: str, *, run: str | None = None) -> Interval:
        """Mean squared change per weight of one module over another's: geometric mean over seeds with a t interval over them.

        Args:
            module: a module or a group, such as `gate`.
            other: another one, such as `attention`.
            run: what was tuned on; the first by default.

        Raises:
            ValueError: an unknown run or module, or fewer than two seeds.
        """
        label = self._known(run)
        return self._interval(
            {s: math.log(self._at(label, s, module) / self._at(label, s, other)) for s in self._seeds(label)},
            f"{module} over {other} in {label}",
        )

    def against(self, module: str, control: str, *, run: str | None = None) -> Interval:
        """Concentration of a module over what it is in a control fine-tune: geometric mean over the seeds that both have, with a t interval.

        Args:
            module: a module or a group.
            control: what the control was tuned on.
            run: what was tuned on; the first by default.

        Raises:
            ValueError: an unknown run or module, or fewer than two common seeds.
        """
        label, other = self._known(run), self._known(control)
        common = [seed for seed in self._seeds(label) if seed in self._seeds(other)]
        return self._interval(
            {s: math.log(self._at(label, s, module) / self._at(other, s, module)) for s in common},
            f"{module} in {label} over {control}",
        )

    def _interval(self, logs: Mapping[int, float], what: str) -> Interval:
        if len(logs) < 2:
            raise ValueError(f"received {len(logs)} seeds for {what}; an interval over seeds needs at least two")
        found = mean_interval(np.array(list(logs.values())))
        return Interval(*(np.asarray(np.exp(x)) for x in (found.estimate, found.low, found.high)))

    def _known(self, run: str | None) -> str:
        if run is not None and run not in self.runs:
            raise ValueError(f"received the run {run!r}; allowed are {list(self.runs)}")
        return run or self.runs[0]

    def _seeds(self, run: str) -> list[int]:
        return sorted({int(s) for s in self.table.loc[self.table["run"] == run, "seed"]})

    def _at(self, run: str, seed: int, module: str) -> float:
        """Concentration of a module or group."""
        own: Any = self.table[(self.table["run"] == run) & (self.table["seed"] == seed)]
        part = own[own["module"].isin(choose_modules(module, present=tuple(own["module"])))]
        return float(part["share_of_change"].sum() / part["share_of_parameters"].sum())

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Save as a folder (see results.py)."""
        return save_result(self, folder, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Landing":
        """Load what `save` wrote."""
        return load_result(cls, folder)

    def __str__(self) -> str:
        own = self.by_module()
        lines = []
        for run in self.runs:
            part: Any = own[own["run"] == run]
            if not part["concentration"].notna().any():
                lines.append(f"{run}: nothing changed")
                continue
            best: Any = part.loc[part["concentration"].idxmax()]
            lines.append(
                f"{run}: {best['module']} has {best['concentration']:.2f} [{best['low']:.2f}, {best['high']:.2f}] times its share of parameters in the "
                f"squared change (95 % over {best['n_seeds']} seeds)"
            )
        return f"{self.provenance.title}\n" + "\n".join(lines[:4])

    def _repr_html_(self) -> str:
        text = html.escape(str(self)).replace("\n", "<br>")
        return f"<p>{text}</p>{self.by_module().round(4).to_html(index=False, border=0)}"


def measure_landing(base: Any, runs: Mapping[str, Sequence[Tuned]]) -> Landing:
    """Measure the change of every linear module in fine-tunes that trained all of them.

    Args:
        base: what was tuned: anything that holds weights, as for compare_modules.
        runs: what was tuned on -> one run per seed; the first is the claim's, the others are controls.

    Returns:
        The changes. Runs that exploded, or never became better than the base, are left out, and a control of which nothing else is there.

    Raises:
        ValueError: no runs, runs of another base, or runs that did not train the same linear modules.

    Example:
        >>> measure_landing(model, {"goemotions": tuned, "topics": controls}).ratio("gate", "up")  # doctest: +SKIP
    """
    kept = {label: [run for run in several if not run.exploded and run.best_step] for label, several in runs.items()}
    first_label = next(iter(kept), None)
    kept = {label: several for label, several in kept.items() if several or label == first_label}
    modules = {tuple(sorted({place.rpartition(".")[2] for place in r.arm.ranks})) for s in kept.values() for r in s}
    if not kept or not all(kept.values()) or len(modules) != 1:
        raise ValueError(
            f"received the runs {[*kept]} with {[len(s) for s in kept.values()]} that did not explode, which trained {sorted(modules)}; allowed are "
            "runs of one arm, such as 'all', at least one of each task"
        )
    for several in kept.values():
        for run in several:
            require_same_base(base, run)
    tables = []
    for label, several in kept.items():
        for run in several:
            found = compare_modules(base, run, spectrum=False)
            columns = ["module", "parameters", "relative_frobenius", "rms"]
            columns += ["share_of_change", "share_of_parameters", "concentration"]
            tables.append(found.by_module()[columns].assign(run=label, seed=run.seed))
    table = pd.concat(tables, ignore_index=True)
    first = ["run", "seed"]
    return Landing(
        pd.DataFrame(table[[*first, *(c for c in table.columns if c not in first)]]),
        next(iter(kept.values()))[0].provenance,
    )
