"""Figures of the module laboratory: what is drawn is what the table says, with its intervals."""

import numpy as np
import pytest

from lens_affect.deltas import compare_modules
from lens_affect.plotting_modules import plot_delta, plot_selectivity
from lens_affect.sizes import MODULES
from tests.test_checkpoint_pairs import changed
from tests.test_selectivity import table
from tests.tiny import make_hf_model


def test_a_delta_is_drawn_by_module_and_block_around_a_fair_share():
    found = compare_modules(make_hf_model("llama"), changed(**dict.fromkeys(MODULES, 0.01) | {"gate": 0.03}))
    figure = plot_delta(found)
    heat = figure.data[0]
    assert list(heat.y) == list(MODULES)
    expected = found.to_frame().set_index(["module", "layer"])["concentration"]
    assert 2 ** heat.z[4][1] == pytest.approx(expected["gate", 1])
    assert heat.zmin == -heat.zmax
    assert "gate has" in figure.layout.title.text
    plain = plot_delta(found, measure="relative_frobenius", title="t").data[0]
    assert np.nanmin(plain.z) > 0
    with pytest.raises(ValueError, match="received measure 'concentration_to_control'; this delta has"):
        plot_delta(found, measure="concentration_to_control")
    with pytest.raises(ValueError, match="received measure 'concentration'"):
        plot_delta(compare_modules(make_hf_model("llama"), make_hf_model("llama")))
    control = compare_modules(make_hf_model("llama"), changed(gate=0.1, o=0.1), control=changed(gate=0.1, o=0.2))
    assert "against the control" in plot_delta(control, measure="concentration_to_control").layout.title.text


def test_selectivity_is_drawn_with_its_intervals():
    found = table([1.0, 0.2, 0.1], [0.4, 0.2, 0.1])
    figure = plot_selectivity(found)
    rows = found.to_frame()
    assert [trace.name for trace in figure.data] == ["gate", "up", "down"]
    gate = figure.data[0]
    assert gate.y[0] == pytest.approx(rows["selectivity"][0])
    assert gate.y[0] + gate.error_y.array[0] == pytest.approx(rows["high"][0])
    assert gate.y[0] - gate.error_y.arrayminus[0] == pytest.approx(rows["low"][0])
    assert "most selective: gate" in figure.layout.title.text
