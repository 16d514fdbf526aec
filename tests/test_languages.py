"""Transfer between languages: shared directions transfer, separate ones do not, shifts cost nothing, and topics stay held out."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from lens_affect.languages import TransferTable, language_transfer
from lens_affect.localization import localize
from lens_affect.meaning import load_emotion_words
from lens_affect.stimuli import EMOTIONS, load_stimuli, named_emotion
from tests.test_vectors import crossed, planted

FIVE = tuple(EMOTIONS)[:5]
TOPICS = 6


def language(directions, *, seed, noise=0.5, shift=0.0, topic=0.0, n_topics=TOPICS):
    """Texts of five emotions on six topics: each emotion's direction, a shift of the language, one per topic, and noise. Layer 0 is noise only."""
    rng = np.random.default_rng(seed)
    emotions, groups = crossed(FIVE, n_topics)
    at = directions[[FIVE.index(e) for e in emotions]]
    offsets = topic * rng.standard_normal((n_topics, at.shape[1]))[[int(g.split()[1]) for g in groups]]
    values = at + offsets + shift * rng.standard_normal(at.shape[1]) + noise * rng.standard_normal(at.shape)
    nothing = rng.standard_normal(at.shape)
    return planted(np.stack([nothing, values], 1), emotions, groups)


@pytest.fixture(scope="module")
def shared():
    directions = 3 * np.random.default_rng(0).standard_normal((5, 24))
    return {
        "English": language(directions, seed=1),
        "Spanish": language(directions, seed=2, shift=50.0),
        "Chinese": language(directions, seed=3, shift=50.0),
    }


def test_shared_directions_transfer_whatever_the_language_adds_to_all_its_texts(shared):
    found = language_transfer(shared, n_permutations=200)
    assert found.accuracy[..., 1].eq(1).all()
    assert found.p_family[..., 1].max() == pytest.approx(1 / 201)
    assert (found.accuracy[..., 0] < 0.5).all()
    assert (found.cosine[..., 1] > 0.95).all()
    assert (found.cosine_disjoint[..., 1] > 0.9).all()
    np.testing.assert_allclose(found.corrected[..., 1], 1, atol=0.05)
    np.testing.assert_allclose(found.cosine.diagonal(dim1=0, dim2=1), 1)
    assert (found.cosine_p[..., 1] < 0.05).all()
    assert found.best_layer == 1
    assert "accuracy 1.00 [0.61, 1.00] across languages" in str(found)
    assert "English to Spanish 1.00" in str(found)
    assert len(str(found).splitlines()) <= 5


def test_directions_of_its_own_make_a_language_readable_but_not_from_another():
    rng = np.random.default_rng(5)
    both = {"English": language(3 * rng.standard_normal((5, 200)), seed=1),
            "Chinese": language(3 * rng.standard_normal((5, 200)), seed=2)}  # fmt: skip
    found = language_transfer(both, n_permutations=200)
    assert found.accuracy[0, 0, 1] == found.accuracy[1, 1, 1] == 1
    assert (found.accuracy[[0, 1], [1, 0], 1] < 0.6).all()
    assert found.cosine_disjoint[0, 1, 1].abs() < 0.2
    assert found.cosine_disjoint[0, 0, 1] > 0.9
    assert found.p_family[0, 0, 1] < 0.01


def test_within_a_language_it_is_the_localization_curve(shared):
    found = language_transfer(shared, n_permutations=20)
    for i, activations in enumerate(shared.values()):
        curve = localize(activations, n_permutations=0)
        np.testing.assert_allclose(found.accuracy[i, i], curve.values)
        np.testing.assert_allclose(found.low[i, i], curve.low)
        np.testing.assert_allclose(found.high[i, i], curve.high)


@pytest.mark.parametrize("centring", ["grand_mean", "within_topic"])
def test_decoding_is_a_count_by_hand_with_the_topic_held_out_in_both(centring):
    rng = np.random.default_rng(7)
    directions = rng.standard_normal((5, 8))
    a, b = language(directions, seed=1, noise=1.0, topic=1.0), language(directions, seed=2, noise=1.0, topic=1.0)
    found = language_transfer({"a": a, "b": b}, centring=centring, n_permutations=20)
    x, y = (s.values[:, 1].double().numpy().copy() for s in (a, b))
    labels, groups = np.array(a.stimuli.emotions), np.array(a.stimuli.groups)
    if centring == "within_topic":
        for g in set(groups):
            x[groups == g] -= x[groups == g].mean(0)
            y[groups == g] -= y[groups == g].mean(0)
    right = []
    for i, (emotion, group) in enumerate(zip(labels, groups, strict=True)):
        train = groups != group
        means = np.stack([x[train & (labels == e)].mean(0) for e in FIVE])
        means -= means.mean(0)
        text = y[i] - y[train].mean(0)
        cosines = means @ text / np.linalg.norm(means, axis=1)
        right.append(FIVE[int(cosines.argmax())] == emotion)
    assert found.accuracy[0, 1, 1] == pytest.approx(np.mean(right))
    per_topic = [np.mean([r for r, g in zip(right, groups, strict=True) if g == t]) for t in dict.fromkeys(groups)]
    interval = stats.ttest_1samp(per_topic, 0).confidence_interval()
    assert (found.low[0, 1, 1], found.high[0, 1, 1]) == pytest.approx((interval.low, interval.high))
    np.testing.assert_allclose(found.per_topic[:, 0, 1, 1], per_topic)


def test_a_topic_that_moves_all_its_texts_costs_nothing_when_topics_are_centred():
    directions = 2 * np.random.default_rng(0).standard_normal((5, 24))
    texts = {name: language(directions, seed=s, topic=20.0) for s, name in enumerate(("English", "Chinese"))}
    kept, centred = (language_transfer(texts, centring=c, n_permutations=20) for c in ("grand_mean", "within_topic"))
    assert (centred.accuracy[..., 1] == 1).all()
    assert (kept.accuracy[..., 1] < 0.9).all()


def test_without_emotion_p_is_uniform():
    nothing = np.zeros((5, 12))
    tables = [
        language_transfer({"a": language(nothing, seed=2 * i), "b": language(nothing, seed=2 * i + 1)},
                          n_permutations=49, seed=i)
        for i in range(20)
    ]  # fmt: skip
    p = np.array([t.p[0, 1, 1].item() for t in tables])
    assert 0.3 < p.mean() < 0.75  # accuracies are coarse, so p is a little too large
    families = np.array([t.p_family[[0, 1], [1, 0]].min().item() for t in tables])
    assert (families <= 0.1).mean() <= 0.3
    cosine_p = np.array([t.cosine_p[0, 1, 1].item() for t in tables])
    assert stats.kstest(cosine_p, "uniform").pvalue > 0.01


def test_tokens_per_word_are_counted_with_the_models_tokenizer(shared, multilingual):
    assert language_transfer(shared, n_permutations=20).tokens_per_word.isnan().all()
    texts = {"Spanish": "feliz feliz tristeza", "Chinese": "平静平静"}
    small = {}
    for name, text in texts.items():
        activations = language(np.eye(5), seed=1)
        stimuli = replace(activations.stimuli, texts=(text,) * len(activations.stimuli))
        small[name] = replace(activations, stimuli=stimuli)
    found = language_transfer(small, model=multilingual, n_permutations=20)
    assert found.tokens_per_word.tolist() == [1.0, 0.5]  # per word, and per character


def test_only_what_languages_have_in_common_is_used(shared):
    english = shared["English"]
    less = shared["Spanish"].select(emotions=FIVE[:3], groups=[f"topic {i}" for i in range(4)])
    found = language_transfer({"English": english, "Spanish": less}, n_permutations=20)
    assert found.emotions == FIVE[:3]
    assert len(found.topics) == 4
    assert found.n_texts == 12


def test_the_result_is_saved_and_bad_input_is_named(shared, tmp_path):
    found = language_transfer(shared, n_permutations=20)
    again = TransferTable.load(found.save(tmp_path / "transfer"))
    assert again.to_frame().equals(found.to_frame())
    assert len(found.to_frame()) == 3 * 3 * 2
    assert "<table" in found._repr_html_()
    english = shared["English"]
    with pytest.raises(ValueError, match="received 1 languages; allowed are two or more"):
        language_transfer({"English": english})
    other = replace(english, provenance=english.provenance.updated(model="another"))
    with pytest.raises(ValueError, match="received model 'planted' for English and 'another' for Chinese"):
        language_transfer({"English": english, "Chinese": other})
    with pytest.raises(ValueError, match="read both at the same site and layers, with the same pooling"):
        language_transfer({"English": english, "Chinese": replace(english, pooling="last")})
    with pytest.raises(ValueError, match="received 5 emotions and 2 topics"):
        language_transfer({"English": english, "Chinese": english.select(groups=["topic 0", "topic 1"])})
    gap = english.select(rows=[i for i in range(len(english.stimuli)) if i != 0])
    with pytest.raises(ValueError, match=r"received no Chinese text of 'happy' on 'topic 0' \(1 cells are empty\)"):
        language_transfer({"English": english, "Chinese": gap})
    with pytest.raises(ValueError, match="received n_permutations=1; allowed is 2 or more"):
        language_transfer(shared, n_permutations=1)
    moments = replace(english, squares={"resid_post": english.values})
    with pytest.raises(ValueError, match="received Chinese kept as moments"):
        language_transfer({"English": english, "Chinese": moments})


# The passages in other languages


@pytest.mark.parametrize(("name", "language_name"), [("passages_es", "Spanish"), ("passages_zh", "Chinese")])
def test_our_passages_keep_the_rules_of_their_data_card(name, language_name, passages):
    found = load_stimuli(name)
    assert len(found) == len(set(found.texts)) == 96
    assert set(found.groups) == set(passages.groups)
    cells = Counter(zip(found.emotions, found.groups, strict=True))
    assert set(cells.values()) == {1}
    assert len(cells) == 96
    assert Counter(EMOTIONS[e].quadrant for e in found.labels) == dict.fromkeys(
        {e.quadrant for e in EMOTIONS.values()}, 2
    )
    words = load_emotion_words()
    words = words[words["language"] == language_name]
    for text, emotion in zip(found.texts, found.emotions, strict=True):
        names = words[words["emotion"] == emotion]["word"]
        named = [w for w in names if (w in text if name == "passages_zh" else re.search(rf"\b{w}", text, re.I))]
        assert not named, (text, named)
        assert named_emotion(text, emotion) is None


def test_a_set_in_chinese_counts_characters_in_its_title():
    assert "54-89 characters each" in str(load_stimuli("passages_zh"))
    assert "41-59 words each" in str(load_stimuli("passages_es"))
