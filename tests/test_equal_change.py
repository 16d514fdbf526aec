"""The dose at which a push moves as far as another one did: planted dependences of the change on the dose are inverted."""

import math

import pytest

from lens_affect.equal_change import ChangeSearch


def run(search, achieved, rounds=20):
    factor, tried = 1.0, []
    while factor is not None and len(tried) < rounds:
        tried.append(factor)
        search.saw(factor, achieved(factor))
        factor = search.next()
    return tried


@pytest.mark.parametrize(
    "achieved",
    [
        lambda f: 0.3 * f,
        lambda f: 0.3 * f**2,
        lambda f: 0.3 * math.sqrt(f),
        lambda f: 0.05 + 0.9 * f**3,
        lambda f: 0.1 if f < 0.55 else 0.2 * f / 0.6,
    ],
    ids=["proportional", "square", "root", "cubic with an offset", "a jump"],
)
def test_a_planted_dose_is_found_to_five_percent(achieved):
    search = ChangeSearch(target=0.2)
    tried = run(search, achieved)
    assert len(tried) <= 9
    assert achieved(search.factor) == search.change == pytest.approx(0.2, rel=0.05)


def test_a_proportional_dose_takes_one_step_and_a_right_one_none():
    assert run(ChangeSearch(target=0.2), lambda f: 0.25 * f) == pytest.approx([1, 0.8])
    assert run(ChangeSearch(target=0.2), lambda f: 0.209 * f) == [1]


def test_the_best_is_kept_where_the_target_is_never_met():
    search = ChangeSearch(target=0.2)
    tried = run(search, lambda f: 0.1 if f < 0.5 else 0.23)  # jumps over the target
    assert len(tried) < 20
    assert search.change == 0.23  # 15 % away rather than 50 %
    limited = ChangeSearch(target=5.0, largest=3.0)
    assert run(limited, lambda f: 0.2 * f) == [1, 3]
    assert limited.factor == 3.0


@pytest.mark.parametrize(("target", "change"), [(math.nan, 0.2), (0.0, 0.2), (0.2, math.nan), (0.2, 0.0)])
def test_nothing_is_searched_where_there_is_no_text_or_nothing_to_compare_with(target, change):
    search = ChangeSearch(target=target)
    search.saw(1.0, change)
    assert search.next() is None
    assert search.factor == 1.0
