"""Repetition: known shares of hand-made texts, loops of known length, and ordinary prose below its limit."""

import doctest
import math

import numpy as np
import pytest

from lens_affect import repetition
from lens_affect.repetition import (
    FEWEST_TOKENS,
    compression_ratio,
    distinct_share,
    longest_loop,
    repetition_limits,
    repetition_share,
)
from tests.tiny import make_tokenizer


def test_the_examples_in_the_docstrings_hold():
    found = doctest.testmod(repetition)
    assert found.attempted >= 2
    assert found.failed == 0


def test_shares_by_hand():
    assert repetition_share(list(range(20))) == 0
    assert repetition_share([5] * 20) == pytest.approx(17 / 18)
    assert repetition_share([1, 2, 3, 4] * 5) == pytest.approx(1 - 4 / 18)
    assert repetition_share([1, 2, 3, 4, 1, 2, 3, 5, 6, 7, 8, 9]) == pytest.approx(1 / 10)


def test_short_texts_have_no_value():
    assert math.isnan(repetition_share([1] * (FEWEST_TOKENS - 1)))
    assert math.isnan(longest_loop([1] * (FEWEST_TOKENS - 1)))
    assert math.isnan(compression_ratio(""))
    assert math.isnan(distinct_share([], n=1))


def test_chinese_repeats_by_the_character_and_not_as_one_word():
    assert repetition_share("平静" * 12) == pytest.approx(1 - 2 / 22)
    assert repetition_share("他把钥匙放在桌上然后慢慢走到窗边看着外面的雨") == 0


@pytest.mark.parametrize("period", [1, 2, 5])
@pytest.mark.parametrize("rounds", [3, 6])
def test_a_planted_loop_is_found_with_its_length(period, rounds):
    before = list(range(100, 130))
    loop = list(range(period)) * rounds
    found = longest_loop(before + loop)
    assert found == pytest.approx((rounds - 1) * period / (30 + period * rounds))
    assert longest_loop(before) == 0


def test_a_word_that_comes_back_now_and_then_is_no_loop():
    assert longest_loop([1, 50, 2, 51, 3, 50, 4, 52, 5, 53, 6, 54, 7, 55]) == 0


def test_distinct_n_counts_different_ones():
    assert distinct_share([1, 2, 1, 2], n=1) == 0.5
    assert distinct_share([1, 2, 1, 2], n=2) == pytest.approx(2 / 3)
    assert distinct_share("a b a b", n=1) == 0.5


def test_loops_compress_and_prose_does_not(passages):
    assert compression_ratio("and again " * 30) < 0.1
    assert np.mean([compression_ratio(t) for t in passages.texts]) > 0.5


def test_ordinary_prose_stays_below_its_own_limit_in_about_99_percent(passages):
    tokenizer = make_tokenizer()
    encoded = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in passages.texts]
    limits = repetition_limits(encoded[::2], 40)
    assert np.isnan(limits[:FEWEST_TOKENS]).all()
    assert np.isfinite(limits[FEWEST_TOKENS:]).all()
    shares = np.array([repetition_share(t[:40]) for t in encoded[1::2] if len(t) >= 40])
    assert (shares <= limits[40]).mean() > 0.95
    with pytest.raises(ValueError, match="received 3 reference tokens for stretches of 40"):
        repetition_limits([[1, 2, 3]], 40)
