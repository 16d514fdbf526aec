"""Axes: planted valence and arousal are found, choosing a component is paid for, numbers are those of a by-hand loop."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from lens_affect.axes import AxisAgreement, valence_arousal
from lens_affect.statistics import derive_generator
from lens_affect.stimuli import EMOTIONS
from lens_affect.vectors import fit_vectors
from tests.test_geometry import AROUSED, PLEASANT, TWENTY, read, without
from tests.test_vectors import planted


def placed(seed, strength, *, emotions=TWENTY, noise=0.0, n_topics=1, valence=1.0, arousal=0.6, d=16):
    """Emotions with valence on one hidden direction, arousal on another, and `1` of everything else."""
    rng = np.random.default_rng(seed)
    own = rng.standard_normal((len(emotions), d))
    axes = np.linalg.qr(rng.standard_normal((d, 2)))[0].T
    known = [EMOTIONS.get(e) for e in emotions]
    sides = [
        [0 if e is None else 1 if getattr(e, axis) == plus else -1 for e in known]
        for axis, plus in (("valence", "positive"), ("arousal", "high"))
    ]
    means = own + strength * (valence * np.outer(sides[0], axes[0]) + arousal * np.outer(sides[1], axes[1]))
    return read(means, rng, emotions=emotions, n_topics=n_topics, noise=noise)


def test_planted_valence_and_arousal_are_the_two_components():
    found = valence_arousal(placed(0, 20.0), 0, n_permutations=199)
    assert found.best_components == ("pc1", "pc2")
    assert (found.best > 0.9).all()
    assert found.p.tolist() == pytest.approx([1 / 200] * 2)
    assert sum(found.explained) > 0.9
    assert found.null_mean.max() < 0.4
    swapped = valence_arousal(placed(0, 20.0, valence=0.6, arousal=1.0), 0)
    assert swapped.best_components == ("pc2", "pc1")


def test_the_numbers_are_those_of_a_by_hand_loop():
    activations = placed(1, 2.0, n_topics=3, noise=0.5)
    found = valence_arousal(activations, 0, n_permutations=60, seed=3)
    table = fit_vectors(activations, n_halves=0).principal_axes(0)
    for i, (axis, side) in enumerate((("valence", PLEASANT), ("arousal", AROUSED))):
        by_hand = [abs(np.corrcoef(table[c], side)[0, 1]) for c in ("pc1", "pc2")]
        np.testing.assert_allclose(found.correlations[i], by_hand, atol=1e-9)
        assert found.best[i].item() == pytest.approx(max(by_hand))
        rng = derive_generator(3, "geometry", axis)
        orders = rng.permuted(np.tile(side.astype(float), (60, 1)), axis=1)
        null = [max(abs(np.corrcoef(table[c], y)[0, 1]) for c in ("pc1", "pc2")) for y in orders]
        assert found.p[i].item() == pytest.approx((1 + sum(v >= max(by_hand) - 1e-9 for v in null)) / 61)
        assert found.null_mean[i].item() == pytest.approx(np.mean(null))
    assert found.explained == pytest.approx(table.attrs["explained"])


def test_choosing_the_better_component_is_paid_for():
    p, single = [], []
    for seed in range(120):
        vectors = fit_vectors(placed(seed, 0.0), n_halves=0)
        found = valence_arousal(vectors, 0, n_permutations=99, seed=seed)
        p.append(found.p.tolist())
        r = found.best.numpy()
        single.append(2 * stats.t.sf(r * np.sqrt(18 / (1 - r**2)), 18))
    jitter = np.random.default_rng(0).random((120, 2)) / 100
    for axis in range(2):
        assert stats.kstest((np.array(p) - jitter)[:, axis], "uniform").pvalue > 0.01
        assert stats.kstest(np.array(single)[:, axis], "uniform").pvalue < 0.001  # as if it had been the only one


def test_the_interval_of_an_axis_is_a_jackknife_over_groups_and_vectors_have_none():
    activations = placed(2, 2.0, n_topics=5, noise=1.0)
    found = valence_arousal(activations, 0, n_permutations=0)
    left_out = []
    for t in range(5):
        table = fit_vectors(without(activations, [f"topic {t}"]), n_halves=0).principal_axes(0)
        left_out.append([max(abs(np.corrcoef(table[c], PLEASANT)[0, 1]) for c in ("pc1", "pc2"))])
    values = np.array(left_out)[:, 0]
    half = stats.t.ppf(0.975, 4) * math.sqrt(4 / 5 * ((values - values.mean()) ** 2).sum())
    assert found.low[0].item() == pytest.approx(max(found.best[0].item() - half, 0), abs=1e-9)
    assert found.high[0].item() == pytest.approx(min(found.best[0].item() + half, 1), abs=1e-9)
    from_vectors = valence_arousal(fit_vectors(activations, n_halves=0), 0, n_permutations=0)
    np.testing.assert_allclose(from_vectors.correlations, found.correlations, atol=1e-9)
    assert from_vectors.low.isnan().all()
    assert from_vectors.high.isnan().all()
    assert valence_arousal(placed(2, 2.0), 0).low.isnan().all()  # one group: nothing to leave out


def test_emotions_without_a_place_shape_the_components_but_are_not_correlated():
    names = (*TWENTY[:8], "bored", "amused")
    activations = placed(3, 3.0, emotions=names)
    found = valence_arousal(activations, 0)
    table = fit_vectors(activations, n_halves=0).principal_axes(0)
    by_hand = abs(np.corrcoef(table["pc1"].to_numpy()[:8], PLEASANT[:8])[0, 1])
    assert found.emotions == TWENTY[:8]
    assert found.correlations[0, 0].item() == pytest.approx(by_hand)


def test_an_axis_with_one_side_is_not_measured_and_says_so():
    high = [e for e in TWENTY if EMOTIONS[e].arousal == "high"]
    found = valence_arousal(placed(4, 3.0, emotions=tuple(high)), 0)
    assert found.best[0].isfinite()
    assert found.best_components[1] == "none"
    for values in (found.correlations[1], found.best[1:], found.p[1:], found.null_mean[1:]):
        assert values.isnan().all()
    assert "arousal: not measured, all 11 emotions lie on one side" in str(found)


def test_axes_are_those_of_the_layer_that_is_asked_for():
    activations = placed(7, 3.0, n_topics=2, noise=0.5)
    noise = np.random.default_rng(0).standard_normal((40, 1, 16))
    two = planted(
        np.concatenate([noise, activations.values.numpy()], 1), activations.stimuli.emotions, activations.stimuli.groups
    )
    two = replace(two, layers=(3, 7))
    expected = valence_arousal(activations, 0, n_permutations=9)
    for source in (two, fit_vectors(two, n_halves=0)):
        found = valence_arousal(source, 7, n_permutations=9)
        np.testing.assert_allclose(found.correlations, expected.correlations, atol=1e-6)
        assert found.layer == 7
        assert not np.allclose(valence_arousal(source, 3, n_permutations=9).correlations, expected.correlations)
    np.testing.assert_allclose(valence_arousal(two, 7).low, expected.low, atol=1e-6)


def test_axes_print_save_and_repeat(tmp_path):
    activations = placed(5, 2.0, n_topics=4, noise=0.5)
    found = valence_arousal(activations, 0, seed=1)
    found.save(tmp_path / "axes")
    loaded = AxisAgreement.load(tmp_path / "axes")
    frame = found.to_frame()
    assert loaded.to_frame().equals(frame)
    assert str(loaded) == str(found)
    assert valence_arousal(activations, 0, seed=1).to_frame().equals(frame)
    assert list(frame["axis"]) == ["valence", "arousal"]
    assert list(frame["n"]) == [20, 20]
    assert frame.loc[0, "best"] == pytest.approx(frame.loc[0, ["pc1", "pc2"]].max())
    assert len(str(found).splitlines()) == 3
    for part in (
        f"valence: |r| = {found.best[0]:.2f} [{found.low[0]:.2f}, {found.high[0]:.2f}]",
        "20 emotions",
        "p = ",
    ):
        assert part in str(found)
    assert "valence" in found._repr_html_()
    assert "no null" in str(valence_arousal(activations, 0, n_permutations=0))


def test_axes_that_cannot_be_measured_are_refused():
    with pytest.raises(ValueError, match=r"received 3 emotions whose valence.*allowed are 4 or more"):
        valence_arousal(placed(6, 1.0, emotions=("happy", "sad", "calm", "bored", "amused")), 0)
    with pytest.raises(ValueError, match="received layer 2"):
        valence_arousal(placed(6, 1.0), 2)
    with pytest.raises(ValueError, match="received layer 2"):
        valence_arousal(fit_vectors(placed(6, 1.0)), 2)


def test_limits_stay_within_what_a_correlation_can_be():
    axes = valence_arousal(placed(2, 0.0, n_topics=3, noise=2.0), 0, n_permutations=0)
    assert (2 * axes.best - axes.high).min() < -0.02
    assert axes.low.min() == 0
