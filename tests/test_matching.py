"""Matched pairs: equal token length, the first difference, and the tokens that stand for each side's words."""

import math

import pytest
import torch

from lens_affect.adapter import token_ids
from lens_affect.contrasts import ContrastPairs
from lens_affect.matching import match_pairs

SAME = ("The cat sat on the mat", "The cat sat on the hat")
LONGER = ("She went home", "She went home again and again")


def pairs_of(texts, answers=(("x",), ("y",)), name="mine"):
    return ContrastPairs.from_texts(texts, answers, name=name)


def test_tokens_are_those_of_the_texts_and_the_first_difference_is_found(tiny_model):
    model = tiny_model("llama")
    matched = match_pairs(model, pairs_of([SAME, ("A b", "A c")]))
    for row, (clean, corrupted) in enumerate([SAME, ("A b", "A c")]):
        ids = [[model.tokenizer.bos_token_id, *token_ids(model.tokenizer, text)] for text in (clean, corrupted)]
        n = len(ids[0])
        assert matched.clean[row, :n].tolist() == ids[0]
        assert matched.corrupted[row, :n].tolist() == ids[1]
        assert matched.mask[row].tolist() == [1] * n + [0] * (matched.mask.shape[1] - n)
        assert matched.last[row] == n - 1
        first = int(matched.first[row])
        assert ids[0][:first] == ids[1][:first]
        assert ids[0][first] != ids[1][first]
    assert matched.bos == "prepended"


def test_pairs_of_unequal_length_are_refused_or_dropped_with_a_count(tiny_model):
    model = tiny_model("llama")
    with pytest.raises(
        ValueError, match=r"received pair 1 with unequal token length \('She went home': \d+ tokens.*drop=True"
    ):
        match_pairs(model, pairs_of([SAME, LONGER]))
    for found in (
        match_pairs(model, pairs_of([SAME, LONGER]), drop=True),
        match_pairs(model, pairs_of([SAME, LONGER], name="affect")),
    ):
        assert found.dropped == {"unequal token length": 1}
        assert found.pairs.clean == (SAME[0],)
    with pytest.raises(ValueError, match=r"none can be used \(\{'unequal token length': 1\}\)"):
        match_pairs(model, pairs_of([LONGER]), drop=True)


def spell(tokenizer, word):
    return [token_ids(tokenizer, lead + word) for lead in (" ", "")]


def test_a_word_stands_for_itself_with_and_without_leading_space(tiny_model):
    model = tiny_model("llama")
    matched = match_pairs(model, pairs_of([SAME], (("x",), ("y",))))
    assert set(matched.clean_ids[0]) == {ids[0] for ids in spell(model.tokenizer, "x")}
    assert set(matched.corrupted_ids[0]) == {ids[0] for ids in spell(model.tokenizer, "y")}
    assert matched.words_left_out == 0


def test_a_split_word_whose_first_token_the_other_side_shares_is_left_out_and_counted(tiny_model):
    model = tiny_model("llama")
    whole, split = "in", "inqzj"
    spelled = [spell(model.tokenizer, word) for word in (whole, split)]
    assert [ids[0] for ids in spelled[0]] == [ids[0] for ids in spelled[1]]
    assert [len(ids) for ids in spelled[0]] == [1, 1]
    matched = match_pairs(model, pairs_of([SAME], ((whole,), (split, "y"))))
    assert matched.words_left_out == 1
    assert set(matched.clean_ids[0]) == {
        ids[0] for ids in spell(model.tokenizer, whole)
    }  # a whole word keeps its token
    assert set(matched.corrupted_ids[0]) == {ids[0] for ids in spell(model.tokenizer, "y")}
    with pytest.raises(ValueError, match=r"corrupted_words of pair 0 without a token of their own.*start differently"):
        match_pairs(model, pairs_of([SAME], ((whole,), (split,))))


def test_log_odds_are_those_of_the_softmax(tiny_model):
    matched = match_pairs(tiny_model("llama"), pairs_of([SAME, ("A b", "A c")], (("x", "z"), ("y",))))
    logits = torch.randn(2, 480, generator=torch.Generator().manual_seed(0))
    probability = logits.softmax(-1)
    for row in range(2):
        clean, corrupted = (
            sum(float(probability[row, t]) for t in set(ids[row])) for ids in (matched.clean_ids, matched.corrupted_ids)
        )
        assert matched.log_odds(logits)[row] == pytest.approx(math.log(clean / corrupted), abs=1e-5)
    torch.testing.assert_close(matched.log_odds(logits[[1, 1]], torch.tensor([1, 1])), matched.log_odds(logits)[[1, 1]])


def test_texts_beyond_the_context_window_are_refused(tiny_model):
    long = "a b " * 400
    with pytest.raises(ValueError, match="a text beyond the context window"):
        match_pairs(tiny_model("llama"), pairs_of([(long + "1", long + "2")]))
