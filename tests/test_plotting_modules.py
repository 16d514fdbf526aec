"""Figures of the module laboratory: what is drawn is what the table says, with its intervals."""

import numpy as np
import pytest

from lens_affect.deltas import compare_modules
from lens_affect.plotting_modules import PART_WORDS, plot_delta, plot_parts, plot_selectivity
from lens_affect.plotting_patching import ARM_COLOURS
from lens_affect.sizes import MODULES
from tests.test_checkpoint_pairs import changed
from tests.test_part_scores import planted as planted_parts
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
    above = int((rows["low"] > 0).sum())
    assert f"affect is lost more than control in {above} of 3 places" in figure.layout.title.text
    assert "most: gate in blocks" in figure.layout.title.text
    assert max(map(len, figure.layout.title.text.split("<br>"))) < 120  # fits the figure


def test_parts_show_the_share_of_every_module_with_its_interval():
    shares = {"gate": 0.7, "up": 0.4, "gate+up": 0.9}
    found = [planted_parts("transfer", shares), planted_parts("revert", {"gate": 0.6, "up": 0.2})]
    figure = plot_parts(found)
    gate, up, pair = figure.data
    assert list(gate.y) == [part.to_frame().set_index("arm").loc["gate", "share"] for part in found]
    assert len(pair.y) == 1
    assert (gate.marker.color, up.marker.color) == (ARM_COLOURS["gate"], ARM_COLOURS["up"])
    assert all(x > 0 for x in gate.error_y.array)
    assert list(figure.layout.xaxis.ticktext) == [PART_WORDS["transfer"], PART_WORDS["revert"]]
    assert "the gate brings 0.70 of the gain, up 0.40; the difference is beyond chance" in figure.layout.title.text
    with pytest.raises(ValueError, match="no module with a share"):
        plot_parts(planted_parts("transfer", {"gate": 0.5}, seeds=1, n=1))
