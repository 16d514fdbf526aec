"""Contrast pairs: texts, words and groups stay together; what cannot be a contrast is refused."""

import re
from collections import Counter
from dataclasses import replace

import pandas as pd
import pytest

from lens_affect.contrasts import SETS, ContrastPairs, load_pairs
from lens_affect.stimuli import EMOTIONS, named_emotion

PAIRS = [("He won. He felt", "He lost. He felt"), ("She passed. She was", "She failed. She was")]


def test_texts_become_pairs_with_the_same_words():
    pairs = ContrastPairs.from_texts(PAIRS, (["glad", "proud"], "sad"), groups=["game", "school"])
    assert len(pairs) == 2
    assert pairs.clean == ("He won. He felt", "She passed. She was")
    assert pairs.corrupted[1] == "She failed. She was"
    assert pairs.clean_words == (("glad", "proud"),) * 2
    assert pairs.corrupted_words == (("sad",),) * 2
    assert (pairs.clean_emotions[0], pairs.corrupted_emotions[0]) == ("glad", "sad")
    assert pairs.groups == ("game", "school")
    assert len(set(ContrastPairs.from_texts(PAIRS, ("glad", "sad")).groups)) == 2
    assert "2 pairs, 2 groups" in str(pairs)


def test_rows_are_selected_in_order_and_change_the_hash():
    pairs = ContrastPairs.from_texts(PAIRS, ("glad", "sad"))
    turned = pairs.select([1, 0])
    assert turned.clean == pairs.clean[::-1]
    assert turned.hash != pairs.hash
    assert turned.select([1, 0]).hash == pairs.hash
    assert replace(pairs, clean_words=(("happy",),) * 2).hash != pairs.hash


@pytest.mark.parametrize(
    ("pairs", "answers", "message"),
    [
        ([], ("a", "b"), "received no pairs"),
        ([("x", " ")], ("a", "b"), "an empty text in pair 0"),
        ([("x", "x")], ("a", "b"), "the same text twice in pair 0"),
        ([("x", "y")], ([], "b"), "a side without words in pair 0"),
        ([("x", "y")], (["a", "b"], ["b", "c"]), r"\['b'\] on both sides of pair 0"),
    ],
)
def test_what_is_no_contrast_is_refused(pairs, answers, message):
    with pytest.raises(ValueError, match=message):
        ContrastPairs.from_texts(pairs, answers)
    with pytest.raises(ValueError, match="unequal lengths"):
        ContrastPairs.from_texts(PAIRS, ("a", "b"), groups=["one"])


def test_a_users_file_needs_four_columns(tmp_path):
    frame = pd.DataFrame(
        {
            "clean": ["He won. He felt"],
            "corrupted": ["He lost. He felt"],
            "clean_words": ["glad| proud"],
            "corrupted_words": ["sad"],
        }
    )
    frame.to_csv(tmp_path / "mine.csv", index=False)
    pairs = load_pairs(tmp_path / "mine.csv")
    assert (pairs.name, pairs.clean_words, pairs.groups) == ("mine", (("glad", "proud"),), ("pair 0",))
    frame.assign(group="game").to_parquet(tmp_path / "mine.parquet")
    assert load_pairs(tmp_path / "mine.parquet").groups == ("game",)
    frame.drop(columns="clean_words").to_csv(tmp_path / "less.csv", index=False)
    with pytest.raises(ValueError, match=r"missing \['clean_words'\]"):
        load_pairs(tmp_path / "less.csv")
    frame.assign(clean_words="").to_csv(tmp_path / "empty.csv", index=False)
    with pytest.raises(ValueError, match="a side without words in pair 0"):
        load_pairs(tmp_path / "empty.csv")
    with pytest.raises(ValueError, match=re.escape(f"allowed are {list(SETS)} or a file")):
        load_pairs("love")


@pytest.mark.parametrize(
    ("name", "n", "words", "swaps"), [("affect", 168, 6, 2), ("number", 84, 4, 1), ("tense", 84, 6, 24)]
)
def test_our_pairs_keep_the_rules_of_their_data_card(name, n, words, swaps, passages):
    pairs = load_pairs(name)
    assert len(pairs) == len(set(pairs.clean) | set(pairs.corrupted)) / 2 == n
    assert set(pairs.groups) == set(passages.groups)
    assert set(Counter(pairs.groups).values()) == {n // 12}
    assert {len(w) for w in (*pairs.clean_words, *pairs.corrupted_words)} <= set(range(4, words + 1))
    used: Counter[tuple[str, str]] = Counter()
    for clean, corrupted, mine, theirs in zip(
        pairs.clean, pairs.corrupted, pairs.clean_words, pairs.corrupted_words, strict=True
    ):
        a, b = (re.findall(r"[\w']+", text.lower()) for text in (clean, corrupted))
        assert a[-2:] == b[-2:]
        changed = [(x, y) for x, y in zip(a, b, strict=False) if x != y]
        used[tuple(sorted(changed[0]))] += 1
        assert not {*a, *b} & {*mine, *theirs}
        assert not [e for e in EMOTIONS for text in (clean, corrupted) if named_emotion(text, e)]
    assert max(used.values()) == swaps


def test_each_contrast_of_our_affect_pairs_has_each_side_clean_once_in_every_topic():
    pairs = load_pairs("affect")
    cells = Counter(zip(pairs.clean_emotions, pairs.corrupted_emotions, pairs.groups, strict=True))
    assert set(cells.values()) == {1}
    assert all((b, a, g) in cells for a, b, g in cells)
    assert len(cells) == 7 * 2 * 12
    assert {e for pair in cells for e in pair[:2]} <= set(EMOTIONS)


@pytest.mark.parametrize(("kind", "n"), [("affect", 48), ("affect", 30), ("number", 24), ("tense", 24)])
def test_a_sample_takes_as_many_of_each_topic_and_of_each_side(kind, n):
    sample = load_pairs(kind).sample(n)
    assert len(sample) == n == len(set(sample.clean))
    topics, sides = Counter(sample.groups), Counter(zip(sample.clean_emotions, sample.corrupted_emotions, strict=True))
    assert max(topics.values()) - min(topics.values()) <= 1
    assert len(topics) == 12
    exchanged = [sides[a, b] - sides[b, a] for a, b in sides]
    assert max(map(abs, exchanged)) <= 2
    assert sample.hash == load_pairs(kind).sample(n).hash
    assert sample.hash != load_pairs(kind).sample(n, seed=1).hash


def test_a_sample_of_more_than_there_are_is_refused():
    with pytest.raises(ValueError, match="received n=85; allowed are 1 to 84 pairs"):
        load_pairs("number").sample(85)
