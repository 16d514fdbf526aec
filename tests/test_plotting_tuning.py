"""What must be true: every arm is drawn with its interval, and the default title says what the table says."""

import json

import pandas as pd
import pytest

from lens_affect.module_table import LearningCurves, compare_arms, learning_curves
from lens_affect.plotting_patching import ARM_COLOURS
from lens_affect.plotting_tuning import plot_gains, plot_learning, plot_retention
from lens_affect.style import save_figure
from tests.planted_runs import campaign

ARMS = {"all": (0.6, 400), "gate, rank 4": (0.45, 100), "up, rank 4": (0.55, 100)}


def test_retention_bars_have_intervals_and_both_shares_beside_them():
    table = compare_arms(campaign(ARMS, n=2000), reference="all")
    figure = plot_retention(table)
    bars = figure.data[0]
    assert list(bars.x) == ["gate, rank 4", "up, rank 4"]
    assert (bars.error_y.array > 0).all()
    assert list(bars.marker.color) == [ARM_COLOURS["gate"], ARM_COLOURS["up"]]
    assert {trace.name for trace in figure.data[1:]} == {
        "share of the parameters",
        "share of the tuned score (the paper's number)",
    }
    assert "beyond chance" in figure.layout.title.text


def test_several_tables_are_drawn_in_groups():
    table = compare_arms(campaign(ARMS), reference="all")
    figure = plot_retention({"equal rank": table, "equal size": table}, title="both")
    assert set(figure.data[0].x[0]) == {"equal rank", "equal size"}
    assert figure.layout.title.text == "both"


def test_gains_are_drawn_also_where_tuning_everything_gained_nothing_for_certain():
    runs = campaign({"all": (0.08, 400), "gate": (0.45, 100), "up": (0.08, 100)})
    table = compare_arms(runs, reference="all")
    assert "no share of it, since all gained nothing for certain; gains (95 %): gate +0." in str(table)
    figure = plot_gains(table)
    bars = figure.data[0]
    assert list(bars.x) == ["all", "gate", "up"]
    assert list(bars.y) == list(table.arms["gain"])
    assert (bars.error_y.array > 0).all()
    gains = table.arms.set_index("arm")["gain"]
    assert f": gate gains {gains['gate']:+.3f} [" in figure.layout.title.text
    assert f", all gains {gains['all']:+.3f} [" in figure.layout.title.text
    assert (figure.layout.shapes[0].y0, figure.layout.shapes[0].xref) == (0, "paper")
    with pytest.raises(ValueError, match="no arm with a gain"):
        plot_gains({})


def test_without_a_reference_there_is_nothing_to_draw():
    table = compare_arms(campaign({"gate": (0.5, 1)}), reference="all")
    with pytest.raises(ValueError, match="no arm with a retention"):
        plot_retention(table)
    with pytest.raises(ValueError, match="no arm with a retention"):
        plot_retention({})


def test_learning_curves_have_one_line_and_one_band_per_arm():
    curves = learning_curves(campaign(ARMS))
    figure = plot_learning(curves)
    assert [t.name for t in figure.data if t.mode == "lines+markers"] == list(ARMS)
    assert "ends lowest" in figure.layout.title.text
    assert "ends highest" in plot_learning(curves, column="validation_exact").layout.title.text
    with pytest.raises(ValueError, match="received column 'loss'"):
        plot_learning(curves, column="loss")


def test_the_numbers_beside_learning_curves_are_the_ones_that_are_drawn(tmp_path):
    runs = campaign(ARMS)
    curves = learning_curves(runs)
    figure = plot_learning(curves)
    shown = LearningCurves(curves, runs["all"][0].provenance)
    save_figure(figure, tmp_path / "learning", shown)
    table = json.loads((tmp_path / "learning.json").read_text())[0]["table"]
    kept = pd.DataFrame(table["data"], columns=table["columns"])
    lines = {trace.name: trace for trace in figure.data if trace.mode == "lines+markers"}
    assert set(lines) == set(kept["arm"])
    for arm, part in kept.groupby("arm"):
        assert list(part["step"]) == list(lines[arm].x)
        assert list(part["mean"]) == pytest.approx(list(lines[arm].y))


def test_a_loss_that_falls_by_less_than_half_is_on_a_linear_axis_which_has_ticks():
    curves = learning_curves(campaign(ARMS))
    assert plot_learning(curves).layout.yaxis.type == "log"
    curves["validation_loss"] += 3
    assert plot_learning(curves).layout.yaxis.type is None
