"""Selectivity: known losses come back in SDs, intervals cover, a planted module is found, and what is one function is not compared."""

import json

import numpy as np
import pytest
import torch

from lens_affect.live_weights import LiveWeights
from lens_affect.results import Provenance, file_sha256
from lens_affect.selectivity import AblationTable, layer_bands, scan_ablations
from tests.test_transfers import same, state
from tests.tiny import make_hf_model


def table(affect_drop, control_drop, n=60, seed=0, how="shuffle", groups=None):
    """One arm per drop: scores of SD 2 and 0.5, each example a little differently hurt."""
    rng = np.random.default_rng(seed)
    before = [torch.from_numpy(rng.normal(size=m) * sd).float() for m, sd in ((n, 2.0), (2 * n, 0.5))]
    after = [
        torch.stack([b - sd * torch.from_numpy(d + 0.5 * rng.normal(size=len(b))).float() for d in drops])
        for b, sd, drops in ((before[0], 2.0, affect_drop), (before[1], 0.5, control_drop))
    ]
    names = ("gate", "up", "down")[: len(affect_drop)]
    return AblationTable(
        arms=names, bands=("0-2",) * len(names), scales=torch.ones(len(names)), affect=after[0], control=after[1],
        affect_before=before[0], control_before=before[1],
        affect_groups=tuple(groups or map(str, range(n))), control_groups=tuple(map(str, range(2 * n))),
        how=how, seed=0, provenance=Provenance(model="m"),
    )  # fmt: skip


def test_losses_are_in_standard_deviations_of_the_scores_before():
    found = table([1.0, 0.2], [0.4, 0.2])
    rows = found.to_frame().set_index("arm")
    a0, a1 = found.affect_before.double().numpy(), found.affect[0].double().numpy()
    assert rows.loc["gate", "affect_loss"] == pytest.approx((a0.mean() - a1.mean()) / a0.std(ddof=1), rel=1e-5)
    assert rows.loc["gate", "selectivity"] == pytest.approx(
        rows.loc["gate", "affect_loss"] - rows.loc["gate", "control_loss"]
    )
    assert rows.loc["gate", "low"] > 0 > rows.loc["up", "low"]
    assert (rows["n"].iloc[0], rows["n_control"].iloc[0]) == (60, 120)
    difference = found.compare("gate", "up").iloc[0]
    assert difference["difference"] == pytest.approx(rows.loc["gate", "selectivity"] - rows.loc["up", "selectivity"])
    assert difference["low"] > 0
    assert "most selective: gate in blocks 0-2" in str(found)


def test_intervals_hold_the_truth_as_often_as_they_say():
    inside = 0
    for seed in range(200):
        row = table([0.6], [0.4], n=40, seed=seed).to_frame().iloc[0]
        inside += row["low"] <= 0.2 <= row["high"]
    assert 0.90 <= inside / 200 <= 0.99


def test_examples_of_one_group_stay_together():
    plain, grouped = (
        table([1.0], [0.4], groups=groups).to_frame().iloc[0] for groups in (None, [str(i // 30) for i in range(60)])
    )
    assert plain["selectivity"] == pytest.approx(grouped["selectivity"])
    assert plain["high"] - plain["low"] != pytest.approx(grouped["high"] - grouped["low"], rel=0.01)


def test_zeroed_siblings_are_not_compared():
    found = table([1.0, 0.2, 0.1], [0.4, 0.2, 0.1], how="zero")
    for pair in (("gate", "up"), ("gate", "down"), ("up", "down")):
        with pytest.raises(ValueError, match="ablated by zero, which is one function"):
            found.compare(*pair)
    with pytest.raises(ValueError, match="ablated by zero, which is one function"):
        found.compare("gate", "mlp")
    assert "no arm is named" in str(found)
    with pytest.raises(ValueError, match=r"received the arm 'q' in 0-2; arms are \['gate', 'up', 'down'\]"):
        found.compare("gate", "q")
    assert len(table([1.0, 0.2], [0.4, 0.2]).compare("gate", "up")) == 1


def test_a_scan_finds_the_band_and_module_where_the_score_lives(tmp_path):
    model = make_hf_model("llama")
    before = state(model)
    live = LiveWeights(model)
    key = "layers.2.gate"
    start = live.read(key)
    rng = np.random.default_rng(0)
    spread, other = rng.normal(size=20), rng.normal(size=30)

    def affect(m):
        return spread - 5 * float((LiveWeights(m).read(key) - start).norm() / start.norm()) + 0 * rng.normal()

    seen = []
    found = scan_ablations(
        model, arms=["gate", "up"], affect=affect, control=lambda m: other, bands=3, scales={"gate": 0.5, "up": 0.5},
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    rows = found.to_frame().set_index(["arm", "band"])
    assert rows["selectivity"].idxmax() == ("gate", "2")
    assert rows.loc[("gate", "2"), "affect_loss"] == pytest.approx(2.5 / spread.std(ddof=1), rel=0.01)
    assert rows.drop(("gate", "2"))["selectivity"].abs().max() < 1e-6
    assert list(found.compare("gate", "up")["band"]) == ["0", "1", "2"]
    assert seen[-1] == (6, 6)
    assert same(model, before)
    found.save(tmp_path / "t")
    assert AblationTable.load(tmp_path / "t").to_frame().equals(found.to_frame())
    assert "most selective" in found._repr_html_()


def test_each_band_is_brought_to_equal_damage_and_what_cannot_be_is_said(tmp_path):
    """Language suffers from the length of a change wherever it is, but in block 2 only half as much, and never in block 1; affect lives in the gate
    of block 2."""
    model = make_hf_model("llama")
    live, weight = LiveWeights(model), {0: 1.0, 1: 0.0, 2: 0.5}
    start = {(i, m): live.read(f"layers.{i}.{m}") for i in weight for m in ("gate", "up")}

    def moved(i, m, now):
        return float((now.read(f"layers.{i}.{m}") - start[i, m]).norm() / start[i, m].norm())

    def loss(m):
        now = LiveWeights(m)
        return sum(weight[i] * moved(i, module, now) for i, module in start) * np.array([0.9, 1.0, 1.1])

    rng = np.random.default_rng(0)
    spread, other, sums = rng.normal(size=20), rng.normal(size=30), rng.normal(size=10)
    found = scan_ablations(
        model, arms=["gate", "up"], affect=lambda m: spread - 5 * moved(2, "gate", LiveWeights(m)),
        control=lambda m: other - moved(0, "up", LiveWeights(m)), others={"arithmetic": lambda m: sums - 0.1},
        bands=3, whole=True, target=0.2, loss=loss, tolerance=0.02, control_name="topics",
    )  # fmt: skip
    rows = found.to_frame().set_index(["arm", "band"])
    assert list(dict.fromkeys(found.bands)) == ["0", "1", "2", "0-2"]
    expected = {"0": 0.2, "2": 0.4, "0-2": 0.2 / 1.5}
    for (arm, band), row in rows.iterrows():
        if band == "1":
            unknown = ["scale", "affect_loss", "control_loss", "selectivity", "arithmetic_selectivity"]
            assert row[unknown].isna().all()
            assert row["rise"] == 0
        else:
            assert row["scale"] == pytest.approx(expected[band], rel=0.03)
            assert row["rise"] == pytest.approx(0.2, rel=0.02)
            lost = 5 * expected[band] * (arm == "gate") * (band != "0")
            assert row["affect_loss"] == pytest.approx(lost / spread.std(ddof=1), rel=0.03, abs=1e-6)
            lost = expected[band] * (arm == "up") * (band != "2")
            assert row["control_loss"] == pytest.approx(lost / other.std(ddof=1), rel=0.03, abs=1e-6)
    by_arithmetic = rows["affect_loss"] - rows["arithmetic_loss"]
    assert rows["arithmetic_selectivity"].to_numpy() == pytest.approx(by_arithmetic.to_numpy(), nan_ok=True)
    assert found.missed == ("gate in blocks 1", "up in blocks 1")
    assert "not reached: gate in blocks 1, up in blocks 1" in str(found)
    assert "most selective: gate in blocks 2, affect lost minus topics lost" in str(found)
    differences = found.compare("gate", "up").set_index("band")["difference"]
    assert np.isnan(differences["1"])
    assert differences["2"] > differences["0-2"] > 0
    found.save(tmp_path / "t")
    assert AblationTable.load(tmp_path / "t").to_frame().equals(found.to_frame())
    assert str(AblationTable.load(tmp_path / "t")) == str(found)


def test_a_table_of_an_earlier_version_is_read(tmp_path):
    found = table([1.0, 0.2], [0.4, 0.2])
    found.save(tmp_path / "t")
    file = tmp_path / "t" / "result.json"
    new = ("control_name", "target", "rises", "others", "others_before", "others_groups", "tuned")
    old = {name: value for name, value in json.loads(file.read_text()).items() if name not in new}
    file.write_text(json.dumps(old))
    manifest = tmp_path / "t" / "manifest.json"
    facts = json.loads(manifest.read_text())
    facts["files"]["result.json"] = file_sha256(file)
    manifest.write_text(json.dumps(facts))
    assert AblationTable.load(tmp_path / "t").to_frame().equals(found.to_frame())


def test_bands_cut_the_blocks_evenly():
    assert layer_bands(30, 3) == {f"{i}-{i + 9}": tuple(range(i, i + 10)) for i in (0, 10, 20)}
    with pytest.raises(ValueError, match="received 4 bands for 3 blocks"):
        layer_bands(3, 4)


def test_wrong_scans_are_refused():
    model = make_hf_model("llama")

    def attempt(message, **settings):
        options = {"arms": ["gate"], "affect": lambda m: np.arange(4.0), "control": lambda m: np.arange(3.0)}
        with pytest.raises(ValueError, match=message):
            scan_ablations(model, **options | settings)

    attempt("without a scale for \\['gate'\\]", scales={"up": 1.0})
    attempt("a target beside scales", scales=1.0, target=0.1)
    attempt("allowed are different names", others={"control": lambda m: np.arange(3.0)})
    attempt("received the arms \\[\\]", arms=[])
    attempt("affect scores of shape \\(4,\\) that are not finite", affect=lambda m: np.full(4, np.nan))
    attempt("allowed is one each", affect_groups=["a"])
    sizes = iter([4, 3])
    attempt("one finite number per example, 4 as before", affect=lambda m: np.arange(float(next(sizes))))
