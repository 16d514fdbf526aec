"""Where tuning lands: planted changes are found with their intervals, and runs are measured as compare_modules measures their adapters."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from lens_affect.deltas import compare_modules
from lens_affect.landing import Landing, measure_landing
from lens_affect.results import Provenance
from lens_affect.tuned import write_adapter
from lens_affect.tuning import tune_module
from tests.planted_task import QUICK, TASK


@pytest.fixture(scope="module")
def runs(tunable):
    return [tune_module(tunable, TASK, modules="all", rank=2, rate=0.05, seed=seed, **QUICK) for seed in (0, 1)]


def test_a_run_is_measured_as_its_adapter_is(tunable, runs, tmp_path, unchanged):
    found = measure_landing(tunable, {"planted": runs})
    for run in runs:
        write_adapter(run, tmp_path / str(run.seed))
        expected = compare_modules(tunable, tmp_path / str(run.seed), spectrum=False, any_base=True).by_module()
        own = found.table[found.table["seed"] == run.seed]
        for column in ("relative_frobenius", "concentration", "share_of_change"):
            np.testing.assert_allclose(own[column], expected[column], rtol=1e-5)
        assert float(own["share_of_change"].sum()) == pytest.approx(1.0)


def test_whole_weights_are_measured_too(tunable, unchanged):
    run = tune_module(tunable, TASK, modules="all", method="full", rate=1e-3, **QUICK)
    found = measure_landing(tunable, {"planted": [run]}).table.set_index("module")
    maps = {n: p.detach() for n, p in tunable.original_model.named_parameters()}
    change = norm = 0.0
    for name, value in run.trained.items():
        if "gate_proj" in name:
            base = next(p for n, p in maps.items() if n.replace("._original_component", "") == name)
            change += float((value - base).square().sum())
            norm += float(base.square().sum())
    assert found.loc["gate", "relative_frobenius"] == pytest.approx((change / norm) ** 0.5, rel=1e-4)


def planted(factor, *, seeds=4, noise=0.05, draw=0):
    """Concentrations per run and seed; those of the gate are `factor[run]` times the others'."""
    rng, rows = np.random.default_rng(draw), []
    modules = {"q": 0.05, "k": 0.05, "v": 0.05, "o": 0.05, "gate": 0.3, "up": 0.25, "down": 0.25}
    for run, times in factor.items():
        for seed in range(seeds):
            weight = {m: s * (times if m == "gate" else 1) * np.exp(rng.normal(0, noise)) for m, s in modules.items()}
            total = sum(weight.values())
            for module, size in modules.items():
                share = weight[module] / total
                rows.append([run, seed, module, 100, 0.1, 0.1, share, size, share / size])
    columns = ["run", "seed", "module", "parameters", "relative_frobenius", "rms"]
    columns += ["share_of_change", "share_of_parameters", "concentration"]
    return Landing(pd.DataFrame(rows, columns=columns), Provenance(model="planted"))


def test_a_planted_factor_is_recovered():
    found = planted({"affect": 2.0, "control": 1.0})
    for other in ("up", "down", "attention"):
        ratio = found.ratio("gate", other)
        assert float(ratio.low) < 2.0 < float(ratio.high)
        assert float(ratio.low) > 1
    expected = 2.0 / (2.0 * 0.3 + 0.7)  # of the gate's share, over its share without the factor
    against = found.against("gate", "control")
    assert float(against.low) < expected < float(against.high)
    assert "gate has" in str(found)


def test_without_a_factor_intervals_hold_one_about_as_often_as_they_say():
    held = [
        float(planted({"affect": 1.0}, draw=d).ratio("gate", "up").low)
        < 1
        < float(planted({"affect": 1.0}, draw=d).ratio("gate", "up").high)
        for d in range(100)
    ]
    assert 0.88 <= np.mean(held) <= 1.0


def test_refusals(tunable, runs):
    with pytest.raises(ValueError, match="at least two"):
        planted({"affect": 1.0}, seeds=1).ratio("gate", "up")
    with pytest.raises(ValueError, match="allowed are"):
        planted({"affect": 1.0}).against("gate", "topics")
    with pytest.raises(ValueError, match="did not explode"):
        measure_landing(tunable, {"planted": [dataclasses.replace(runs[0], exploded=True)]})
    gate = tune_module(tunable, TASK, modules="gate", rank=2, rate=0.05, **QUICK)
    with pytest.raises(ValueError, match="of one arm"):
        measure_landing(tunable, {"planted": [*runs, gate]})


def test_saving_and_loading(tmp_path):
    found = planted({"affect": 2.0})
    found.save(tmp_path / "landing")
    assert str(Landing.load(tmp_path / "landing")) == str(found)
