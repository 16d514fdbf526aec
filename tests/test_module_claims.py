"""G1 to G4 by their rules: a special gate holds, an ordinary one does not, a vague study decides nothing."""

import dataclasses
import math

import pytest

from lens_affect.module_claims import MARGIN, judge_efficiency, module_rows, special
from lens_affect.module_table import compare_arms
from lens_affect.verdicts import COLUMNS, FAILS, HOLDS, OPEN
from tests.planted_modules import study, table
from tests.planted_runs import campaign
from tests.test_part_scores import planted as planted_parts


def verdicts(found):
    return {(row["id"], row["source"].split(",")[0]): row["verdict"] for row in module_rows(found)}


def test_a_gate_that_is_special_in_every_way_for_affect_alone_holds_everywhere():
    rows = module_rows(study())
    assert [row["id"] for row in rows] == ["G1", "G2", "G3", "G3", "G4", "G4"]
    assert {row["verdict"] for row in rows} == {HOLDS}
    assert all(set(row) == set(COLUMNS) for row in rows)
    for row in rows:
        assert row["low"] < row["sound_statistic"] < row["high"]
        assert row["n"] > 0
        assert math.isfinite(row["null"])


def test_a_gate_like_its_siblings_fails_everywhere():
    found = study(gate=0.58, siblings=0.58, landing=1.0, share=0.8, others=0.8)
    assert set(verdicts(found).values()) == {FAILS}


def test_where_nothing_was_learned_nothing_about_modules_is_decided():
    """All arms are precisely equal there, which says nothing."""
    rows = module_rows(study(gate=0.2, siblings=0.2, whole=0.2, share=0.0, others=0.0))
    assert {row["verdict"] for row in rows if row["id"] == "G3"} == {OPEN}
    flat = planted_parts("equal_damage", dict.fromkeys(("gate", "up", "down", "attention"), 0.0), n=800)
    assert verdicts(study(equal_damage=flat))["G4", "equal damage"] == OPEN


def test_what_was_not_measured_leaves_a_claim_open():
    few = planted_parts("transfer", {"gate": 0.8, "up": 0.3}, n=800)
    found = module_rows(study(transfer=few))
    row = next(r for r in found if r["id"] == "G2")
    assert row["verdict"] == OPEN
    assert "down not measured" in row["note"]
    never = planted_parts("equal_damage", {"gate": 0.8, "up": 0.3, "down": 0.3, "attention": 0.3}, n=800)
    never.scores[1], never.scales[1] = math.nan, math.nan
    assert verdicts(study(equal_damage=never))["G4", "equal damage"] == OPEN


def test_an_arm_that_exploded_leaves_efficiency_open():
    rates = {"gate": (0.58, 100), "up": (0.45, 100), "down": (0.45, 100), "attention": (0.45, 180), "all": (0.6, 480)}
    runs = campaign(rates, n=4000, spread=0.002)
    runs["up"] = [dataclasses.replace(run, exploded=True) for run in runs["up"]]
    rows = module_rows(study(writing=compare_arms(runs, reference="all")))
    assert next(r for r in rows if r["source"].startswith("writing"))["verdict"] == OPEN


def test_two_seeds_decide_nothing_about_tuned_models():
    shares = {"gate": 0.8, "up": 0.3, "down": 0.3, "attention": 0.3}
    assert verdicts(study(transfer=planted_parts("transfer", shares, n=800, seeds=2)))["G2", "transferred"] == OPEN
    rates = {"gate": 0.58, "up": 0.45, "down": 0.45, "attention": 0.45, "all": 0.6}
    rows = module_rows(study(writing=table(rates, seeds=2)))
    assert next(r for r in rows if r["source"].startswith("writing"))["verdict"] == OPEN


SHARES = {"gate": 0.8, "up": 0.3, "down": 0.3, "attention": 0.3}
RATES = {"gate": 0.58, "up": 0.45, "down": 0.45, "attention": 0.45, "all": 0.6}
PARTS = {
    "control_transfer": ("G2", "transferred"),
    "control_revert": ("G4", "reverted"),
    "control_equal_damage": ("G4", "equal damage"),
}
"""Control of a part -> the claim that rests on it."""


def control_of(name, shares, **options):
    return planted_parts(name.removeprefix("control_"), shares, n=800, **options)


def test_without_a_control_nothing_holds():
    found = verdicts(study(control=None, **dict.fromkeys(PARTS)))
    assert {v for (claim, _), v in found.items() if claim != "G1"} == {OPEN}
    for name, key in {**PARTS, "control": ("G3", "equal rank")}.items():
        rows = module_rows(study(**{name: None}))
        assert [r["verdict"] for r in rows if (r["id"], r["source"].split(",")[0]) == key] == [OPEN]
        assert sum(r["verdict"] == HOLDS for r in rows) == len(rows) - (2 if name == "control" else 1)
        assert "not compared with a task without affect" in next(r["note"] for r in rows if r["verdict"] == OPEN)


def test_without_a_control_what_fails_fails_all_the_same():
    ordinary = {"gate": 0.58, "siblings": 0.58, "landing": 1.0, "share": 0.8, "others": 0.8}
    assert set(verdicts(study(control=None, **ordinary, **dict.fromkeys(PARTS))).values()) == {FAILS}


@pytest.mark.parametrize("name", PARTS)
def test_a_control_in_which_the_gate_may_be_special_leaves_a_part_open(name):
    as_special = control_of(name, SHARES)
    no_down = control_of(name, {arm: share for arm, share in SHARES.items() if arm != "down"})
    vague = planted_parts(name.removeprefix("control_"), dict.fromkeys(SHARES, 0.5), n=4, noise=0.3)
    for control in (as_special, no_down, vague):
        assert verdicts(study(**{name: control}))[PARTS[name]] == OPEN
    like_up = control_of(name, {"gate": 0.5, "up": 0.5})  # one sibling decides
    assert verdicts(study(**{name: like_up}))[PARTS[name]] == HOLDS
    rows = module_rows(study())
    row = next(r for r in rows if (r["id"], r["source"].split(",")[0]) == PARTS[name])
    assert "; in a task: up " in row["note"]


def test_a_control_in_which_the_gate_may_be_special_leaves_efficiency_open():
    for control in (table(RATES), table({arm: rate for arm, rate in RATES.items() if arm != "down"})):
        found = verdicts(study(control=control))
        assert found["G3", "equal rank"] == found["G3", "equal size"] == OPEN
    same = dict.fromkeys(("gate", "up", "attention"), 0.5)
    assert verdicts(study(control=table({**same, "all": 0.6})))["G3", "equal rank"] == HOLDS


def test_efficiency_is_judged_from_tables_alone():
    found = study()
    row = judge_efficiency(found.equal_rank, found.control)
    expected = next(r for r in module_rows(found) if r["source"] == "equal rank")
    assert row.to_dict() == expected
    assert judge_efficiency(found.equal_rank, source="rank 1")["verdict"] == OPEN
    assert judge_efficiency(study(gate=0.4, siblings=0.25).equal_rank)["verdict"] == FAILS


def test_writing_has_rows_of_its_own():
    shares = {"gate": 0.4, "up": 0.4, "down": 0.4, "attention": 0.8}
    parts = {f"writing_{k}": replaced_title(planted_parts(k, shares, n=800)) for k in ("transfer", "revert")}
    rows = {r["source"]: r["verdict"] for r in module_rows(study(**parts))}
    assert rows["transferred, writing"] == rows["reverted, writing"] == FAILS
    assert rows["transferred, a task"] == rows["reverted, a task"] == HOLDS


def replaced_title(parts):
    return dataclasses.replace(parts, title="writing")


def test_a_control_with_one_seed_does_not_hide_what_the_others_say():
    landing = study().landing
    kept = landing.table[(landing.table["run"] == "affect") | (landing.table["seed"] == 0)]
    ordinary = study(landing=1.0).landing
    thin = ordinary.table[(ordinary.table["run"] == "affect") | (ordinary.table["seed"] == 0)]
    assert verdicts(study_with(type(landing)(kept, landing.provenance)))["G1", "tuned on everything"] == OPEN
    assert verdicts(study_with(type(landing)(thin, landing.provenance)))["G1", "tuned on everything"] == FAILS


def test_a_gate_that_lands_like_a_control_fails():
    """More of the change than its siblings, but as much with topics."""
    assert verdicts(study(landing=1.5, generic=1.5))["G1", "tuned on everything"] == FAILS
    assert verdicts(study(landing=1.5, generic=1.0))["G1", "tuned on everything"] == HOLDS


def test_a_special_gate_that_keeps_too_little_is_neither_sufficient_nor_efficient():
    found = verdicts(study(gate=0.4, siblings=0.25, share=0.3, others=0.1))
    assert found["G2", "transferred"] == FAILS
    assert found["G3", "equal rank"] == FAILS
    assert found["G4", "reverted"] == FAILS
    assert found["G4", "equal damage"] == HOLDS  # nothing is said about a share there


def test_few_examples_and_spread_seeds_decide_nothing():
    rates = {"gate": 0.58, "up": 0.56, "down": 0.56, "attention": 0.56, "all": 0.6}
    vague = table(rates, n=200, seeds=3, noise=0.03)
    nearly = {"gate": 0.5, "up": 0.46, "down": 0.46, "attention": 0.46}
    vague_parts = planted_parts("equal_damage", nearly, n=4, noise=0.3)
    found = verdicts(study(equal_damage=vague_parts))
    assert found["G4", "equal damage"] == OPEN
    rows = module_rows(study(writing=vague))
    assert [r["verdict"] for r in rows if r["source"] == "writing, equal rank"] == [OPEN]


def test_the_margin_decides_between_a_precise_draw_and_a_vague_one():
    precise, vague = (0.0, -MARGIN / 2, MARGIN / 2), (0.0, -0.3, 0.3)
    better = (0.1, 0.05, 0.15)
    assert special({"up": precise, "down": better}, MARGIN) == FAILS
    assert special({"up": vague, "down": better}, MARGIN) == OPEN
    assert special({"up": better, "down": better}, MARGIN) == HOLDS
    assert special({"up": (-0.1, -0.15, -0.05), "down": vague}, MARGIN) == FAILS
    assert special({"up": (math.nan,) * 3, "down": better}, MARGIN) == OPEN
    assert special({"up": (math.nan,) * 3, "down": precise}, MARGIN) == FAILS
    assert special({}, MARGIN) == OPEN


def test_percentages_of_the_paper_stand_beside_shares_of_the_gain():
    row = next(r for r in module_rows(study()) if r["source"] == "equal rank")
    assert row["paper_statistic"] == pytest.approx(100 * 0.58 / 0.6, abs=1)
    assert row["sound_statistic"] == pytest.approx((0.58 - 0.2) / (0.6 - 0.2), abs=0.03)
    assert "20.8% of the parameters" in row["note"]
    assert "gate minus others in shares of the gain: up +0.3" in row["note"]


def test_without_controls_or_seeds_the_landing_stays_open():
    from tests.test_landing import planted

    assert verdicts(study_with(planted({"affect": 1.5}, noise=0.02)))["G1", "tuned on everything"] == OPEN
    rows = module_rows(study_with(planted({"affect": 1.5}, seeds=1)))
    assert rows[0]["verdict"] == OPEN
    assert "over up not measured" in rows[0]["note"]


def study_with(landing):
    found = study()
    return type(found)(**{n: getattr(found, n) for n in found.__dataclass_fields__} | {"landing": landing})
