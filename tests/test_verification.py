"""Verification: planted successes are counted, chance is no success, and what cannot be judged is said."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from statsmodels.stats.proportion import proportion_confint

from lens_affect.judgements import Judgement
from lens_affect.regimes import Thresholds
from lens_affect.scenarios import load_scenarios
from lens_affect.verification import CRITERIA, Verification, verify_steering
from tests.test_regimes import judged, planted

N_PROMPTS, N_RANDOM = 24, 5
RULE = Thresholds(1.5, 2.25, 0.1)


def swept(*, log_ratio=0.0, strengths=(0.4,), emotions=("calm", "sad")):
    """Every prompt is steered to one of two targets, and pushed along N_RANDOM random directions."""
    cells = {("steered", e, s): (log_ratio, 0.0) for e in emotions for s in strengths}
    dose = planted(cells | {("random", "", s): (0.0, 0.0) for s in strengths}, n_prompts=N_PROMPTS)
    table = dose.table
    own = table["prompt"] % len(emotions) == [emotions.index(e) if e in emotions else -1 for e in table["emotion"]]
    table = table[own | (table["kind"] != "steered")]
    more = [table[table["kind"] == "random"]] * (N_RANDOM - 1)
    return replace(dose, table=pd.concat([table, *more], ignore_index=True))


def judgement_of(dose, *, steered, random, seed=0, top="calm") -> Judgement:
    """Probability of 0.2 plus what is planted, with enough noise that chance decides where nothing is planted."""
    generator = np.random.default_rng(seed)
    found = judged(dose, {})
    values = torch.full_like(found.probabilities, 0.2) + 0.05 * torch.from_numpy(
        generator.standard_normal(found.probabilities.shape)
    )
    for kind, planted_rise in (("steered", steered), ("random", random)):
        values[np.flatnonzero(dose.table["kind"] == kind)] += planted_rise
    tops = tuple(
        e if k == "steered" and top == "target" else top for k, e in dose.table[["kind", "emotion"]].to_numpy()
    )
    return replace(found, probabilities=values.float(), top=tops)


def test_a_planted_effect_is_found_and_its_rate_has_a_wilson_interval():
    dose = swept()
    found = verify_steering(dose, judgement_of(dose, steered=0.5, random=0.0), thresholds=RULE)
    assert found.successes() == (N_PROMPTS, N_PROMPTS)
    assert found.n_random == N_RANDOM
    row = found.to_frame().query("criterion == 'rises' and pull == 'all'").iloc[0]
    assert (row["low"], row["high"]) == pytest.approx(proportion_confint(N_PROMPTS, N_PROMPTS, method="wilson"))
    assert 0.3 < row["random"] < 0.7
    assert found.difference().low > 0.2
    assert row["gain"] == pytest.approx(0.5, abs=0.05)
    assert f"rises: {N_PROMPTS} of {N_PROMPTS}" in str(found)


def test_the_change_that_steering_and_random_pushes_achieved_stands_beside_the_count():
    dose = swept()
    kind = dose.column("kind")
    dose.table.loc[kind == "steered", "change"], dose.table.loc[kind == "random", "change"] = 0.2, 0.25
    found = verify_steering(dose, judgement_of(dose, steered=0.5, random=0.0), thresholds=RULE)
    assert found.to_frame()["change"].to_numpy() == pytest.approx(0.2)
    assert found.to_frame()["change_random"].to_numpy() == pytest.approx(0.25)
    assert "achieved change 0.20, random 0.25" in str(found)


def test_a_push_along_another_emotion_is_a_control_of_its_own():
    """Where any emotion raises the target, random directions show an effect and other emotions do not."""
    dose = swept()
    other = dose.table[dose.table["kind"] == "steered"].assign(kind="other_emotion", change=0.3)
    dose = replace(dose, table=pd.concat([dose.table, other], ignore_index=True))
    judgement = judgement_of(dose, steered=0.5, random=-0.5)
    values, pushed = judgement.probabilities.clone(), np.flatnonzero(dose.table["kind"] == "other_emotion")
    values[pushed] = 0.2 + 0.5
    values[pushed[:3]] = 0.0
    found = verify_steering(dose, replace(judgement, probabilities=values), thresholds=RULE)
    assert float(found.difference().estimate) == 1.0
    assert float(found.difference(control="other").estimate) == pytest.approx(3 / N_PROMPTS)
    row = found.to_frame().query("criterion == 'rises' and pull == 'all'").iloc[0]
    assert row["other"] == pytest.approx(1 - 3 / N_PROMPTS)
    assert row["change_other"] == pytest.approx(0.3)
    assert "another emotion 0.88, difference +0.12 [" in str(found)
    alone = swept()
    found = verify_steering(alone, judgement_of(alone, steered=0.5, random=0.0), thresholds=RULE)
    assert "another emotion" not in str(found)
    with pytest.raises(ValueError, match=r"received control='other'; allowed are \['random'\], which this sweep had"):
        found.difference(control="other")


def beside(dose, kind, *, emotion=None, log_ratio=0.0, kl=1.0):
    """Texts of one more kind, one per steered text."""
    added = dose.table[dose.table["kind"] == "steered"].assign(kind=kind, kl=kl)
    added["nll"] = added["nll"] + log_ratio
    if emotion is not None:
        added["emotion"] = emotion
    return replace(dose, table=pd.concat([dose.table, added], ignore_index=True))


def test_shares_of_sound_texts_and_kl_of_every_kind_stand_beside_the_counts(tmp_path):
    """Random directions that break every text are no fair comparison, and the result says so."""
    dose = swept()
    random = dose.table["kind"] == "random"
    dose.table.loc[random, "nll"] += 3.0
    dose.table.loc[random, "kl"] = 4.0
    dose = beside(dose, "other_emotion", kl=0.5)
    found = verify_steering(dose, judgement_of(dose, steered=0.5, random=0.0), thresholds=RULE)
    row = found.to_frame().query("criterion == 'rises' and pull == 'all'").iloc[0]
    assert (row["sound"], row["sound_random"], row["sound_other"]) == (1.0, 0.0, 1.0)
    assert (row["kl_random"], row["kl_other"]) == pytest.approx((4.0, 0.5))
    assert math.isnan(row["sound_spread"])
    assert "sound texts 1.00, random 0.00, another emotion 1.00; KL" in str(found)
    assert "random 4.00, another emotion 0.50 nats per token" in str(found)
    assert len(str(found).splitlines()) <= 5
    # A table that was saved before these were kept has none of them.
    earlier = replace(
        found, table=found.table.drop(columns=[c for c in found.table if str(c).startswith(("kl", "sound_"))])
    )
    assert "sound texts 1.00\n" in str(earlier)
    assert float(earlier.difference().estimate) == float(found.difference().estimate)


def test_random_directions_in_the_emotions_spread_stand_in_the_place_of_isotropic_ones_or_beside_them():
    dose = beside(swept(), "random_in_spread", emotion="")
    judgement = judgement_of(dose, steered=0.5, random=-0.5)
    values = judgement.probabilities.clone()
    values[np.flatnonzero(dose.table["kind"] == "random_in_spread")] = 0.9
    judgement = replace(judgement, probabilities=values)
    both = verify_steering(dose, judgement, thresholds=RULE)
    assert both.controls == ("random", "spread")
    assert float(both.difference().estimate) == 1.0
    assert float(both.difference(control="spread").estimate) == 0.0
    assert "random in the emotions' spread 1.00, difference +0.00" in str(both)
    kept = (dose.table["kind"] != "random").to_numpy()
    alone = replace(dose, table=dose.table[kept].reset_index(drop=True))
    of_these = replace(
        judgement,
        probabilities=judgement.probabilities[np.flatnonzero(kept)],
        top=tuple(t for t, k in zip(judgement.top, kept, strict=True) if k),
    )
    found = verify_steering(alone, of_these, thresholds=RULE)
    assert (found.controls, found.n_random) == (("spread",), 1)
    assert float(found.difference().estimate) == 0.0
    assert found.successes() == (N_PROMPTS, N_PROMPTS)


def test_a_push_that_raises_everything_is_no_success():
    """The paper's count alone would call it one: random directions raise the target as well."""
    dose = swept()
    found = verify_steering(dose, judgement_of(dose, steered=0.5, random=0.5), thresholds=RULE)
    assert found.successes() == (N_PROMPTS, N_PROMPTS)
    assert float(found.difference().estimate) == 0.0


def test_with_nothing_planted_the_interval_holds_zero_as_often_as_it_says():
    dose, inside = swept(), 0
    for seed in range(80):
        interval = verify_steering(
            dose, judgement_of(dose, steered=0.0, random=0.0, seed=seed), thresholds=RULE
        ).difference()
        inside += bool(interval.low <= 0 <= interval.high)
    assert inside / 80 >= 0.89


def test_strict_asks_for_the_top_and_for_sound_text():
    dose = swept()
    on_top = verify_steering(dose, judgement_of(dose, steered=0.5, random=0.0, top="target"), thresholds=RULE)
    assert on_top.successes("strict") == (N_PROMPTS, N_PROMPTS)
    other = verify_steering(dose, judgement_of(dose, steered=0.5, random=0.0, top="angry"), thresholds=RULE)
    assert other.successes("strict") == (0, N_PROMPTS)
    broken = swept(log_ratio=2.0)
    damaged = verify_steering(broken, judgement_of(broken, steered=0.5, random=0.0, top="target"), thresholds=RULE)
    assert damaged.successes("strict") == (0, N_PROMPTS)
    assert damaged.successes("rises") == (N_PROMPTS, N_PROMPTS)


def test_counts_by_hand():
    """One prompt's target falls, and two of its random directions rise."""
    dose = swept()
    judgement = judgement_of(dose, steered=0.5, random=-0.5)
    kind, prompt = dose.table["kind"].to_numpy(), dose.table["prompt"].to_numpy()
    values = judgement.probabilities.clone()
    values[np.flatnonzero((kind == "steered") & (prompt == 3))] = 0.0
    values[np.flatnonzero((kind == "random") & (prompt == 3))[:2]] = 1.0
    found = verify_steering(dose, replace(judgement, probabilities=values), thresholds=RULE)
    row = found.table.query("prompt == 3").iloc[0]
    assert (row["rises"], row["rises_random"]) == (0.0, pytest.approx(0.4))
    assert found.successes() == (N_PROMPTS - 1, N_PROMPTS)
    assert float(found.difference().estimate) == pytest.approx((N_PROMPTS - 1 - 0.4) / N_PROMPTS)


def test_an_empty_text_has_no_probability_and_fails_the_strict_criterion():
    dose = swept()
    judgement = judgement_of(dose, steered=0.5, random=0.0, top="target")
    empty = np.flatnonzero((dose.table["kind"] == "steered") & (dose.table["prompt"] == 0))
    values, tops = judgement.probabilities.clone(), list(judgement.top)
    values[empty] = math.nan
    tops[int(empty[0])] = ""
    found = verify_steering(dose, replace(judgement, probabilities=values, top=tuple(tops)), thresholds=RULE)
    assert found.successes("rises") == (N_PROMPTS - 1, N_PROMPTS - 1)
    assert found.successes("strict") == (N_PROMPTS - 1, N_PROMPTS)
    assert "1 scenarios without a text to judge" in str(found)


def test_targets_of_an_unreliable_judge_do_not_count():
    dose = swept()
    judgement = replace(judgement_of(dose, steered=0.5, random=0.0), auc=torch.tensor([0.9, 0.7]))
    found = verify_steering(dose, judgement, thresholds=RULE)
    assert found.left_out == ("sad",)
    assert found.successes()[1] == N_PROMPTS // 2
    assert verify_steering(dose, judgement, thresholds=RULE, every_target=True).successes()[1] == N_PROMPTS


def test_pulls_are_counted_apart():
    scenarios = load_scenarios().select(rows=range(N_PROMPTS))
    dose = replace(swept(), prompts=scenarios.requests)
    found = verify_steering(dose, judgement_of(dose, steered=0.5, random=0.0), scenarios=scenarios, thresholds=RULE)
    frame = found.to_frame().query("criterion == 'rises'").set_index("pull")
    assert frame.loc["with", "n"] + frame.loc["against", "n"] == frame.loc["all", "n"]


def test_every_strength_is_in_the_table_and_the_declared_one_is_printed():
    dose = swept(strengths=(-0.4, 0.2, 0.4))
    judgement = judgement_of(dose, steered=0.5, random=0.0)
    found = verify_steering(dose, judgement, strength=0.4, thresholds=RULE)
    assert sorted(set(found.to_frame()["strength"])) == [-0.4, 0.2, 0.4]
    assert "strength +0.4" in str(found)
    assert verify_steering(dose, judgement, thresholds=RULE).strength == 0.2


def test_it_is_saved_and_loaded(tmp_path):
    dose = swept()
    found = verify_steering(dose, judgement_of(dose, steered=0.5, random=0.0), thresholds=RULE)
    same = Verification.load(found.save(tmp_path / "verification"))
    assert str(same) == str(found)
    pd.testing.assert_frame_equal(same.to_frame(), found.to_frame())
    assert "<table" in found._repr_html_()


def test_wrong_input_is_said():
    dose = swept()
    judgement = judgement_of(dose, steered=0.5, random=0.0)
    with pytest.raises(ValueError, match=r"received strength 3.0; allowed are \[0.4\]"):
        verify_steering(dose, judgement, strength=3.0)
    with pytest.raises(ValueError, match="received a judgement of 3 texts"):
        verify_steering(dose, replace(judgement, probabilities=judgement.probabilities[:3]))
    alone = replace(dose, table=dose.table[dose.table["kind"] != "random"].reset_index(drop=True))
    with pytest.raises(ValueError, match="needs random directions"):
        verify_steering(alone, judged(alone, {}))
    with pytest.raises(ValueError, match="use another judge, or every_target=True"):
        verify_steering(dose, replace(judgement, auc=torch.tensor([math.nan, math.nan])))
    with pytest.raises(ValueError, match="are not the 24 prompts"):
        verify_steering(dose, judgement, scenarios=load_scenarios())
    found = verify_steering(dose, judgement, thresholds=RULE)
    with pytest.raises(ValueError, match="allowed are"):
        found.difference("luck")
    assert set(CRITERIA) == {"rises", "strict"}
