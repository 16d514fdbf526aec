"""Figures of patching maps: what is drawn is what was computed; what is beyond a random donor is marked."""

import numpy as np
import pytest

from lens_affect.patching import patch_sites
from lens_affect.plotting_patching import plot_patching, plot_positions, plot_siblings
from tests.test_donors import make_pairs
from tests.test_patching import synthetic


def test_a_patching_map_is_drawn_with_what_is_beyond_a_random_donor():
    found = synthetic([[0.0, 0.4, 0.0], [0.0, 0.0, 0.0]])
    figure = plot_patching(found)
    np.testing.assert_allclose(np.array(figure.data[0].z, float), found.normalized()[0][:, :, 0])
    assert list(zip(figure.data[1].x, figure.data[1].y, strict=True)) == [(1, "gate")]
    assert "gate at layer 1" in figure.layout.title.text
    assert figure.data[0].zmin == -figure.data[0].zmax
    with pytest.raises(ValueError, match=r"received position '-3'; this map has \['all'\]"):
        plot_patching(found, position="-3")


def test_siblings_are_drawn_with_interval_and_random_donor_and_the_title_says_where_they_differ():
    found = synthetic([[0.0, 0.4, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    figure = plot_siblings(found, sites=("gate", "up"))
    lines = {d.name: d for d in figure.data if d.name in ("gate", "up", "gate, random donor")}
    np.testing.assert_allclose(np.array(lines["gate"].y, float), found.normalized()[0][0, :, 0])
    np.testing.assert_allclose(np.array(lines["gate"].x, float), [1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(
        np.array(lines["gate, random donor"].y, float), found.normalized(donor="random")[0][0, :, 0]
    )
    assert "gate is beyond up at layer 1 (mean over layers" in figure.layout.title.text
    assert {"gate", "up", "attn_out"} <= {d.name for d in plot_siblings(found).data}  # mlp_out was not patched
    turned = plot_siblings(found, sites=("up", "gate", "attn_out")).layout.title.text
    assert "up is beyond attn_out at no layer" in turned
    assert "gate is beyond" not in turned
    assert (
        "up is beyond gate at no layer, behind it at 1" in plot_siblings(found, sites=("up", "gate")).layout.title.text
    )
    with pytest.raises(ValueError, match="one figure shows patched sites"):
        plot_siblings(found, sites=("gate", "q"))


def test_one_site_is_drawn_by_layer_and_position(tiny_model):
    found = patch_sites(tiny_model("llama"), make_pairs(tails=True), sites=["gate", "v"], positions="each")
    figure = plot_positions(found, "v")
    assert tuple(figure.data[0].x) == found.positions
    assert tuple(figure.data[0].y) == found.layers
    np.testing.assert_allclose(np.array(figure.data[0].z, float), found.normalized()[0][1])
    counted = found.effect_raw[:, 1].isfinite().sum(0).numpy()
    np.testing.assert_array_equal(np.array(figure.data[0].customdata), counted)
    assert "v at layer" in figure.layout.title.text
    with pytest.raises(ValueError, match="received site 'q'; this map has"):
        plot_positions(found, "q")
