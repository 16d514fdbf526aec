"""Figures: what is drawn is what was computed; titles state it; colours tell emotions apart."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lens_affect.activations import Activations
from lens_affect.anisotropy import measure_anisotropy
from lens_affect.axes import valence_arousal
from lens_affect.comparison import compare_cells
from lens_affect.localization import localize
from lens_affect.plotting import (
    plot_anisotropy,
    plot_curves,
    plot_emotions,
    plot_methods,
    plot_reliability,
    plot_similarity,
    plot_valence_arousal,
)
from lens_affect.results import Provenance
from lens_affect.stimuli import EMOTIONS
from lens_affect.vectors import fit_vectors
from tests.test_comparison import cells


@pytest.fixture(scope="module")
def planted(passages):
    """Random activations of the passages, with valence along the first axis from layer 2 on."""
    generator = torch.Generator().manual_seed(0)
    n, n_layers, width = len(passages), 4, 16
    values = torch.randn(n, n_layers, width, generator=generator)
    sign = torch.tensor(
        [0.0 if e == "neutral" else 1.0 if EMOTIONS[e].valence == "positive" else -1.0 for e in passages.emotions]
    )
    values[:, 2:, 0] += 5 * sign[:, None]
    provenance = Provenance(model="Planted", source_precision="Q4_1", numerics="hf")
    return Activations(
        arrays={"resid_post": values},
        squares={},
        counts=torch.ones(n, dtype=torch.long),
        layers=(0, 1, 2, 3),
        embedding={"embedding": torch.randn(n, width, generator=generator)},
        stimuli=passages,
        n_layers=n_layers,
        pooling="mean",
        texts_with_sinks={"resid_post": torch.zeros(n_layers, dtype=torch.long)},
        provenance=provenance,
    )


@pytest.fixture(scope="module")
def curve(planted):
    return localize(planted, n_permutations=20)


def test_the_curve_draws_values_interval_null_and_threshold(curve):
    figure = plot_curves(curve, bar=0.2)
    by_name = {trace.name: trace for trace in figure.data if trace.name}
    line = by_name[f"passages (n = {curve.n_texts})"]
    np.testing.assert_allclose(line.y, curve.values.numpy())
    np.testing.assert_allclose(line.x, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(by_name["5 % threshold over all layers"].y, curve.threshold.numpy())
    shaded = by_name["95 % of shuffled labels"].y
    np.testing.assert_allclose(shaded, np.concatenate([curve.null_low.numpy(), curve.null_high.numpy()[::-1]]))
    interval = next(t for t in figure.data if t.name is None)
    np.testing.assert_allclose(interval.y, np.concatenate([curve.low.numpy(), curve.high.numpy()[::-1]]))
    assert figure.layout.shapes[0].y0 == 0.2


def test_curves_read_from_different_texts_have_bars_of_their_own(curve):
    stories = replace(curve, method="stories")
    figure = plot_curves([curve, stories], bar=[0.2, 0.6])
    lines, names = figure.layout.shapes, [a.text for a in figure.layout.annotations]
    assert [line.y0 for line in lines] == [0.2, 0.6]
    assert names[:2] == ["bag of words, passages", "bag of words, stories"]
    drawn = {t.name: t.line.color for t in figure.data if t.name and t.name.startswith(("passages", "stories"))}
    assert [line.line.color for line in lines] == list(drawn.values())
    with pytest.raises(ValueError, match="received 1 levels for 2 curves; allowed are one for all or one for each"):
        plot_curves([curve, stories], bar=[0.2])


def test_the_title_states_the_finding_and_the_precision_of_the_weights(curve):
    title = plot_curves(curve).layout.title.text
    assert "Planted (Q4_1, dequantized)" in title
    assert f"depth {curve.depth[curve.row(curve.best_layer)]:.2f}" in title
    assert "95 % interval" in title


def test_axes_carry_units(curve):
    figure = plot_curves(curve)
    assert figure.layout.xaxis.title.text.startswith("depth: (layer + 1) / layers")
    assert figure.layout.yaxis.title.text == "held-out accuracy"


def test_curves_of_different_scores_are_refused(curve, planted):
    with pytest.raises(ValueError, match=r"curves of \['dprime', 'nearest_mean'\]"):
        plot_curves([curve, localize(planted, score="dprime", n_permutations=0)])


def test_no_null_is_drawn_where_none_was_computed(planted):
    figure = plot_curves(localize(planted, n_permutations=0))
    assert not [t for t in figure.data if t.name and "shuffled" in t.name]


def test_the_planted_valence_axis_is_found_and_stated(planted):
    vectors = fit_vectors(planted)
    found = valence_arousal(vectors, 3)
    title = plot_valence_arousal(vectors, 3).layout.title.text
    assert f"valence lies closest to pc1: |r| = {found.best[0]:.2f} (20 emotions" in title
    assert "p = 0.001, the smallest" in title
    before = plot_valence_arousal(vectors, 0).layout.title.text
    assert f"|r| = {valence_arousal(vectors, 0).best[0]:.2f}" in before
    assert "the smallest" not in before
    two = fit_vectors(planted.select(emotions=["happy", "sad"]))
    assert "2 emotions on their first two components" in plot_valence_arousal(two, 3).layout.title.text


def test_similarity_shows_the_cosines_and_names_the_closest_pair(planted):
    vectors = fit_vectors(planted)
    figure = plot_similarity(vectors, 1)
    order = list(figure.data[0].x)
    np.testing.assert_allclose(figure.data[0].z, vectors.similarity(1).loc[order, order].to_numpy())
    table = vectors.similarity(1).to_numpy().copy()
    np.fill_diagonal(table, -2)
    assert f"({table.max():.2f})" in figure.layout.title.text


def test_emotions_are_sorted_and_drawn_with_their_interval(curve):
    figure = plot_emotions(curve)
    points = figure.data[0]
    assert list(points.x) == sorted(points.x)
    table = curve.per_emotion[curve.per_emotion["row"] == str(curve.best_layer)].set_index("emotion")
    for emotion, x, up in zip(points.y, points.x, points.error_x.array, strict=True):
        assert table.loc[emotion, "score"] == x
        assert table.loc[emotion, "high"] == pytest.approx(x + up)


def test_a_score_without_values_per_emotion_says_so(planted):
    with pytest.raises(ValueError, match="no values per emotion; use 'nearest_mean'"):
        plot_emotions(localize(planted, score="valence", n_permutations=0))


def test_reliability_draws_the_mean_over_emotions(planted):
    vectors = fit_vectors(planted)
    line = next(t for t in plot_reliability([vectors]).data if t.mode == "lines+markers")
    np.testing.assert_allclose(line.y, vectors.reliability.mean(0).numpy(), rtol=1e-6)


@pytest.fixture(scope="module")
def comparison():
    return compare_cells(cells(pooling=0.9))


def test_the_factor_that_carries_a_difference_is_in_the_title_and_filled(comparison):
    figure = plot_methods(comparison)
    assert "accuracy is carried by pooling" in figure.layout.title.text
    table = comparison.effects.query("metric == 'accuracy'").set_index("factor")
    for trace in figure.data:
        row = table.loc[trace.name]
        assert list(trace.x) == [row["difference"]]
        assert trace.x[0] + trace.error_x.array[0] == pytest.approx(row["high"])
        assert trace.x[0] - trace.error_x.arrayminus[0] == pytest.approx(row["low"])
        assert list(trace.marker.symbol) == ["circle" if row["p_holm"] < 0.05 else "circle-open"]
    assert "no single choice changes accuracy" in plot_methods(compare_cells(cells())).layout.title.text
    with pytest.raises(ValueError, match="received metric 'cosine'; allowed are"):
        plot_methods(comparison, metric="cosine")


def test_anisotropy_is_drawn_with_its_interval(tiny_model):
    found = measure_anisotropy(tiny_model("llama"))
    figure = plot_anisotropy([found, found])
    assert len(figure.data) == 4
    np.testing.assert_allclose(figure.data[1].y, found.table["mean_cosine"])
    band = np.array(figure.data[0].y)
    np.testing.assert_allclose(band[:4], found.table["low"])
    np.testing.assert_allclose(band[4:], found.table["high"][::-1])
    assert "neutral sentences lie within a cosine of" in figure.layout.title.text
