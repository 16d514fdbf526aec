"""A study of modules with planted effects, without a model."""

import functools

from lens_affect.module_study import ModuleStudy
from lens_affect.module_table import compare_arms
from tests.planted_runs import campaign
from tests.test_landing import planted as planted_landing
from tests.test_part_scores import planted as planted_parts

SIZES = {"gate": 100, "up": 100, "down": 100, "attention": 180, "random": 100, "all": 480}


def table(rates, *, n=4000, seeds=3, noise=0.002):
    """Arms whose accuracy is planted; shared, so tests must not change it."""
    return _table(tuple(rates.items()), n, seeds, noise)


@functools.cache
def _table(rates, n, seeds, noise):
    runs = campaign({m: (r, SIZES[m]) for m, r in rates}, n=n, seeds=seeds, spread=noise)
    return compare_arms(runs, reference="all")


@functools.cache
def _parts(kind, shares):
    return planted_parts(kind, dict(shares), n=800)


def study(*, gate=0.58, siblings=0.45, whole=0.6, landing=1.5, generic=1.0, share=0.8, others=0.3, **more):
    """A gate that is special in every way and in no way without affect; other numbers take one way or another from it."""
    rates = {"gate": gate, "up": siblings, "down": siblings, "attention": siblings, "all": whole}
    shares = {"gate": share, "up": others, "down": others, "attention": others}
    parts = {
        kind: _parts(kind, tuple(shares.items()))
        for kind in ("transfer", "revert", "random_equal_norm", "equal_damage")
    }
    alike = dict.fromkeys(shares, 0.5)
    controls = {f"control_{k}": _parts(k, tuple(alike.items())) for k in ("transfer", "revert", "equal_damage")}
    controls["control"] = table({**alike, "all": 0.6})
    return ModuleStudy(
        equal_rank=table(rates),
        equal_size=table({**rates, "random": siblings}),
        landing=planted_landing({"affect": landing, "topics": generic}, noise=0.02),
        **{**parts, **controls, **more},
    )
