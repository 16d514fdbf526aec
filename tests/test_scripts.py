"""Scripts: letters are counted, half characters are no letters, and every token has exactly one class."""

import sys
import types
import unicodedata

import numpy as np
import pytest

from lens_affect.scripts import (
    COMMON,
    OTHER,
    PARTIAL,
    SCRIPTS,
    SPECIAL,
    count_words,
    is_unspaced,
    script_of,
    script_of_character,
    script_shares,
    text_languages,
    token_scripts,
)
from lens_affect.stimuli import load_stimuli
from tests.tiny import make_multilingual, make_tokenizer


@pytest.mark.parametrize(
    ("text", "script"),
    [
        (" calm", "Latin"),
        ("é", "Latin"),
        ("e\u0301", "Latin"),
        ("平静", "Han"),
        ("うれしい", "Hiragana"),
        ("カナ", "Katakana"),
        ("ー", COMMON),
        ("칼", "Hangul"),
        ("гнев", "Cyrillic"),
        ("خوف", "Arabic"),
        ("दुख", "Devanagari"),
        ("\u0941", "Devanagari"),
        ("ᚋ", OTHER),
        ("12", COMMON),
        ("¡!…", COMMON),
        (" \n\t", COMMON),
        ("😀", COMMON),
        ("", COMMON),
        ("a平静", "Han"),
        ("a平", "Latin"),
        ("平a", "Han"),
    ],
)
def test_a_text_has_the_script_of_most_of_its_letters(text, script):
    assert script_of(text) == script


def test_letters_agree_with_the_names_that_unicode_gives_them():
    names = {"Han": "CJK", "Devanagari": "DEVANAGARI", "Cyrillic": "CYRILLIC", "Arabic": "ARABIC", "Latin": "LATIN",
             "Greek": "GREEK", "Hiragana": "HIRAGANA", "Hangul": "HANGUL", "Hebrew": "HEBREW", "Thai": "THAI"}  # fmt: skip
    assert set(names) <= set(SCRIPTS)
    for code in (*range(0x20, 0x0E60), *range(0x3041, 0x3097), *range(0x4E00, 0x5000), *range(0xAC00, 0xAD00)):
        found = script_of_character(chr(code))
        if found in names and unicodedata.category(chr(code))[0] == "L" and chr(code) not in "ªºꟸ":
            assert unicodedata.name(chr(code)).split()[0] == names[found] or "MODIFIER" in unicodedata.name(chr(code))


def test_half_a_character_is_partial_in_a_byte_level_tokenizer():
    tokenizer = make_tokenizer()
    found = token_scripts(tokenizer, len(tokenizer) + 5)
    of_piece = dict(zip(tokenizer.convert_ids_to_tokens(range(len(tokenizer))), found.scripts, strict=False))
    assert of_piece["ä"] == PARTIAL  # byte 0xE4, as the byte-level alphabet spells it
    assert of_piece["a"] == "Latin"
    assert of_piece["7"] == of_piece["Ġ"] == COMMON
    assert of_piece["<bos>"] == SPECIAL
    assert found.scripts[-5:] == (SPECIAL,) * 5  # rows of the unembedding without a token
    assert len(found.texts) == len(found.scripts) == len(tokenizer) + 5
    assert token_scripts(tokenizer, len(tokenizer) + 5) is found  # remembered


def test_half_a_character_is_partial_in_a_sentencepiece_tokenizer_too():
    _, tokenizer = make_multilingual(["平静", "calm", "�"])
    found = token_scripts(tokenizer, len(tokenizer))
    of_piece = dict(zip(tokenizer.convert_ids_to_tokens(range(len(tokenizer))), found.scripts, strict=True))
    assert of_piece["<0xE4>"] == PARTIAL
    assert of_piece["<0x41>"] == "Latin"
    assert of_piece["<0x0A>"] == COMMON
    assert of_piece["▁平静"] == "Han"
    assert of_piece["▁calm"] == "Latin"
    assert of_piece["�"] == COMMON  # the character itself, not a piece of another
    assert of_piece["<eos>"] == SPECIAL


def test_shares_of_texts_sum_to_one_and_a_text_without_letters_has_none():
    shares = script_shares(["calm 安宁", "42!", "привет мир hello", ""])
    assert shares["n_letters"].tolist() == [6, 0, 14, 0]
    assert shares["Han"].tolist()[0] == pytest.approx(1 / 3)
    assert shares["Cyrillic"].tolist()[2] == pytest.approx(9 / 14)
    rows = shares.drop(columns="n_letters").sum(axis=1, min_count=1).to_numpy()
    np.testing.assert_allclose(rows, [1, np.nan, 1, np.nan])
    assert script_shares([]).empty
    with pytest.raises(TypeError, match="allowed is a list of texts"):
        script_shares("calm")


@pytest.mark.parametrize(("name", "script"), [("passages", "Latin"), ("passages_es", "Latin"), ("passages_zh", "Han")])
def test_our_passages_are_in_the_script_of_their_language(name, script):
    shares = script_shares(load_stimuli(name).texts)
    assert shares[script].min() > 0.95


def test_words_are_counted_by_spaces_or_by_characters():
    assert count_words("one two  three") == 3
    assert count_words("雨水顺着窗户，流。") == 7
    assert is_unspaced("雨水")
    assert not is_unspaced("привет")


def test_languages_need_lingua_and_say_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "lingua", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lens-affect\[languages\]'"):
        text_languages(["hola"])


def test_languages_are_chosen_among_the_candidates(monkeypatch):
    """A stand-in with lingua's interface: the real one was tried by hand, and is an optional package."""
    asked = []

    class Language(types.SimpleNamespace):
        @staticmethod
        def all():
            return [Language(name=n) for n in ("SPANISH", "ENGLISH", "CHINESE")]

    class Builder:
        @classmethod
        def from_languages(cls, *languages):
            asked.extend(language.name for language in languages)
            return cls()

        from_all_languages = from_languages

        def build(self):
            return self

        def detect_language_of(self, text):
            return Language(name="SPANISH") if text else None

        def compute_language_confidence(self, text, language):
            return 0.75

    monkeypatch.setitem(
        sys.modules, "lingua", types.SimpleNamespace(Language=Language, LanguageDetectorBuilder=Builder)
    )
    found = text_languages(["hola", ""], candidates=["Spanish", "English"])
    assert found["language"].tolist()[0] == "spanish"
    assert found["confidence"].tolist()[0] == 0.75
    assert found.isna().all(axis=1).tolist() == [False, True]
    assert asked == ["SPANISH", "ENGLISH"]
    assert len(text_languages(["hola"])) == 1
    with pytest.raises(
        ValueError, match=r"received candidates \['Klingon', 'Spanish'\]; allowed are two or more of chin"
    ):
        text_languages(["hola"], candidates=["Klingon", "Spanish"])
    with pytest.raises(ValueError, match="allowed are two or more"):
        text_languages(["hola"], candidates=["Spanish"])
