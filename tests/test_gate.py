"""The verdict on the gate follows its rule: planted maps in, the verdict that the rule implies out."""

from dataclasses import replace

import pytest
import torch

from lens_affect.gate import judge_gate
from lens_affect.results import Provenance
from tests.test_patching import synthetic

STRONG = [[0.0, 0.5, 0.0], [0.0, 0.1, 0.0], [0.0, 0.1, 0.0]]  # gate, up, attn_out; change is 0.1, 0.2, 0.3
EQUAL = [[0.1, 0.3, 0.1], [0.1, 0.3, 0.1], [0.1, 0.3, 0.1]]
ATTENTION = [[0.0, 0.3, 0.0], [0.0, 0.0, 0.0], [0.0, 0.6, 0.0]]


def one(effects, model, name="affect", seed=0):
    return replace(synthetic(effects, seed=seed), provenance=Provenance(model=model), name=name)


def both(effects, name="affect"):
    return [one(effects, "A", name, 1), one(effects, "B", name, 2)]


def equal_change(maps):
    return [replace(m, change=torch.full_like(m.change, 0.1)) for m in maps]


def test_it_holds_only_for_a_gate_that_beats_both_in_both_models_for_affect_alone():
    found = judge_gate(both(STRONG), both(EQUAL, "number"))
    # the gate of EQUAL moves as much with a smaller change, so per change it beats the others; raw it does not
    assert found.verdict == "holds"
    assert found.special == {"A, affect": True, "B, affect": True, "A, number": False, "B, number": False}
    assert len(found.to_frame()) == 4 * 4
    row = found.table.query("model == 'A' and pairs == 'affect' and rival == 'up' and not per_change").iloc[0]
    assert row["layer"] == 1
    assert row["layers_above"] == (1,)
    assert row["low"] > 0
    assert "holds (in every model, and for affective pairs only)" in str(found)


@pytest.mark.parametrize(
    ("affective", "others", "verdict", "reason"),
    [
        (both(ATTENTION), both(EQUAL, "number"), "does not hold", "no such layer in A, affect; B, affect"),
        ([one(STRONG, "A"), one(EQUAL, "B")], both(EQUAL, "number"), "does not hold", "no such layer in B, affect"),
        (
            both(STRONG),
            both(STRONG, "number"),
            "does not hold",
            "non-affective pairs show the same: A, number; B, number",
        ),
        ([one(STRONG, "A")], [one(EQUAL, "A", "number")], "cannot be decided", "maps of 1 models, 2 are needed"),
        (both(STRONG), [one(EQUAL, "A", "number")], "cannot be decided", "no non-affective pairs of B"),
    ],
)
def test_every_part_of_the_rule_can_fail(affective, others, verdict, reason):
    found = judge_gate(affective, others)
    assert found.verdict == verdict
    assert reason in found.reason


def test_an_advantage_that_equal_change_takes_away_is_none():
    wide = [replace(m, change=m.change * torch.tensor([30.0, 1, 1])[None, :, None, None]) for m in both(STRONG)]
    assert judge_gate(equal_change(both(STRONG)), both(EQUAL, "number")).verdict == "holds"
    assert judge_gate(wide, both(EQUAL, "number")).verdict == "does not hold"  # a change of 3 against 0.2 and 0.3


def test_a_model_that_does_not_show_the_behaviour_decides_nothing():
    silent = [replace(m, gap=torch.linspace(-1, 1, 48)) for m in both(STRONG)]
    found = judge_gate(silent, both(EQUAL, "number"))
    assert found.verdict == "cannot be decided"
    assert "the behaviour is not shown by A, affect; B, affect" in found.reason


def test_maps_without_the_rivals_are_refused():
    with pytest.raises(ValueError, match="received no map of affective pairs"):
        judge_gate([], [])
    with pytest.raises(ValueError, match=r"received a map of \['gate', 'up'\]"):
        judge_gate([synthetic(STRONG[:2])], [])
