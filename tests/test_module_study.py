"""The chain on a tiny model: everything is tuned, scored, kept and read again; and what a study says."""

import dataclasses

import pytest

import lens_affect.tuning
from lens_affect.ablations import ablate_modules
from lens_affect.damage import neutral_loss
from lens_affect.module_study import ModuleStudy, necessity_sufficiency_efficiency, scan_bands, study_modules
from lens_affect.scorecard import module_scorecard
from lens_affect.trainable import tuned_weights
from lens_affect.tuned import Tuned
from tests.planted_modules import study
from tests.planted_task import TASK

OPTIONS = {"arms": ("gate", "up", "attention"), "seeds": (0, 1), "rank": 2, "steps": 2, "target": 0.01, "bands": 1}


@pytest.fixture(scope="module")
def task():
    """The planted task with half as many examples to be scored on: two per label and word would show nothing more."""
    short = {name: TASK.splits[name][:8] for name in ("validation", "test")}
    return dataclasses.replace(TASK, splits=TASK.splits | short)


@pytest.fixture(scope="module")
def chain(tunable, task, few_neutral_texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chain")
    control = dataclasses.replace(task, name="other", affective=False)
    writing = dataclasses.replace(task, name="written")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lens_affect.tuning, "RATE_STEPS", 1)
        patch.setattr(lens_affect.tuning, "MOST_TRIES", 1)
        patch.setattr("lens_affect.damage.MOST_TRIALS", 2)
        found = necessity_sufficiency_efficiency(tunable, task, control, writing_task=writing, folder=folder, **OPTIONS)
    return found, folder, control


def test_every_part_of_the_chain_is_there(chain, unchanged):
    found, _, _ = chain
    assert list(found.equal_rank.arms["arm"]) == ["gate", "up", "attention", "all"]
    assert list(found.equal_size.arms["arm"]) == ["gate", "up", "attention", "random", "all"]
    sizes = found.equal_size.arms.set_index("arm")["n_parameters"]
    assert all(abs(sizes[a] / sizes["gate"] - 1) <= 0.01 for a in ("up", "attention", "random"))
    assert found.landing.runs == ("planted", "other")
    assert found.transfer.seeds == found.revert.seeds == (0, 1)
    assert found.transfer.arms == ("gate", "up", "attention")
    assert found.control.task == found.control_transfer.title
    assert found.writing.n_examples == len(found.writing_revert.before)
    assert found.control_equal_damage.target == found.equal_damage.target
    assert found.control_revert.arms == found.writing_transfer.arms == ("gate", "up", "attention")
    assert set(found.bands.bands) == {"0-2"}
    assert found.bands.arms == ("gate", "up", "attention")
    assert found.bands.target == OPTIONS["target"]
    assert found.bands.control_name == "other"
    assert found.bands.tuned == found.transfer.tuned[0]
    assert "tuned alone, equal rank" in str(found)


def test_the_chain_fills_the_scorecard(chain):
    card = module_scorecard(chain[0])
    assert list(card.table["id"].unique()) == ["G1", "G2", "G3", "G4"]
    assert set(card.table["verdict"]) <= {"holds", "does not hold", "cannot be decided"}
    assert card.table["rule"].str.len().min() > 40


def test_a_second_start_reads_what_is_there(chain, task, tunable, monkeypatch):
    found, folder, control = chain
    for name in ("tune_module", "_best_rate"):
        monkeypatch.setattr(f"lens_affect.tuning.{name}", None)
    for name in ("score_parts", "scan_bands"):
        monkeypatch.setattr(f"lens_affect.module_study.{name}", None)
    with pytest.raises(ValueError, match=r"scores with other target"):
        necessity_sufficiency_efficiency(tunable, task, control, folder=folder, **OPTIONS | {"target": 0.02})
    with pytest.raises(ValueError, match=r"scores with other examples"):
        study_modules(
            *(tunable, task),
            equal_rank={"all": [found_run(folder)]},
            equal_size={"all": [found_run(folder)]},
            controls={},
            arms=OPTIONS["arms"],
            examples=task.examples("test")[:4],
            target=OPTIONS["target"],
            folder=folder,
        )
    with pytest.raises(ValueError, match=r"bands, which holds scores with other bands than"):
        necessity_sufficiency_efficiency(tunable, task, control, folder=folder, **OPTIONS | {"bands": 2})
    again = necessity_sufficiency_efficiency(tunable, task, control, folder=folder, **OPTIONS)
    assert again.bands.to_frame().equals(found.bands.to_frame())
    assert str(again) == str(found)
    assert str(ModuleStudy.load(folder)) == str(found)
    with pytest.raises(ValueError, match=r"scores with other arms"):
        necessity_sufficiency_efficiency(tunable, task, control, folder=folder, **OPTIONS | {"arms": ("gate", "up")})


def found_run(folder):
    return Tuned.load(folder / "equal_rank_runs" / "all-seed0" / "tuned")


def test_a_band_is_scored_with_the_noise_that_does_equal_damage_in_it(tunable, chain, task, unchanged):
    run, control = found_run(chain[1]), chain[2]
    other = dataclasses.replace(task, name="third")
    found = scan_bands(
        *(tunable, run, task),
        control_task=control,
        other_tasks=[other],
        arms=["up"],
        bands=3,
        target=0.02,
        examples=task.examples("test"),
    )
    rows = found.to_frame().set_index("band")
    reached = [band for band in rows.index if band not in "".join(found.missed)]
    assert reached
    for band in reached:
        blocks = range(3) if band == "0-2" else [int(band)]
        with tuned_weights(tunable, run):
            before = neutral_loss(tunable)
            with ablate_modules(
                *(tunable,), modules="up", layers=blocks, how="random_equal_norm", scale=float(rows.loc[band, "scale"])
            ):
                assert float((neutral_loss(tunable) - before).mean()) == pytest.approx(0.02, rel=0.06)
    # the same examples under three names
    assert rows["third_loss"].to_numpy() == pytest.approx(rows["control_loss"].to_numpy(), nan_ok=True)
    assert rows["affect_loss"].to_numpy() == pytest.approx(rows["control_loss"].to_numpy(), nan_ok=True)


def test_a_control_needs_a_name_of_its_own_and_old_parts_do_not_stay(tunable, chain, tmp_path):
    run = found_run(chain[1])
    with pytest.raises(ValueError, match="own name"):
        study_modules(tunable, TASK, equal_rank={"all": [run]}, equal_size={"all": [run]}, controls={TASK.name: [run]})
    whole = study(control=study().equal_rank, writing_transfer=study().transfer)
    whole.save(tmp_path / "s")
    assert str(ModuleStudy.load(tmp_path / "s").writing_transfer) == str(whole.transfer)
    study(control=None).save(tmp_path / "s", overwrite=True)
    assert ModuleStudy.load(tmp_path / "s").control is ModuleStudy.load(tmp_path / "s").writing_transfer is None


def test_a_study_without_everything_tuned_is_refused(tunable):
    with pytest.raises(ValueError, match="without a run of 'all'"):
        study_modules(tunable, TASK, equal_rank={}, equal_size={}, controls={})


def test_saving_and_loading_a_planted_study(tmp_path):
    found = study()
    found.save(tmp_path / "study")
    assert str(ModuleStudy.load(tmp_path / "study")) == str(found)
    with pytest.raises(FileNotFoundError, match="which has no"):
        ModuleStudy.load(tmp_path)
