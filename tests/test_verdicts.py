"""Verdicts: rows have every column, and are open until something decides."""

import math

import numpy as np
import pytest

from lens_affect.statistics import Interval
from lens_affect.verdicts import COLUMNS, FAILS, HOLDS, OPEN, ModelFacts, by_sign, claim_row


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(0.1, 0.3, HOLDS), (-0.3, -0.1, FAILS), (-0.1, 0.1, OPEN), (0.0, 0.2, OPEN)]
)
def test_a_verdict_by_sign_needs_the_whole_interval(low, high, verdict):
    assert by_sign(Interval(np.array(0.0), np.array(low), np.array(high))) == verdict


def test_a_row_has_every_column_and_is_open_by_itself():
    row = claim_row("P0", "a claim", "a number", "a rule", n=3)
    assert set(row) == set(COLUMNS)
    assert row["verdict"] == OPEN
    assert row["n"] == 3
    assert math.isnan(row["sound_statistic"])


def test_facts_of_a_model_take_no_unknown_key():
    assert ModelFacts().tuning == "unknown"
    with pytest.raises(ValueError, match="size"):
        ModelFacts(size="1B")
