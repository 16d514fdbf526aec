"""Meaning of raised tokens: planted words are found in their language only, nothing planted gives uniform p, ambiguous tokens are left out."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from lens_affect.adapter import token_ids, unembedding
from lens_affect.crosslingual import script_entanglement
from lens_affect.meaning import MeaningTable, foreign_meaning, load_emotion_words, verdict_of
from lens_affect.models import load_model
from lens_affect.scripts import PARTIAL
from lens_affect.stimuli import EMOTIONS
from lens_affect.vectors import logit_lens
from tests.test_crosslingual import random_directions, vectors_of
from tests.tiny import make_multilingual, make_tokenizer

ALL = tuple(EMOTIONS)
LANGUAGES = ("English", "Chinese", "Spanish", "French", "German", "Japanese", "Russian", "Arabic", "Hindi")


def words_of(language, emotion):
    words = load_emotion_words()
    return words[(words["language"] == language) & (words["emotion"] == emotion)]["word"].tolist()


def planted_meaning(model, language, emotions=ALL, seed=0):
    """Vectors that are the sum of the unembedding columns of the emotion's words in one language, in noise."""
    matrix, tokenizer = unembedding(model).T, model.tokenizer
    noise = random_directions(model, seed, len(emotions))
    rows = [[tokenizer.convert_tokens_to_ids(w) for w in words_of(language, e)] for e in emotions]
    return vectors_of(model, torch.stack([matrix[r].sum(0) for r in rows]) + 0.1 * noise, emotions)


# The words


def test_the_list_has_three_to_six_words_per_emotion_in_nine_languages_and_thirty_everyday_ones():
    words = load_emotion_words()
    assert tuple(dict.fromkeys(words["language"])) == LANGUAGES
    for language, table in words.groupby("language"):
        counts = Counter(table["emotion"])
        assert counts.pop("control") == 30
        assert set(counts) == set(EMOTIONS)
        assert set(counts.values()) <= {3, 4, 5, 6}, language
        assert table["word"].is_unique, language
        assert not table["word"].str.strip().eq("").any()


def test_control_words_are_about_as_long_as_emotion_words():
    words = load_emotion_words().assign(length=lambda t: t["word"].str.len())
    for language, table in words.groupby("language"):
        own, control = (table[table["emotion"].eq("control") == c]["length"].mean() for c in (False, True))
        assert 0.6 < control / own < 1.4, language


# The test


def test_planted_meaning_is_found_in_its_language(multilingual):
    found = foreign_meaning(multilingual, planted_meaning(multilingual, "Chinese"), 0, n_permutations=400)
    table = found.to_frame().set_index("language")
    assert table.loc["Chinese", "verdict"] == "holds"
    assert table.loc["Chinese", "own"] > 90
    assert table.loc["Chinese", "effect"] > 30
    assert table.loc["Chinese", "control_effect"] > 30
    assert table.loc["Chinese", "p_family"] == pytest.approx(1 / 401)
    others = table.drop(index="Chinese")
    assert (others["effect"].abs() < 15).all()
    assert (others["verdict"] != "holds").sum() >= 7
    assert table.index[-1] == "English"
    assert "Chinese +" in str(found)
    assert "1 of" in str(found)
    assert len(str(found).splitlines()) <= 5


@pytest.mark.parametrize(
    ("p", "high", "control_high", "verdict"),
    [
        (0.01, 30.0, 30.0, "holds"),
        (0.01, 8.0, 30.0, "holds"),  # small, but shown
        (0.2, 12.0, 30.0, "cannot be decided"),  # not shown, and not excluded
        (0.2, 8.0, 30.0, "does not hold"),
        (0.2, 30.0, 9.9, "does not hold"),
        (np.nan, np.nan, np.nan, "cannot be decided"),
    ],
)
def test_what_is_not_significant_fails_only_where_an_effect_is_excluded(p, high, control_high, verdict):
    row = {"p_family": p, "control_p_family": 0.01, "high": high, "control_high": control_high}
    assert verdict_of(row) == verdict


def test_the_numbers_are_those_of_a_count_by_hand(multilingual):
    vectors = planted_meaning(multilingual, "Spanish", seed=4)
    found = foreign_meaning(multilingual, vectors, 0, languages=["Chinese"], n_permutations=20)
    logits = logit_lens(multilingual, vectors.directions[:, 0]).numpy()
    tokenizer = multilingual.tokenizer

    def percentile(emotion, word):
        token = tokenizer.convert_tokens_to_ids(word)
        return stats.percentileofscore(logits[ALL.index(emotion)], logits[ALL.index(emotion), token], kind="mean")

    own = found.per_emotion.query("language == 'Chinese' and emotion == 'calm'").iloc[0]
    words = words_of("Chinese", "calm")
    assert own["own"] == pytest.approx(np.mean([percentile("calm", w) for w in words]))
    assert own["others"] == pytest.approx(np.mean([percentile(e, w) for e in ALL if e != "calm" for w in words]))
    assert own["control"] == pytest.approx(np.mean([percentile("calm", w) for w in words_of("Chinese", "control")]))
    row = found.to_frame().set_index("language").loc["Chinese"]
    per_emotion = found.per_emotion.query("language == 'Chinese'")
    assert row["effect"] == pytest.approx((per_emotion["own"] - per_emotion["others"]).mean())
    assert row["control_effect"] == pytest.approx((per_emotion["own"] - per_emotion["control"]).mean())
    expected = stats.ttest_1samp(per_emotion["own"] - per_emotion["others"], 0).confidence_interval()
    assert (row["low"], row["high"]) == pytest.approx((expected.low, expected.high))
    top = [percentile(e, w) >= 99 for e in ALL for w in words_of("Chinese", e)]
    assert row["own_top"] == pytest.approx(np.mean(top))
    top = [percentile(v, w) >= 99 for e in ALL for w in words_of("Chinese", e) for v in ALL if v != e]
    assert row["others_top"] == pytest.approx(np.mean(top))
    assert (row["n_emotions"], row["n_controls"], row["whole"]) == (20, 30, 1.0)
    one = found.words.query("word == '平静'").iloc[0]
    assert one["percentile"] == pytest.approx(percentile("calm", "平静"))


def test_without_meaning_p_is_uniform(multilingual):
    tables = [
        foreign_meaning(
            multilingual,
            vectors_of(multilingual, random_directions(multilingual, 500 + i, len(ALL)), ALL),
            0,
            languages=["Chinese", "Russian"],
            n_permutations=99,
            seed=i,
        ).to_frame()
        for i in range(30)
    ]
    for column in ("p", "control_p"):
        p = np.array([t[column].iloc[0] for t in tables])  # Chinese
        assert stats.kstest(p, "uniform").pvalue > 0.01
    families = np.array([t["p_family"].iloc[:2].min() for t in tables])
    assert (families <= 0.1).mean() <= 0.25


def test_tokens_that_words_share_or_that_begin_english_words_are_left_out_and_counted():
    rows = [("English", "happy", "happy"), ("English", "sad", "sadness"), ("English", "control", "table")]
    rows += [("Spanish", "happy", "feliz"), ("Spanish", "happy", "happ"), ("Spanish", "sad", "tristeza")]
    rows += [("Spanish", "sad", "quince"), ("Spanish", "control", "quincena"), ("Spanish", "control", "mesa")]
    rows += [("Spanish", "control", "ñu")]
    words = pd.DataFrame(rows, columns=["language", "emotion", "word"])
    # the tokenizer has "quince", with which "quincena" begins, but not "ñu", which falls into bytes
    hf_model, tokenizer = make_multilingual(
        ["happy", "happ", "sadness", "table", "feliz", "tristeza", "quince", "na", "mesa"]
    )
    model = load_model(hf_model, tokenizer=tokenizer)
    vectors = vectors_of(model, random_directions(model, 0, 2), ("happy", "sad"))
    found = foreign_meaning(model, vectors, 0, words=words, n_permutations=5)
    loss = dict(zip(found.words["word"], found.words["loss"], strict=True))
    assert loss == {"happy": "", "sadness": "", "table": "", "feliz": "", "tristeza": "", "mesa": "", "happ": "english",
                    "quince": "shared", "quincena": "shared", "ñu": "partial"}  # fmt: skip
    row = found.to_frame().set_index("language").loc["Spanish"]
    assert (row["lost_english"], row["lost_shared"], row["lost_partial"]) == (1, 2, 1)
    assert (row["n_words"], row["n_controls"], row["verdict"]) == (2, 1, "cannot be decided")
    assert np.isnan(row["effect"])
    assert np.isnan(row["p"])
    assert "cannot be decided (too few words with a token of their own): Spanish, English" in str(found)


def test_a_tokenizer_of_bytes_decides_nothing_and_says_so(tiny_model):
    model = tiny_model("llama")
    vectors = vectors_of(model, random_directions(model, 0, len(ALL)), ALL)
    found = foreign_meaning(model, vectors, 0, n_permutations=10).to_frame().set_index("language")
    assert len(make_tokenizer()) == 480
    for language in ("Chinese", "Japanese", "Arabic", "Hindi", "Russian"):
        assert found.loc[language, "verdict"] == "cannot be decided"
        assert found.loc[language, "lost_partial"] + found.loc[language, "lost_shared"] > 120


def test_the_result_is_saved_and_bad_input_is_named(multilingual, tmp_path):
    vectors = planted_meaning(multilingual, "Chinese")
    found = foreign_meaning(multilingual, vectors, languages=["Hindi", "English"], n_permutations=10)
    assert found.layer == 1
    assert found.to_frame()["language"].tolist() == ["Hindi", "English"]
    again = MeaningTable.load(found.save(tmp_path / "meaning"))
    assert again.to_frame().equals(found.to_frame())
    assert again.words.equals(found.words)
    assert "<table" in found._repr_html_()
    with pytest.raises(
        ValueError, match=r"received the languages \['Latin'\]; there are words of \['English', 'Chinese'"
    ):
        foreign_meaning(multilingual, vectors, languages=["Latin"])
    with pytest.raises(ValueError, match="received n_permutations=1; allowed is 2 or more"):
        foreign_meaning(multilingual, vectors, n_permutations=1)


@pytest.mark.weights
def test_a_real_tokenizer_has_its_scripts_and_real_words_are_found_or_counted_as_lost(real_model):
    """Directions made of the unembedding of English words: no text is read, so this takes no longer than the loading."""
    model = real_model("smollm2-135m-instruct")
    matrix = unembedding(model).T
    ids = [[t for w in words_of("English", e) for t in token_ids(model.tokenizer, " " + w)[:1]] for e in ALL]
    vectors = vectors_of(model, torch.stack([(matrix[i] - matrix.mean(0)).sum(0) for i in ids]), ALL)
    vectors = replace(vectors, n_layers=30)
    found = script_entanglement(model, vectors, 0, n_random=5)
    assert found.vocabulary[found.scripts.index("Latin")] == pytest.approx(0.96, abs=0.01)
    assert found.vocabulary[found.scripts.index(PARTIAL)] > 0.005
    table = foreign_meaning(model, vectors, 0, n_permutations=100).to_frame().set_index("language")
    assert table.loc["English", "own_top"] > 0.5
    assert table.loc["English", "verdict"] == "holds"
    assert table.loc["Chinese", "verdict"] == "cannot be decided"
    assert table.loc["Chinese", "lost_partial"] == 118
