"""What must be true: an arm equal to the reference keeps 1, an untrained one 0; intervals cover; planted differences are found and none is invented."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats

from lens_affect.module_table import ModuleTable, compare_arms, learning_curves, load_runs, mean_curve, two_way_interval
from tests.planted_runs import campaign, run, scores

ARMS = {"all": (0.6, 400), "gate": (0.52, 100), "up": (0.52, 100), "attention": (0.4, 180)}


def test_known_retentions_are_found():
    table = compare_arms(campaign(ARMS, n=2000), reference="all").to_frame().set_index("arm")
    assert table.loc["gate", "retention"] == pytest.approx(0.8, abs=0.08)
    assert table.loc["attention", "retention"] == pytest.approx(0.5, abs=0.08)
    assert table.loc["all", "retention"] == 1
    assert table.loc["gate", "percent_of_tuned"] == pytest.approx(100 * 0.52 / 0.6, abs=4)
    assert table.loc["gate", "share_of_parameters"] == 0.25
    assert ((table["retention_low"] <= table["retention"]) & (table["retention"] <= table["retention_high"])).all()


def test_an_arm_that_learned_nothing_keeps_none_of_the_gain_but_much_of_the_score():
    runs = campaign({"all": (0.6, 400)}, base=0.5)
    runs["none"] = [dataclasses.replace(r, after=r.before) for r in runs["all"]]
    table = compare_arms(runs, reference="all").to_frame().set_index("arm")
    assert table.loc["none", "retention"] == 0
    assert table.loc["none", "gain"] == 0
    assert table.loc["none", "percent_of_tuned"] > 75


def test_a_planted_difference_is_found_and_none_invented():
    table = compare_arms(campaign(ARMS, n=2000), reference="all")
    found = table.contrast("gate", "attention")
    assert found["low"] > 0
    assert found["difference"] == pytest.approx(0.12, abs=0.05)
    turned = table.contrast("attention", "gate")
    assert turned["difference"] == -found["difference"]
    assert turned["low"] == -found["high"]
    same = table.contrast("gate", "up")
    assert same["low"] < 0 < same["high"]
    with pytest.raises(ValueError, match="received the pair 'gate' and 'down'"):
        table.contrast("gate", "down")


def test_the_interval_covers_with_three_seeds_and_many_examples():
    rng, hits, truth = np.random.default_rng(0), 0, 0.3
    for _ in range(400):
        example, seed = rng.normal(0, 0.5, 60), rng.normal(0, 0.05, 3)
        values = truth + example[None] + seed[:, None] + rng.normal(0, 0.3, (3, 60))
        found = two_way_interval(values, list(map(str, range(60))))
        hits += found.low <= truth <= found.high
    assert 0.93 <= hits / 400 <= 1.0


def test_with_one_seed_it_is_the_t_interval_over_examples():
    values = np.random.default_rng(1).normal(size=(1, 40))
    found = two_way_interval(values, list(map(str, range(40))))
    low, high = stats.t.interval(0.95, 39, values.mean(), stats.sem(values[0]))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.p == pytest.approx(stats.ttest_1samp(values[0], 0).pvalue)
    assert two_way_interval(np.ones((2, 3)), ["a", "b", "c"]).low == 1.0
    with pytest.raises(ValueError, match="not finite"):
        two_way_interval(np.array([[np.nan]]), ["a"])


def test_the_detectable_difference_is_detected_at_its_power():
    rng = np.random.default_rng(2)
    size = two_way_interval(rng.normal(size=(1, 100)), list(map(str, range(100)))).detectable
    seen = sum(two_way_interval(rng.normal(size, 1, (1, 100)), list(map(str, range(100)))).low > 0 for _ in range(300))
    assert 0.65 <= seen / 300 <= 0.92


def test_exploded_runs_are_counted_and_left_out():
    runs = campaign(ARMS)
    lost = runs["gate"][1]
    nothing = dataclasses.replace(lost.after, values=torch.full_like(lost.after.values, float("nan")))
    runs["gate"][1] = dataclasses.replace(lost, exploded=True, after=nothing)
    row = compare_arms(runs, reference="all").to_frame().set_index("arm").loc["gate"]
    assert (row["n_seeds"], row["n_exploded"]) == (2, 1)
    assert np.isfinite(row["score"])
    runs["gate"] = [runs["gate"][1]]
    row = compare_arms(runs, reference="all").to_frame().set_index("arm").loc["gate"]
    assert row["n_seeds"] == 0
    assert np.isnan(row["score"])


def test_a_loss_is_turned_so_that_gains_are_positive():
    rng = np.random.default_rng(0)
    before = scores(rng.normal(5, 0.2, 50), better="low")
    runs = {
        "all": [
            run("all", s, before, scores(before.values.numpy() - 1 + rng.normal(0, 0.01, 50), better="low"))
            for s in (0, 1)
        ],
        "gate": [run("gate", s, before, scores(before.values.numpy() - 0.5, better="low")) for s in (0, 1)],
    }
    found = compare_arms(runs, reference="all")
    table = found.to_frame().set_index("arm")
    assert table.loc["gate", "retention"] == pytest.approx(0.5, abs=0.02)
    assert table.loc["gate", "score"] == pytest.approx(4.5, abs=0.1)
    assert table.loc["gate", "low"] < table.loc["gate", "score"] < table.loc["gate", "high"]
    assert np.isnan(table.loc["gate", "percent_of_tuned"])
    assert found.contrast("all", "gate")["difference"] == pytest.approx(0.5, abs=0.02)


def test_the_log_share_is_a_measure_of_its_own():
    n = 30
    flat = torch.zeros(n, 2)
    lifted = torch.stack([torch.ones(n), torch.zeros(n)], dim=1)
    before = scores(np.zeros(n), log_probabilities=flat)
    runs = {"all": [run("all", s, before, scores(np.zeros(n), log_probabilities=lifted)) for s in (0, 1)]}
    found = compare_arms(runs, reference="all", measure="log_share").to_frame()
    assert found["gain"].iloc[0] == pytest.approx(np.log(2) - np.log1p(np.exp(-1)), abs=1e-6)


def test_scores_on_another_task_with_the_same_weights():
    runs = campaign({"all": (0.6, 400), "gate": (0.5, 100)})
    before = scores(np.full(20, 3.0) + np.arange(20) / 100, better="low", task="text")
    after = {
        label: [scores(before.values.numpy() + 0.2, better="low", task="text") for _ in found]
        for label, found in runs.items()
    }
    table = compare_arms(runs, reference="all", after=after, before=before)
    assert table.to_frame()["gain"].tolist() == pytest.approx([-0.2, -0.2], abs=1e-6)
    assert table.to_frame()["retention"].isna().all()  # tuning everything gained nothing here
    with pytest.raises(ValueError, match="only one of after and before"):
        compare_arms(runs, reference="all", after=after)


def test_runs_on_other_examples_are_refused():
    runs = campaign(ARMS)
    wrong = runs["up"][0]
    other = dataclasses.replace(wrong.after, provenance=wrong.after.provenance.updated(stimuli_hash="other"))
    runs["up"][0] = dataclasses.replace(wrong, after=other)
    with pytest.raises(ValueError, match="'up', seed 0, scored on other examples"):
        compare_arms(runs, reference="all")
    with pytest.raises(ValueError, match="received an arm without runs"):
        compare_arms({}, reference="all")
    with pytest.raises(ValueError, match="received measure 'f1'"):
        compare_arms(campaign(ARMS), reference="all", measure="f1")


def test_it_prints_its_headline_and_survives_saving(tmp_path):
    table = compare_arms(campaign(ARMS), reference="all")
    table.save(tmp_path / "table")
    again = ModuleTable.load(tmp_path / "table")
    assert str(again) == str(table)
    assert again.to_frame().equals(table.to_frame())
    assert "minimum detectable difference" in str(table)
    assert len(str(table).splitlines()) <= 5
    assert "gate" in table._repr_html_()


def test_learning_curves_by_arm_seed_and_step():
    curves = learning_curves(campaign(ARMS))
    assert len(curves) == 4 * 3 * 3
    mean = mean_curve(curves)
    row = mean[(mean["arm"] == "gate") & (mean["step"] == 10)].iloc[0]
    assert row["mean"] == pytest.approx(0.99)
    assert (row["lowest"], row["highest"]) == pytest.approx((0.98, 1.0))


def test_runs_of_a_campaign_are_loaded_by_folder_name(tmp_path):
    runs = campaign({"gate": (0.5, 100)}, seeds=2)["gate"]
    for one in runs:
        one.save(tmp_path / f"gate-seed{one.seed}" / "tuned")
    (tmp_path / "half-done").mkdir()
    found = load_runs(tmp_path)
    assert list(found) == ["gate-seed0", "gate-seed1"]
    assert found["gate-seed1"].seed == 1
    with pytest.raises(FileNotFoundError, match="holds no finished run"):
        load_runs(tmp_path / "half-done")


def test_scores_of_three_examples_stay_between_0_and_1_and_a_loss_may_go_beyond():
    right = np.array([1.0, 1.0, 0.0])
    share = compare_arms({"all": [run("all", s, scores(0 * right), scores(right)) for s in (0, 1)]}, reference="all")
    row = share.arms.iloc[0]
    assert (row["low"], row["high"]) == (0.0, 1.0)
    assert two_way_interval(np.stack([right, right]), list("abc")).high > 1
    loss = compare_arms(
        {"all": [run("all", s, scores(right, better="low"), scores(3 * right, better="low")) for s in (0, 1)]},
        reference="all",
    )
    assert loss.arms.iloc[0]["high"] > 3
