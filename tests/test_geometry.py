"""Geometry: equal arrangements agree fully, unrelated ones give honest p-values, and what only looks like agreement is shown as such."""

import itertools
import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import pdist

from lens_affect.activations import Activations
from lens_affect.geometry import GeometryAgreement, compare_geometry, emotion_rdm
from lens_affect.statistics import derive_generator
from lens_affect.stimuli import EMOTIONS
from tests.test_vectors import class_values, crossed, planted

TWENTY = tuple(EMOTIONS)
TWELVE = TWENTY[:12]
PLEASANT = np.array([EMOTIONS[e].valence == "positive" for e in TWENTY])
AROUSED = np.array([EMOTIONS[e].arousal == "high" for e in TWENTY])


def upper(rdm) -> np.ndarray:
    return np.asarray(rdm)[np.triu_indices(len(rdm), 1)]


def into(latent, d, rng) -> np.ndarray:
    """The same arrangement in d dimensions: distances and angles stay, coordinates do not."""
    return latent @ np.linalg.qr(rng.standard_normal((d, latent.shape[1])))[0].T


def read(means, rng, *, emotions=TWELVE, n_topics=12, noise=0.0, topic="topic", text_noise=None) -> Activations:
    """A source with these class means; `text_noise` is what another source that read the same texts has too."""
    labels, groups = crossed(emotions, n_topics)
    values = class_values(rng, labels, dict(zip(emotions, means, strict=True)), noise=noise)
    if text_noise is not None:
        values += into(text_noise, means.shape[1], rng)[:, None]
    found = planted(values, labels, [g.replace("topic", topic) for g in groups])
    texts = found.stimuli.texts if text_noise is not None else tuple(f"{topic} {t}" for t in found.stimuli.texts)
    return replace(found, stimuli=replace(found.stimuli, texts=texts))


def pair_of(seed, *, shared=1.0, rank=6, emotions=TWELVE, n_topics=12, noise=0.0, topics=("topic", "topic"), of=24):
    """Two sources of widths 24 and 32 whose latent arrangements share a part, and the noise-free correlation of their RDMs."""
    rng = np.random.default_rng(seed)
    own, other = rng.standard_normal((2, len(emotions), rank))
    latents = own, shared * own + math.sqrt(1 - shared**2) * other
    a, b = (
        read(into(latent, d, rng), rng, emotions=emotions, n_topics=n_topics, noise=noise, topic=topic)
        for latent, d, topic in zip(latents, (of, 32), topics, strict=True)
    )
    truth = stats.spearmanr(*map(distances, latents)).statistic
    return a, b, truth


def distances(means) -> np.ndarray:
    """Upper triangle of the RDM by scipy."""
    return pdist(means - means.mean(0), "cosine")


def without(activations, groups) -> Activations:
    return activations.select(groups=[g for g in dict.fromkeys(activations.stimuli.groups) if g not in groups])


def rho_by_hand(a, b) -> float:
    return float(stats.spearmanr(upper(emotion_rdm(a, 0)), upper(emotion_rdm(b, 0))).statistic)


# --- the matrix ------------------------------------------------------------------------------------------------------


def test_the_rdm_is_one_minus_the_cosine_of_centred_class_means():
    rng = np.random.default_rng(0)
    labels, groups = crossed(("sad", "happy", "calm", "angry"), 3, per_cell=2, n_neutral=5)
    values = rng.standard_normal((len(labels), 2, 6))
    found = emotion_rdm(planted(values, labels, groups), 1)
    order = ("happy", "sad", "calm", "angry")  # the paper's, as in stimuli.labels
    means = np.stack([values[np.array(labels) == e, 1].mean(0) for e in order])
    np.testing.assert_allclose(upper(found), distances(means), atol=1e-6)
    assert torch.equal(found, found.T)
    assert (found.diagonal() == 0).all()


def test_opposite_emotions_are_two_apart_and_equal_directions_nothing():
    means = {"happy": [2.0, 0], "calm": [1.0, 0], "sad": [-2.0, 0], "angry": [-1.0, 0]}
    found = emotion_rdm(planted(np.array(list(means.values()))[:, None], list(means), ["a"] * 4), 0)
    expected = {("happy", "calm"): 0.0, ("happy", "sad"): 2.0, ("sad", "angry"): 0.0}
    order = ["happy", "sad", "calm", "angry"]
    for (a, b), value in expected.items():
        assert found[order.index(a), order.index(b)].item() == pytest.approx(value, abs=1e-12)


def test_rows_choose_the_texts_of_the_rdm():
    a, _, _ = pair_of(0, noise=1)
    rows = [i for i, g in enumerate(a.stimuli.groups) if g in ("topic 3", "topic 5")]
    assert torch.equal(emotion_rdm(a, 0, rows=rows), emotion_rdm(a.select(groups=["topic 3", "topic 5"]), 0))
    assert not torch.allclose(emotion_rdm(a, 0, rows=rows), emotion_rdm(a, 0))


def test_cell_means_kept_as_moments_give_the_rdm_of_all_texts():
    rng = np.random.default_rng(1)
    cells = [(e, g, n) for e in TWELVE[:5] for g, n in (("a", 1), ("b", 4))]
    labels = [e for e, _, n in cells for _ in range(n)]
    groups = [g for _, g, n in cells for _ in range(n)]
    values = rng.standard_normal((len(labels), 1, 6)).astype(np.float32)
    cell = np.repeat(np.arange(len(cells)), [n for *_, n in cells])
    means = np.stack([values[cell == i].mean(0) for i in range(len(cells))])
    pooled = planted(values, labels, groups)
    moments = planted(means, [e for e, *_ in cells], [g for _, g, _ in cells])
    moments = replace(moments, counts=torch.tensor([n for *_, n in cells]))
    np.testing.assert_allclose(emotion_rdm(moments, 0), emotion_rdm(pooled, 0), atol=1e-6)


# --- agreement -------------------------------------------------------------------------------------------------------


def test_a_rotated_scaled_and_shifted_space_of_another_width_agrees_fully():
    a, _, _ = pair_of(0, noise=1)
    rng = np.random.default_rng(1)
    turned = 7 * into(a.values[:, 0].double().numpy(), 40, rng) + rng.standard_normal(40)
    b = planted(turned[:, None], a.stimuli.emotions, a.stimuli.groups)
    found = compare_geometry(a, b, layers=(0, 0), n_permutations=199)
    for value in (found.rho, found.low, found.high, found.corrected_disjoint):
        assert value == pytest.approx(1, abs=1e-6)
    assert found.p == pytest.approx(1 / 200)
    assert found.reliability_first == pytest.approx(found.reliability_second, abs=1e-6)
    assert 0.5 < found.ceiling < 0.95
    assert found.corrected == pytest.approx(1 / found.ceiling)  # more than 1: the noise of the same texts agrees too


def test_the_correlation_is_that_of_scipy_with_ties_too():
    a, b, _ = pair_of(3, shared=0.7, noise=0.5)
    found = compare_geometry(a, b, layers=(0, 0), n_permutations=0, n_halves=0)
    assert found.rho == pytest.approx(rho_by_hand(a, b), abs=1e-12)
    assert math.isnan(found.p)
    angles = np.pi / 180 * np.array([0, 90, 180, 270, 0, 90])  # few distinct cosines
    tied = np.stack([np.cos(angles), np.sin(angles)], 1) * np.array([1, 2, 1, 2, 1, 1])[:, None]
    other = np.random.default_rng(0).standard_normal((6, 3))
    both = [planted(m[:, None], TWELVE[:6], ["a"] * 6) for m in (tied, other)]
    assert len(np.unique(upper(emotion_rdm(both[0], 0)).round(9))) < 15
    found = compare_geometry(*both, layers=(0, 0), n_permutations=0)
    rounded = [upper(emotion_rdm(x, 0)) for x in both]
    assert found.rho == pytest.approx(stats.spearmanr(*rounded).statistic, abs=1e-12)


@pytest.mark.parametrize(("n_emotions", "n"), [(4, 80), (12, 200)])
def test_unrelated_geometries_have_uniform_p(n_emotions, n):
    p = []
    for seed in range(n):
        a, b, _ = pair_of(seed, shared=0.0, emotions=TWELVE[:n_emotions], n_topics=1)
        p.append(compare_geometry(a, b, layers=(0, 0), n_permutations=99, n_halves=0, seed=seed).p)
    jitter = np.random.default_rng(0).random(n) / 100  # p moves in steps of 1/100
    assert np.mean(np.array(p) <= 0.05) <= 0.1  # 0.05 and 2 to 3 standard errors
    if n_emotions > 4:  # four have 24 relabellings, and ties then count against the finding
        assert stats.kstest(np.array(p) - jitter, "uniform").pvalue > 0.01


def test_p_is_the_share_of_relabelled_matrices_that_agree_at_least_as_well():
    a, b, _ = pair_of(2, shared=0.6, emotions=TWELVE[:5], noise=0.3)
    found = compare_geometry(a, b, layers=(0, 0), n_permutations=300, n_halves=0, seed=4)
    first, second = (np.asarray(r) for r in (found.rdm_first, found.rdm_second))

    def rho(order):
        return stats.spearmanr(upper(first), upper(second[np.ix_(order, order)])).statistic

    drawn = derive_generator(4, "geometry", "permutation").permuted(np.tile(np.arange(5), (300, 1)), axis=1)
    hits = sum(rho(order) >= found.rho - 1e-9 for order in drawn)
    assert found.p == pytest.approx((1 + hits) / 301)
    everything = np.mean([rho(list(order)) >= found.rho - 1e-9 for order in itertools.permutations(range(5))])
    assert 0.02 < everything < 0.5
    assert found.p == pytest.approx(everything, abs=0.07)  # 3 standard errors


@pytest.mark.parametrize("topics", [("topic", "topic"), ("topic", "place")])
def test_the_interval_is_the_jackknife_over_groups_of_both(topics):
    a, b, _ = pair_of(5, shared=0.8, noise=1, n_topics=6, topics=topics)
    found = compare_geometry(a, b, layers=(0, 0), n_permutations=0, n_halves=0)
    if topics[0] == topics[1]:
        left_out = [rho_by_hand(without(a, [f"topic {t}"]), without(b, [f"topic {t}"])) for t in range(6)]
    else:
        left_out = [rho_by_hand(without(a, [f"topic {t}"]), b) for t in range(6)]
        left_out += [rho_by_hand(a, without(b, [f"place {t}"])) for t in range(6)]
    n = len(left_out)
    spread = math.sqrt((n - 1) / n * sum((r - np.mean(left_out)) ** 2 for r in left_out))
    half = stats.t.ppf(0.975, n - 1) * spread
    assert found.n_groups == n
    assert found.n_shared_groups == (6 if n == 6 else 0)
    assert found.low == pytest.approx(found.rho - half, abs=1e-9)
    assert found.high == pytest.approx(min(found.rho + half, 1), abs=1e-9)


def test_many_groups_are_left_out_in_24_blocks():
    a, b, _ = pair_of(5, shared=0.8, noise=1, n_topics=30, emotions=TWELVE[:6])
    found = compare_geometry(a, b, layers=(0, 0), n_permutations=0, n_halves=0)
    blocks = [[f"topic {t}" for t in range(30) if t % 24 == block] for block in range(24)]
    left_out = [rho_by_hand(without(a, block), without(b, block)) for block in blocks]
    half = stats.t.ppf(0.975, 23) * math.sqrt(23 * np.var(left_out))
    assert found.low == pytest.approx(found.rho - half, abs=1e-9)
    assert found.n_groups == 30


def test_limits_stay_within_what_a_correlation_can_be():
    a, b, _ = pair_of(2, noise=0.3, n_topics=3)
    found = compare_geometry(a, b, layers=(0, 0), n_permutations=0, n_halves=0)
    assert 2 * found.rho - found.low > 1.02  # the interval is symmetric before it is cut
    assert found.high == 1


@pytest.mark.parametrize("topics", [("topic", "topic"), ("topic", "place")])
def test_the_interval_covers_the_expected_agreement(topics):
    rng = np.random.default_rng(7)
    latent = rng.standard_normal((2, 12, 6))
    means = into(latent[0], 24, rng), into(0.8 * latent[0] + 0.6 * latent[1], 32, rng)
    found = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        a, b = (read(m, rng, noise=0.7, n_topics=6, topic=t) for m, t in zip(means, topics, strict=True))
        found.append(compare_geometry(a, b, layers=(0, 0), n_permutations=0, n_halves=0))
    expected = np.mean([f.rho for f in found])
    assert np.mean([f.low <= expected <= f.high for f in found]) >= 0.88  # 0.99 measured; 0.95 less 2 standard errors
    widths = np.mean([f.high - f.low for f in found])
    assert widths < 2.5 * 2 * 1.96 * np.std([f.rho for f in found])  # it excludes something


def test_reliability_of_two_groups_is_the_stepped_up_correlation_of_both():
    a, b, _ = pair_of(6, shared=0.9, noise=0.5, n_topics=2)
    found = compare_geometry(a, b, layers=(0, 0), n_permutations=0, n_halves=7)
    zero, one = ([x.select(groups=[f"topic {t}"]) for x in (a, b)] for t in range(2))
    within = [rho_by_hand(zero[i], one[i]) for i in range(2)]
    across = (rho_by_hand(zero[0], one[1]) + rho_by_hand(one[0], zero[1])) / 2
    stepped = [2 * r / (1 + r) for r in within]
    assert found.reliability_first == pytest.approx(stepped[0], abs=1e-9)
    assert found.reliability_second == pytest.approx(stepped[1], abs=1e-9)
    assert found.ceiling == pytest.approx(math.sqrt(stepped[0] * stepped[1]), abs=1e-9)
    assert found.corrected == pytest.approx(found.rho / found.ceiling, abs=1e-9)
    assert found.corrected_disjoint == pytest.approx(across / math.sqrt(within[0] * within[1]), abs=1e-9)


def average(noise, *, n=12, shared=1.0):
    rows = []
    for seed in range(n):
        a, b, truth = pair_of(seed, shared=shared, noise=noise)
        found = compare_geometry(a, b, layers=(0, 0), n_permutations=0, n_halves=10, seed=seed)
        rows.append((found.rho, found.ceiling, found.corrected, found.corrected_disjoint, truth))
    return np.mean(rows, axis=0)


def test_noise_lowers_agreement_to_the_ceiling_and_the_correction_undoes_it():
    rho, ceiling, corrected, disjoint, truth = average(0.7)
    assert truth == pytest.approx(1)
    assert rho < 0.93
    assert rho == pytest.approx(ceiling, abs=0.03)
    assert corrected == pytest.approx(1, abs=0.03)
    assert disjoint == pytest.approx(1, abs=0.03)


def test_partly_shared_geometry_stays_below_the_ceiling_and_is_corrected_to_what_it_is_without_noise():
    rho, ceiling, corrected, disjoint, truth = average(0.7, shared=0.8)
    assert 0.3 < truth < 0.75
    assert rho < truth - 0.02
    assert rho < ceiling - 0.2
    assert corrected == pytest.approx(truth, abs=0.05)
    assert disjoint == pytest.approx(truth, abs=0.05)


def test_where_reliability_is_low_stepping_up_corrects_too_much_and_disjoint_halves_do_not():
    _, ceiling, corrected, disjoint, _ = average(1.3)
    assert ceiling < 0.7
    assert corrected > 1.05
    assert abs(disjoint - 1) < abs(corrected - 1) - 0.03


def test_the_same_texts_agree_beyond_the_ceiling_and_disjoint_halves_say_so():
    rows = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        latent, text_noise = rng.standard_normal((12, 6)), 1.5 * rng.standard_normal((144, 24))
        a, b = (read(into(latent, d, rng), rng, text_noise=text_noise, noise=0.1) for d in (24, 32))
        found = compare_geometry(a, b, layers=(0, 0), n_permutations=0, n_halves=10, seed=seed)
        rows.append((found.rho, found.ceiling, found.corrected, found.corrected_disjoint))
        assert found.n_shared_texts == 144
        assert "144 texts were read by both" in str(found)
    rho, ceiling, corrected, disjoint = np.mean(rows, axis=0)
    assert rho > ceiling + 0.1
    assert corrected > 1.15
    assert disjoint == pytest.approx(1, abs=0.06)


def test_unequal_numbers_of_texts_make_pure_noise_agree_and_are_warned_of(caplog):
    def noise(seed, counts, d=400):
        labels = [e for e, n in zip(TWELVE, counts, strict=True) for _ in range(n)]
        groups = [f"topic {i}" for n in counts for i in range(n)]
        return planted(np.random.default_rng(seed).standard_normal((len(labels), 1, d)), labels, groups)

    def agreement(counts):
        pairs = [(noise(2 * s, counts), noise(2 * s + 1, counts)) for s in range(8)]
        with caplog.at_level(logging.WARNING, logger="lens_affect.geometry"):
            return np.mean([compare_geometry(*pair, layers=(0, 0), n_permutations=0, n_halves=0).rho for pair in pairs])

    assert abs(agreement([10, 11, 12] * 4)) < 0.1
    assert not caplog.records
    assert agreement([4] * 6 + [24] * 6) > 0.3
    assert "4 to 24 texts in the first and 4 to 24 in the second" in caplog.text


def test_emotions_are_matched_by_name_and_neutral_is_left_out():
    a, b, _ = pair_of(8, shared=0.9, noise=0.5)
    expected = compare_geometry(a.select(emotions=TWELVE[3:]), b.select(emotions=TWELVE[3:]), layers=(0, 0))
    rng = np.random.default_rng(0)
    fewer = b.select(emotions=TWELVE[3:])
    order = rng.permutation(len(fewer.stimuli))
    labels = [fewer.stimuli.emotions[i] for i in order] + ["neutral"] * 12 + ["odd"] * 12
    groups = [fewer.stimuli.groups[i] for i in order] + [f"topic {t}" for t in range(12)] * 2
    values = np.concatenate([fewer.values.numpy()[order], 9 * rng.standard_normal((24, 1, 32))])
    found = compare_geometry(a, planted(values, labels, groups), layers=(0, 0))
    assert found.emotions == TWELVE[3:]
    for name in ("rho", "p", "low", "high", "reliability_first", "reliability_second", "corrected_disjoint"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=1e-9), name
    assert found.n_texts == (9 * 12, 9 * 12)


def test_labels_that_only_the_second_orders_otherwise_are_still_matched():
    names = ("elated", "bored", "tense", "moved", "amused")  # not the paper's: ordered by first appearance
    a, b, _ = pair_of(9, emotions=names)
    turned = b.select(rows=list(reversed(range(len(b.stimuli)))))
    assert turned.stimuli.labels != b.stimuli.labels
    assert compare_geometry(a, turned, layers=(0, 0), n_permutations=0).rho == pytest.approx(1)


def test_groups_nested_in_emotions_are_halved_and_left_out_by_emotion():
    rng = np.random.default_rng(10)
    means = into(rng.standard_normal((12, 6)), 24, rng)

    def nested(per_emotion):
        labels = [e for e in TWELVE for _ in range(per_emotion)]
        values = class_values(rng, labels, dict(zip(TWELVE, means, strict=True)), noise=0.3)
        return planted(values, labels, [f"story {i}" for i in range(len(labels))])

    found = compare_geometry(nested(3), nested(3), layers=(0, 0), n_permutations=0)
    assert found.n_groups == 36
    assert found.low < found.rho <= found.high  # in 24 blocks; none takes all texts of an emotion
    assert 0.8 < found.reliability_first < 1  # by chance a random half has every emotion in 3 of 100 cases
    single = compare_geometry(nested(1), nested(1), layers=(0, 0))
    assert math.isnan(single.low)
    assert math.isnan(single.reliability_first)
    assert math.isnan(single.corrected)
    assert "could not be measured" in str(single)


def test_halves_of_an_odd_number_of_texts_are_equally_unequal_for_every_emotion():
    labels = [e for e in TWELVE for _ in range(3)]
    found = []
    for seed in range(8):
        noise = np.random.default_rng(seed).standard_normal((2, 36, 1, 400))
        pair = [planted(values, labels, [f"story {i}" for i in range(36)]) for values in noise]
        one = compare_geometry(*pair, layers=(0, 0), n_permutations=0, seed=seed)
        found += [one.reliability_first, one.reliability_second]
    # One text of some emotions and two of others: opposite halves would have opposite patterns, and noise a reliability of -0.37.
    assert abs(np.mean(found)) < 0.15


def test_a_reliability_that_is_not_positive_leaves_no_correction():
    rng = np.random.default_rng(11)
    found = [
        compare_geometry(
            read(np.zeros((12, 24)), rng, noise=1),
            read(np.zeros((12, 24)), rng, noise=1),
            layers=(0, 0),
            n_halves=5,
            seed=s,
        )
        for s in range(6)
    ]
    without_signal = [f for f in found if min(f.reliability_first, f.reliability_second) <= 0]
    assert len(without_signal) >= 2
    for one in without_signal:
        assert math.isnan(one.ceiling)
        assert math.isnan(one.corrected)
        assert "not positive" in str(one)


def test_the_layers_are_those_of_the_models():
    a, b, _ = pair_of(12, noise=0.5)
    noise = np.random.default_rng(0).standard_normal((144, 1, 24))
    two = planted(np.concatenate([noise, a.values.numpy()], 1), a.stimuli.emotions, a.stimuli.groups)
    two = replace(two, layers=(3, 7))
    assert compare_geometry(two, b, layers=(7, 0)).rho == pytest.approx(compare_geometry(a, b, layers=(0, 0)).rho)
    assert compare_geometry(two, b, layers=(3, 0)).rho < 0.3
    assert compare_geometry(two, two, layers=(7, 7)).rho == pytest.approx(1)


def test_an_agreement_prints_saves_and_repeats(tmp_path):
    a, b, _ = pair_of(13, shared=0.9, noise=0.7)
    found = compare_geometry(a, b, layers=(0, 0), n_permutations=99, seed=1)
    again, other = (compare_geometry(a, b, layers=(0, 0), n_permutations=99, seed=s) for s in (1, 2))
    frame = found.to_frame()
    assert frame.equals(again.to_frame())
    assert other.reliability_first != found.reliability_first
    assert other.rho == found.rho
    found.save(tmp_path / "agreement")
    loaded = GeometryAgreement.load(tmp_path / "agreement")
    assert str(loaded) == str(found)
    assert loaded.to_frame().equals(frame)
    assert torch.equal(loaded.rdm_second, found.rdm_second)
    assert loaded.provenance_second == found.provenance_second
    assert len(frame) == 1
    assert frame.loc[0, "rho"] == found.rho
    assert frame.loc[0, "n_emotions"] == 12
    assert frame.loc[0, "layer_second"] == 0
    text = str(found)
    assert len(text.splitlines()) <= 5
    for part in (f"rho = {found.rho:.2f} [{found.low:.2f}, {found.high:.2f}]", "12 emotions", "12 groups", "p = "):
        assert part in text
    assert "rho" in found._repr_html_()


def test_what_cannot_be_compared_is_refused():
    a, b, _ = pair_of(14)
    with pytest.raises(ValueError, match=r"received 3 emotions in common.*allowed are 4 or more.*read stimuli with"):
        compare_geometry(a, b.select(emotions=TWELVE[:3]), layers=(0, 0))
    with pytest.raises(ValueError, match=r"received layer 5; there are activations of \[0\]: extract it"):
        compare_geometry(a, b, layers=(0, 5))
    several = replace(a, arrays={**a.arrays, "mlp_out": a.values})
    with pytest.raises(ValueError, match=r"\.values needs one site"):
        compare_geometry(several, b, layers=(0, 0))
    corners = planted(np.eye(12)[:, None], TWELVE, ["a"] * 12)
    with pytest.raises(ValueError, match=r"second geometry in which all emotions are equally far apart"):
        compare_geometry(a, corners, layers=(0, 0))
    middle = np.concatenate([np.eye(4), -np.eye(4), np.zeros((1, 4))])[:, None]
    with pytest.raises(ValueError, match=r"mean at layer 0 equals the mean of all emotions.*leave it out"):
        emotion_rdm(planted(middle, TWELVE[:9], ["a"] * 9), 0)
    with pytest.raises(ValueError, match=r"rows without a text of \['sad'\].*add rows"):
        emotion_rdm(a, 0, rows=[i for i, e in enumerate(a.stimuli.emotions) if e != "sad"])
    with pytest.raises(ValueError, match="needs at least two"):
        emotion_rdm(a.select(emotions=["sad"]), 0)


# --- valence and arousal ---------------------------------------------------------------------------------------------
