"""Figures of steering: what is drawn is what was measured, with thresholds and random directions."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from lens_affect.boundaries import RegimeBoundaries, compare_onsets
from lens_affect.doses import UNSTEERED
from lens_affect.inside import InsideOutside
from lens_affect.plotting_steering import (
    MEASURES,
    REGIME_COLOURS,
    plot_boundaries,
    plot_dose,
    plot_inside,
    plot_judged,
    plot_languages,
    plot_onsets,
    plot_regimes,
    plot_scripts,
    plot_verification,
)
from lens_affect.regimes import REGIMES, classify_regimes, judged_cells
from lens_affect.results import Provenance
from lens_affect.steering_study import SteeringStudy
from lens_affect.verification import verify_steering
from tests.test_regimes import CELLS, RULE, judged, planted
from tests.test_steering_study import name_languages
from tests.test_verification import judgement_of, swept


@pytest.mark.parametrize("measure", list(MEASURES))
def test_a_dose_response_is_drawn_with_its_interval_and_random_directions(measure):
    dose = planted(CELLS)
    figure = plot_dose(dose, measure=measure)
    lines = {d.name: d for d in figure.data}
    own = dose.to_frame().query("kind == 'steered'").sort_values("strength")
    np.testing.assert_allclose(np.array(lines["calm"].x, float), own["strength"])
    np.testing.assert_allclose(np.array(lines["calm"].y, float), own[measure])
    assert lines["random directions"].line.dash == "dot"
    unit = f"<br>{dose.perplexity_unit}" if measure == "perplexity_ratio" else ""
    assert figure.layout.yaxis.title.text == MEASURES[measure] + unit
    plain = dose.table[dose.table["kind"].isin(UNSTEERED)]
    start = 1.0 if measure == "perplexity_ratio" else plain[measure].mean()
    assert lines["unsteered"].y[0] == pytest.approx(start)
    assert "planted" in figure.layout.title.text
    assert (figure.layout.yaxis.type == "log") == (measure == "perplexity_ratio")


def test_the_band_of_unchanged_text_is_drawn():
    figure = plot_dose(planted(CELLS))
    assert sorted(s.y0 for s in figure.layout.shapes if s.y0 == s.y1) == pytest.approx([1 / 1.5, 1.5, 2.25])
    with pytest.raises(ValueError, match="received measure='speed'; allowed are"):
        plot_dose(planted(CELLS), measure="speed")


def test_the_limit_of_repetition_is_called_what_it_is():
    def labels(dose):
        return [a.text for a in plot_dose(dose, measure="repetition").layout.annotations]

    dose = planted(CELLS)
    assert labels(replace(dose, limits=torch.full((21,), 0.25))) == [
        "99 % of ordinary prose of 20 tokens stays below 0.25"
    ]
    assert labels(replace(dose, limits=torch.full((21,), 0.02))) == [
        "tuned floor 0.10 (99 % of ordinary prose of 20 tokens stays below 0.02)"
    ]


def test_what_the_judge_sees_is_drawn_beside_random_directions():
    dose = planted(CELLS | {("random", "", 0.2): (0.0, 0.0)})
    read = judged(dose, {("steered", 0.2): 0.3, ("random", 0.2): 0.1})
    cells = judged_cells(dose, read).set_index(["emotion", "strength"])
    row = cells.loc["calm", 0.2]
    assert row["probability"] == pytest.approx(0.5, abs=0.01)
    assert row["random"] == pytest.approx(0.3, abs=0.01)
    assert row["gain"] == pytest.approx(0.2, abs=0.01)
    of_map = classify_regimes(dose, read).table.query("kind == 'steered' and strength == 0.2").iloc[0]
    assert (row["gain"], row["gain_low"]) == (of_map["gain"], of_map["gain_low"])
    figure = plot_judged(dose, read)
    probability, gain = (d for d in figure.data if d.name == "calm")
    np.testing.assert_allclose(probability.y, cells.loc["calm", "probability"].sort_index())
    np.testing.assert_allclose(gain.y, cells.loc["calm", "gain"].sort_index())
    dotted = [d for d in figure.data if d.line.dash == "dot"]
    assert len(dotted) == 1
    assert dotted[0].line.color == probability.line.color
    assert "largest gain over random directions: calm +0." in figure.layout.title.text
    with pytest.raises(ValueError, match="names none of"):
        plot_judged(dose, replace(read, emotions=("proud", "relieved")))


def test_boundaries_are_drawn_with_their_brackets_and_every_strength_tried():
    regimes = ["undecided", "degraded", "repetitive_collapse"]
    table = pd.DataFrame({"strength": [0.1, 0.2, 0.4], "regime": regimes, "p": [0.9, 0.8, 1.0], "n": 12})
    found = RegimeBoundaries(table, "angry", "", (1,), "neutral", Provenance(model="planted"))
    figure = plot_boundaries([found])
    assert [(s.x0, s.x1) for s in figure.layout.shapes] == [(0.1, 0.2), (0.2, 0.4)]
    assert [(d.name, d.x[0], d.marker.color) for d in figure.data] == [
        (name.replace("_", " "), s, REGIME_COLOURS[name]) for name, s in zip(regimes, (0.1, 0.2, 0.4), strict=True)
    ]
    assert "degraded to repetitive collapse at 0.2 to 0.4" in figure.layout.title.text
    later = replace(found, table=table.assign(strength=[0.2, 0.5, 1.0]), emotion="sad")
    both = plot_boundaries([found, later])
    assert "the first regime ends between 0.1 and 0.5 in 2 of 2 emotions" in both.layout.title.text
    assert [a.yanchor for a in both.layout.annotations] == ["bottom", "top"] * 2  # neighbours do not overlap
    with pytest.raises(ValueError, match="received no boundaries"):
        plot_boundaries([])


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


def test_a_verification_shows_rates_with_intervals_beside_random_directions():
    dose = swept(strengths=(0.2, 0.4))
    found = verify_steering(dose, judgement_of(dose, steered=0.5, random=0.0), thresholds=RULE)
    figure = plot_verification(found)
    table = found.to_frame().query("criterion == 'rises' and pull == 'all'")
    drawn = {d.name: d for d in figure.data}
    np.testing.assert_allclose(drawn["steered: rises"].y, table["rate"])
    np.testing.assert_allclose(drawn["steered: rises"].error_y.array, table["high"] - table["rate"])
    np.testing.assert_allclose(drawn["random directions: rises"].y, table["random"])
    assert ("another emotion: rises" in drawn) == bool(table["other"].notna().any())
    assert "target rises in 24 of 24 scenarios" in figure.layout.title.text


def test_scripts_are_drawn_dose_by_dose():
    dose = planted(CELLS)
    rows = dose.table.copy()
    rows.loc[(rows["kind"] == "steered") & (rows["strength"] == 0.4), "text"] = "快乐"
    dose = replace(dose, table=rows)
    study = SteeringStudy(dose, judged(dose, {}), classify_regimes(dose, thresholds=RULE))
    drawn = {d.name: d for d in plot_scripts(study).data}
    foreign = dict(zip(drawn["steered"].x, drawn["steered"].y, strict=True))
    assert foreign[0.4] == 1.0
    assert foreign[0.2] == 0.0
    assert (
        "foreign letters in at most 1.00 [1.00, 1.00] of the texts (at +0.4, n = 8)<br>under random directions at most 0.00, 0.00 without steering"
        in plot_scripts(study).layout.title.text
    )


def test_languages_are_drawn_dose_by_dose(monkeypatch):
    dose = planted(CELLS)
    rows = dose.table.copy()
    rows.loc[(rows["kind"] == "steered") & (rows["strength"] == 0.4) & (rows["prompt"] < 4), "text"] = "hola"
    dose = replace(dose, table=rows)
    study = SteeringStudy(dose, judged(dose, {}), classify_regimes(dose, thresholds=RULE))
    monkeypatch.setattr("lens_affect.steering_study.text_languages", name_languages)
    drawn = {d.name: d for d in plot_languages(study).data}
    assert dict(zip(drawn["steered"].x, drawn["steered"].y, strict=True))[0.4] == 0.5
    assert "at most 0.50 [0.00, 1.00] of the texts in another language than English (at +0.4, n = 8)" in (
        plot_languages(study).layout.title.text
    )


def test_onsets_are_drawn_over_the_achieved_change():
    found = compare_onsets({"m": planted(CELLS)}, thresholds={"m": RULE})
    own = found.shares.query("kind == 'steered'")
    drawn = {d.name: d for d in plot_onsets(found).data}
    np.testing.assert_allclose(drawn["m, steered"].x, own["change"])
    np.testing.assert_allclose(drawn["m, steered"].y, own["any"])
    assert "m: half of the texts" in plot_onsets(found).layout.title.text


def test_behaviour_and_inside_are_drawn_with_their_null():
    rows = [
        ["steered", "sad", 0.4, 0.1, 0.6, 0.5, -0.3, 0.3, 0.01, 0.02, 48, 12],
        ["random", "sad", float("nan"), *[float("nan")] * 7, 12, 12],
    ]
    columns = [
        "texts",
        "emotion",
        "rho",
        "low",
        "high",
        "rho_pooled",
        "null_low",
        "null_high",
        "p",
        "p_family",
        "n",
        "n_prompts",
    ]
    found = InsideOutside(
        pd.DataFrame(rows, columns=columns),
        torch.zeros(2, 1),
        ("sad",),
        3,
        100,
        "a judge",
        "neutral",
        Provenance(model="planted"),
    )
    band, dots = plot_inside(found).data
    assert (band.y[0], band.error_y.array[0]) == (0.0, pytest.approx(0.3))
    assert (dots.y[0], dots.error_y.array[0]) == (0.4, pytest.approx(0.2))
    assert "steered 0.40" in plot_inside(found).layout.title.text
