"""Figures of steering: what is drawn is what was measured, with thresholds and random directions."""

import numpy as np
import pytest

from lens_affect.plotting_steering import MEASURES, REGIME_COLOURS, plot_dose, plot_regimes
from lens_affect.regimes import REGIMES, classify_regimes
from tests.test_regimes import CELLS, judged, planted


@pytest.mark.parametrize("measure", list(MEASURES))
def test_a_dose_response_is_drawn_with_its_interval_and_random_directions(measure):
    dose = planted(CELLS)
    figure = plot_dose(dose, measure=measure)
    lines = {d.name: d for d in figure.data}
    own = dose.to_frame().query("kind == 'steered'").sort_values("strength")
    np.testing.assert_allclose(np.array(lines["calm"].x, float), own["strength"])
    np.testing.assert_allclose(np.array(lines["calm"].y, float), own[measure])
    assert lines["random directions"].line.dash == "dot"
    assert figure.layout.yaxis.title.text == MEASURES[measure]
    assert "planted" in figure.layout.title.text
    assert (figure.layout.yaxis.type == "log") == (measure == "perplexity_ratio")


def test_the_band_of_unchanged_text_is_drawn():
    figure = plot_dose(planted(CELLS))
    assert sorted(s.y0 for s in figure.layout.shapes if s.y0 == s.y1) == pytest.approx([1 / 1.5, 1.5, 2.25])
    with pytest.raises(ValueError, match="received measure='speed'; allowed are"):
        plot_dose(planted(CELLS), measure="speed")


def test_a_regime_map_shows_every_cell_with_its_probability():
    dose = planted(CELLS)
    found = classify_regimes(dose, judged(dose, {("steered", 0.2): 0.3}))
    figure = plot_regimes(found)
    heat = figure.data[0]
    assert list(heat.x) == ["+0.1", "+0.2", "+0.4", "+0.8", "+1.6"]
    shown = [list(REGIMES)[int(code)] for code in heat.z[0]]
    assert shown == [found.regime("calm", s) for s in found.strengths]
    assert all(float(t) > 0.9 for t in heat.text[0])
    assert "of 5 cells:" in figure.layout.title.text
    assert set(REGIME_COLOURS) == set(REGIMES)
