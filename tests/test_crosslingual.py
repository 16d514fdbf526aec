"""Scripts of raised tokens: planted directions bring up their script, random ones nothing beyond chance, tuned models are compared by emotion."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

from lens_affect.adapter import model_info, unembedding
from lens_affect.crosslingual import ScriptComparison, ScriptTable, _members, script_entanglement
from lens_affect.models import load_model
from lens_affect.scripts import token_scripts
from lens_affect.stimuli import EMOTIONS
from lens_affect.vectors import EmotionVectors, fit_vectors
from tests.test_vectors import crossed, planted
from tests.tiny import make_multilingual

SIX = tuple(EMOTIONS)[:6]


def vectors_of(model, directions, emotions=SIX) -> EmotionVectors:
    """Vectors with these directions[emotion, d_model] at layer 0 (and noise at layer 1) of a two-layer model."""
    unit = directions / directions.norm(dim=-1, keepdim=True)
    other = torch.randn(unit.shape, generator=torch.Generator().manual_seed(9))
    both = torch.stack([unit, other / other.norm(dim=-1, keepdim=True)], 1)
    return replace(
        _any_vectors(both.shape[-1], tuple(emotions)), directions=both, provenance=model_info(model).provenance
    )


@functools.cache
def _any_vectors(width, emotions):
    labels, groups = crossed(emotions, 2)
    values = np.random.default_rng(0).standard_normal((len(labels), 2, width))
    return fit_vectors(planted(values, labels, groups), n_halves=1)


def random_directions(model, seed, n=6):
    return torch.randn(n, int(model.cfg.d_model), generator=torch.Generator().manual_seed(seed))


def of_script(model, script, n, seed):
    """Directions made of the unembedding columns of n tokens of one script."""
    matrix = unembedding(model)
    known = token_scripts(model.tokenizer, matrix.shape[1])
    rows = torch.tensor([i for i, s in enumerate(known.scripts) if s == script])
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.stack([rows[torch.randperm(len(rows), generator=generator)[:n]] for _ in SIX])
    return matrix.T[chosen].sum(1), chosen


def test_a_direction_made_of_chinese_tokens_brings_up_chinese_tokens_only(multilingual):
    directions, chosen = of_script(multilingual, "Han", 1, seed=0)
    found = script_entanglement(multilingual, vectors_of(multilingual, directions), 0, k=1, n_random=20)
    assert found.per_emotion()["Han"].tolist() == [1.0] * len(SIX)
    assert found.tokens["token"].tolist() == [multilingual.tokenizer.decode([t]) for t in chosen[:, 0].tolist()]
    row = found.to_frame().set_index("script").loc["Han"]
    assert row["p"] == row["p_family"] == pytest.approx(1 / 21)
    assert row["share"] == row["low"] == row["high"] == 1
    assert found.foreign.tolist() == [1.0] * len(SIX)
    assert "1.000 [1.000, 1.000] are in a script other than Latin" in str(found)
    assert "the smallest that 20 draws allow" in str(found)


def test_one_emotion_that_brings_up_a_script_is_found_among_others_that_do_not(multilingual):
    """A script that random directions hardly bring up: the mean over emotions hides it, a test of each emotion does not."""
    directions = random_directions(multilingual, 11)
    directions[2] = of_script(multilingual, "Devanagari", 4, seed=0)[0][2]
    found = script_entanglement(multilingual, vectors_of(multilingual, directions), 0, k=4)
    tests = found.emotion_tests().set_index(["emotion", "script"])
    assert tests.loc[(SIX[2], "Devanagari"), "p_family"] == pytest.approx(1 / 201)
    assert tests.loc[(SIX[2], "Devanagari"), "share"] == found.per_emotion().loc[SIX[2], "Devanagari"]
    others = tests.drop(index=SIX[2], level="emotion").xs("Devanagari", level="script")
    assert (others["p_family"] > 0.05).all()
    assert f"after correction over emotions, not over scripts: {SIX[2]}" in str(found)
    with pytest.raises(ValueError, match="saved without tests of single emotions"):
        replace(found, p_emotion=None).emotion_tests()


def test_without_a_script_of_its_own_an_emotion_is_found_as_rarely_as_p_says(multilingual):
    p = []
    for i in range(40):
        vectors = vectors_of(multilingual, random_directions(multilingual, 300 + i))
        found = script_entanglement(multilingual, vectors, 0, k=30, seed=i)
        p.append(float(found.p_emotion[:, found.scripts.index("Han")].min()))
    assert (np.array(p) <= 0.1).mean() <= 0.1 + 3 * np.sqrt(0.09 / 40)


def test_draws_share_no_direction_until_all_are_used_and_none_has_one_twice():
    members = _members(50, 200, 6, seed=0)
    assert members.shape == (200, 6)
    assert sorted(members[:50].flatten().tolist()) == list(range(300))
    assert all(len(set(row)) == 6 for row in members.tolist())
    assert torch.equal(_members(20, 20, 6, seed=0), torch.arange(120).view(20, 6))


def test_shares_sum_to_one_and_are_counted_over_all_tokens(multilingual):
    found = script_entanglement(multilingual, vectors_of(multilingual, random_directions(multilingual, 1)), 0, k=40)
    np.testing.assert_allclose(found.shares.sum(1), 1)
    np.testing.assert_allclose(found.random.sum(1), 1)
    np.testing.assert_allclose(found.vocabulary.sum(), 1)
    counted = found.tokens.groupby(["emotion", "script"]).size() / 40
    for (emotion, script), share in counted.items():
        assert found.per_emotion().loc[emotion, script] == pytest.approx(share)
    known = token_scripts(multilingual.tokenizer, unembedding(multilingual).shape[1])
    assert found.vocabulary[found.scripts.index("Han")] == pytest.approx(
        known.scripts.count("Han") / len(known.scripts)
    )
    everything = script_entanglement(multilingual, vectors_of(multilingual, random_directions(multilingual, 1)), 0,
                                     k=len(known.scripts), n_random=2)  # fmt: skip
    np.testing.assert_allclose(everything.shares, everything.vocabulary.expand(len(SIX), -1))


def test_random_directions_in_the_place_of_emotions_are_found_as_rarely_as_p_says(multilingual):
    p = [
        script_entanglement(
            multilingual, vectors_of(multilingual, random_directions(multilingual, 100 + i)), 0, k=30, seed=i
        )
        for i in range(60)
    ]
    families = np.array([float(t.p_family.min()) for t in p])
    assert (families <= 0.1).mean() <= 0.22  # 0.1 expected; 0.22 is three standard errors more
    han = np.array([float(t.p[t.scripts.index("Han")]) for t in p])
    assert 0.3 < han.mean() < 0.75


def test_lengths_of_vectors_and_folded_norms_change_nothing():
    words = ["平静", "害怕", "calm", "afraid", "страх", "miedo", "गर्व", "هدوء"]
    tables = []
    for compatibility in (False, True):
        hf_model, tokenizer = make_multilingual(words)
        with torch.no_grad():
            hf_model.model.norm.weight.copy_(torch.linspace(0.2, 3, 64))
        model = load_model(hf_model, tokenizer=tokenizer, compatibility=compatibility)
        directions = random_directions(model, 3)
        tables.append(script_entanglement(model, vectors_of(model, directions * (1 + 9 * compatibility)), 0, k=25))
    raw, folded = tables
    assert raw.provenance.numerics != folded.provenance.numerics
    assert raw.tokens.equals(folded.tokens)
    assert raw.shares.equal(folded.shares)
    np.testing.assert_allclose(raw.random, folded.random)


def test_the_result_is_saved_and_bad_input_is_named(multilingual, tiny_model, tmp_path):
    vectors = vectors_of(multilingual, random_directions(multilingual, 1))
    found = script_entanglement(multilingual, vectors, k=10, n_random=3)
    assert found.layer == 1  # the middle of two
    again = ScriptTable.load(found.save(tmp_path / "table"))
    assert again.to_frame().equals(found.to_frame())
    assert again.tokens.equals(found.tokens)
    assert "<table" in found._repr_html_()
    assert len(str(found).splitlines()) <= 5
    size = unembedding(multilingual).shape[1]
    with pytest.raises(ValueError, match=f"received k=0; allowed are 1 to {size} tokens"):
        script_entanglement(multilingual, vectors, k=0)
    with pytest.raises(ValueError, match="received n_random=0; allowed is 1 or more"):
        script_entanglement(multilingual, vectors, n_random=0)
    with pytest.raises(ValueError, match="received layer 7; there are vectors for 0 to 1"):
        script_entanglement(multilingual, vectors, 7)
    with pytest.raises(ValueError, match="Fit vectors on this model"):
        script_entanglement(tiny_model("llama"), vectors)


def test_a_tuned_model_that_lost_its_chinese_tokens_is_told_from_one_that_did_not(multilingual, tmp_path):
    chinese = script_entanglement(
        multilingual, vectors_of(multilingual, of_script(multilingual, "Han", 1, 0)[0]), 0, k=1
    )
    again = script_entanglement(multilingual, vectors_of(multilingual, of_script(multilingual, "Han", 1, 5)[0]), 0, k=1)
    russian = script_entanglement(
        multilingual, vectors_of(multilingual, of_script(multilingual, "Cyrillic", 1, 1)[0]), 0, k=1
    )
    lost = script_entanglement(base=chinese, tuned=russian)
    row = lost.to_frame().set_index("script")
    assert row.loc["Han", "difference"] == -1
    assert row.loc["Cyrillic", "difference"] == 1
    assert row.loc["Han", "p"] == pytest.approx(2 / 64)  # all and none of six signs flipped
    assert not row.loc["Han", "equivalent"]
    assert row.loc["Thai" if "Thai" in row.index else "Arabic", "equivalent"]
    kept = script_entanglement(base=chinese, tuned=again).to_frame()
    assert kept["difference"].tolist() == [0.0] * len(kept)
    assert kept["equivalent"].all()
    assert (kept["p_family"] == 1).all()
    assert "-1.000" in str(lost) or "+1.000" in str(lost)
    assert ScriptComparison.load(lost.save(tmp_path / "lost")).to_frame().equals(lost.to_frame())
    with pytest.raises(ValueError, match="allowed are equal ones"):
        script_entanglement(
            base=chinese,
            tuned=script_entanglement(
                multilingual, vectors_of(multilingual, random_directions(multilingual, 1)), 0, k=2
            ),
        )
    for given in ({}, {"base": chinese}, {"model": multilingual, "base": chinese, "tuned": again}):
        with pytest.raises(ValueError, match="received neither a model with its vectors nor a pair of tables, or both"):
            script_entanglement(**given)


def test_the_difference_between_models_is_a_paired_one():
    from scipy import stats

    words = ["平静", "害怕", "愤怒", "calm", "afraid", "страх", "miedo", "गर्व", "هدوء"]
    models = [load_model(*make_multilingual(words, seed=s)[:1], tokenizer=make_multilingual(words)[1]) for s in (0, 1)]
    base, tuned = (script_entanglement(m, vectors_of(m, random_directions(m, 5)), 0, k=25) for m in models)
    row = script_entanglement(base=base, tuned=tuned).to_frame().set_index("script").loc["Latin"]
    a, b = (t.per_emotion()["Latin"].to_numpy() for t in (base, tuned))
    expected = stats.ttest_rel(b, a).confidence_interval()
    assert row["difference"] == pytest.approx((b - a).mean())
    assert (row["low"], row["high"]) == pytest.approx((expected.low, expected.high))
    assert row["n"] == len(SIX)
