"""A steering study: the parts are those of single calls, come back from disk, and say which texts got which label."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from lens_affect.adapter import encode_prompt
from lens_affect.boundaries import locate_boundaries
from lens_affect.doses import UNSTEERED, sweep_strengths
from lens_affect.inside import correlate_inside
from lens_affect.judgements import judge_texts
from lens_affect.judges import load_judge
from lens_affect.languages import language_transfer
from lens_affect.regimes import classify_regimes
from lens_affect.scenarios import load_scenarios
from lens_affect.steering_study import ASKED, PARTS, SteeringStudy, saved_parts, study_steering
from lens_affect.stimuli import load_stimuli
from lens_affect.verification import verify_steering
from tests.test_languages import language
from tests.test_patching import vectors_of

EMOTIONS = ("happy", "sad", "afraid", "angry", "calm", "loving", "grateful")
PROMPTS = ["Hello there", "Write about a cat in the garden", "Why"]
LAYERED = {"layers": 1, "n_tokens": 12, "seed": 1}


@pytest.fixture(scope="module")
def study(tiny_model):
    model = tiny_model("llama")
    directions = 3 * np.random.default_rng(0).standard_normal((5, 24))
    found = study_steering(
        model, vectors_of(model, EMOTIONS), load_judge("lexicon"), prompts=PROMPTS, emotions=["happy", "sad"], strengths=[0.2, 0.8],
        scenarios=load_scenarios().select(emotions=["loving", "grateful"]), verified_at=(0.4,), n_random=2, languages=True, bisected=["sad"],
        reading=vectors_of(model, EMOTIONS), **LAYERED,
    )  # fmt: skip
    spoken = {"English": language(directions, seed=1), "Spanish": language(directions, seed=2)}
    return replace(found, transfer=language_transfer(spoken, n_permutations=20))


def test_the_parts_are_those_of_single_calls(tiny_model, study):
    model = tiny_model("llama")
    vectors, judge = vectors_of(model, EMOTIONS), load_judge("lexicon")
    dose = sweep_strengths(model, vectors, PROMPTS, emotions=["happy", "sad"], strengths=[0.2, 0.8], **LAYERED)
    assert dose.texts == study.dose.texts
    pd.testing.assert_frame_equal(classify_regimes(dose, judge_texts(judge, dose.texts)).table, study.regimes.table)
    scenarios = load_scenarios().select(emotions=["loving", "grateful"])
    tried = sweep_strengths(model, vectors, scenarios, strengths=[0.4], n_random=2, **LAYERED)
    assert study.scenario_dose is not None
    assert tried.texts == study.scenario_dose.texts
    checked = verify_steering(tried, judge_texts(judge, tried.texts), strength=0.4, scenarios=scenarios)
    assert str(checked) == str(study.verification)
    assert study.verification is not None
    assert study.verification.n_random == 2
    inside = correlate_inside(model, dose, judge_texts(judge, dose.texts), vectors, seed=1)
    assert study.inside is not None
    pd.testing.assert_frame_equal(inside.table, study.inside.table)
    searched = locate_boundaries(model, vectors, PROMPTS, "sad", judge=judge, **LAYERED)
    assert [b.emotion for b in study.boundaries] == ["sad"]
    pd.testing.assert_frame_equal(study.boundaries[0].table, searched.table)
    assert str(searched) in str(study)


def test_it_comes_back_from_disk_with_and_without_the_parts_that_may_miss(study, tmp_path):
    same = SteeringStudy.load(study.save(tmp_path / "study"))
    assert str(same) == str(study)
    assert all(getattr(same, name) is not None for name in PARTS)
    assert str(same.transfer) == str(study.transfer)
    small = replace(study, **{name: None for name in PARTS if name not in ("dose", "judgement", "regimes")})
    assert SteeringStudy.load(small.save(tmp_path / "small")).verification is None
    with pytest.raises(FileNotFoundError, match="which has no dose, judgement, regimes"):
        SteeringStudy.load(tmp_path)


QUICK = {"layers": 1, "n_tokens": 6, "seed": 1, "prompts": PROMPTS, "emotions": ["happy"], "strengths": [0.4]}


@pytest.fixture
def pushing(tiny_model):
    """study_steering of a tiny model, as small as it gets."""
    model = tiny_model("llama")

    def push(**asked):
        vectors, judge = asked.pop("vectors", vectors_of(model, EMOTIONS)), asked.pop("judge", load_judge("lexicon"))
        return study_steering(model, vectors, judge, **(QUICK | asked))

    return push


@pytest.fixture
def nothing_written(monkeypatch):
    """Fails where a text is written."""
    monkeypatch.setattr("lens_affect.pushed_texts.generate", None)


class Stranger:
    """A judge of none of our emotions, or one that was never measured."""

    name = title = "a stranger"
    multi_label = True

    def __init__(self, labels=("tuesday",)):
        self.labels = labels

    def score(self, texts):
        return torch.full((len(texts), len(self.labels)), 0.5)

    def auc(self, emotion):
        return float("nan")


class Broken(Stranger):
    """A judge whose files are gone."""

    def score(self, texts):
        raise OSError("no such file")


def test_what_a_study_cannot_do_is_refused_before_the_first_text(pushing, tiny_model, nothing_written):
    model = tiny_model("llama")
    loving = load_scenarios().select(emotions=["loving"])
    with pytest.raises(ValueError, match="which a stranger cannot name"):
        pushing(judge=Stranger())
    with pytest.raises(OSError, match="no such file"):
        pushing(judge=Broken(("loving",)))
    with pytest.raises(ValueError, match="a stranger was measured good enough .* for none of them"):
        pushing(judge=Stranger(("loving",)), scenarios=loving)
    with pytest.raises(ValueError, match="received emotion 'hungry'"):
        pushing(bisected=["sad", "hungry"])
    with pytest.raises(ValueError, match="allowed is a list of emotions"):
        pushing(bisected="sad")
    with pytest.raises(ValueError, match="received emotion 'loving'; there are vectors for"):
        pushing(vectors=vectors_of(model, ("happy", "sad", "angry")), scenarios=loving)
    with pytest.raises(ValueError, match="needs random directions: add 'random'"):
        pushing(scenarios=loving, controls=["other_emotion"])
    with pytest.raises(ValueError, match="received strength 99"):
        pushing(scenarios=loving, verified_at=[99.0])
    with pytest.raises(ValueError, match="received reading vectors of .*; a stranger can name none of them"):
        pushing(judge=Stranger(("happy",)), reading=vectors_of(model, ("calm", "bored")))
    with pytest.raises(ValueError, match="there are vectors for 2 to 2"):
        pushing(reading=vectors_of(model, EMOTIONS, layers=(2,)))
    with pytest.raises(ValueError, match="allowed are the texts of two languages or more"):
        pushing(transfer={"English": load_stimuli("passages")})
    with pytest.raises(TypeError, match=r"received \['temper'\]; allowed are options of sweep_strengths"):
        pushing(temper=0.7)
    with pytest.raises(ValueError, match="of the scorer, .*, holds"), pytest.MonkeyPatch.context() as patched:
        other = tiny_model("qwen2")
        shortest = max(len(encode_prompt(other, p)[0]) for p in PROMPTS) + QUICK["n_tokens"]
        window = lambda reader: shortest if reader is other else 512  # noqa: E731
        patched.setattr("lens_affect.doses.context_window", window)
        pushing(scorer=other, scenarios=loving)  # the prompts fit, the scenarios do not


def test_controls_are_for_the_sweeps_and_not_for_the_search_of_boundaries(pushing, tiny_model):
    model = tiny_model("llama")
    found = pushing(controls=["random"], bisected=["sad"])
    assert found.dose.kinds == ("steered", "random")
    assert [b.emotion for b in found.boundaries] == ["sad"]
    with pytest.raises(
        ValueError, match=r"received controls=\['random'\]; boundaries are searched with random directions"
    ):
        locate_boundaries(model, vectors_of(model, EMOTIONS), PROMPTS, "sad", controls=["random"])


def test_a_finished_part_is_kept_when_a_later_one_fails_and_is_not_made_again(pushing, tmp_path, monkeypatch):
    loving = load_scenarios().select(emotions=["loving"])
    asked = {"scenarios": loving, "verified_at": [0.4], "n_random": 1, "folder": tmp_path / "study"}
    with monkeypatch.context() as broken:
        broken.setattr("lens_affect.steering_study.verify_steering", lambda *given, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pushing(**asked)
    assert saved_parts(tmp_path / "study") == ("dose", "judgement", "regimes", "scenario_dose", "scenario_judgement")
    with monkeypatch.context() as quiet:
        quiet.setattr("lens_affect.pushed_texts.generate", None)
        found = pushing(**asked)
    assert str(found) == str(pushing(**{k: v for k, v in asked.items() if k != "folder"}))
    assert str(SteeringStudy.load(tmp_path / "study")) == str(found)
    with pytest.raises(ValueError, match="that was asked for with n_random 1 and not 2; choose another folder"):
        pushing(**(asked | {"n_random": 2}))
    (tmp_path / "study" / ASKED).unlink()
    with pytest.raises(ValueError, match="that does not say what was asked for"):
        pushing(**asked)


def test_overwriting_a_study_removes_the_parts_that_the_new_one_has_not(study, tmp_path):
    small = replace(
        study, **{name: None for name in PARTS if name not in ("dose", "judgement", "regimes")}, boundaries=()
    )
    study.save(tmp_path / "study")
    with pytest.raises(FileExistsError, match="which holds dose, judgement, .* of a study"):
        small.save(tmp_path / "study")
    (tmp_path / "study" / ASKED).write_text("{}")
    small.save(tmp_path / "study", overwrite=True)
    assert not (tmp_path / "study" / ASKED).exists()  # it was about the study that was there
    assert saved_parts(tmp_path / "study") == ("dose", "judgement", "regimes")
    same = SteeringStudy.load(tmp_path / "study")
    assert same.verification is None
    assert same.boundaries == ()
    study.transfer.save(tmp_path / "other" / "transfer")
    with pytest.raises(FileExistsError, match="which holds transfer of a study"):
        small.save(tmp_path / "other")


def test_vectors_of_each_language_are_tried_in_the_others(pushing, monkeypatch):
    texts = {
        name: load_stimuli(of).select(
            emotions=["happy", "sad", "angry"], groups=["kitchen", "train", "school", "garden"]
        )
        for name, of in (("English", "passages"), ("Spanish", "passages_es"))
    }
    monkeypatch.setattr(
        "lens_affect.steering_study.language_transfer",
        lambda read, **options: language_transfer(read, n_permutations=20, **options),
    )
    found = pushing(transfer=texts)
    assert found.transfer is not None
    assert found.transfer.languages == ("English", "Spanish")
    assert found.transfer.emotions == ("happy", "sad", "angry")


def test_scripts_of_texts_are_shares_of_their_letters(study):
    table = study.script_table()
    scripts = [c for c in table.columns if c not in ("kind", "strength", "n") and not c.startswith("texts_with")]
    assert (table["texts_with_foreign_low"] <= table["texts_with_foreign"]).all()
    assert table[scripts].sum(axis=1).to_numpy() == pytest.approx(1.0)
    assert table["n"].sum() == len(study.dose.table)
    # The tiny model writes Latin letters only; a planted foreign text is seen.
    rows = study.dose.table.copy()
    row = int(rows.index[rows["kind"] == "steered"][0])
    rows.loc[row, "text"] = "快乐 happy"
    planted = replace(study, dose=replace(study.dose, table=rows)).script_table().set_index(["kind", "strength"])
    key = ("steered", float(rows["strength"][row]))
    assert planted.loc[key, "texts_with_foreign"] == pytest.approx(1 / planted.loc[key, "n"])


def name_languages(texts, *, candidates):
    """In the place of lingua, which is an extra: Spanish by its greeting, English otherwise, nothing sure of an empty text."""
    assert candidates[0] == "English"
    names = ["spanish" if "hola" in text else "english" if text else None for text in texts]
    sure = [
        float("nan") if name is None else 0.3 if "perhaps" in text else 0.9
        for name, text in zip(names, texts, strict=True)
    ]
    return pd.DataFrame({"language": names, "confidence": sure})


def test_languages_of_texts_are_shares_of_texts_and_what_is_not_sure_is_undecided(study, monkeypatch):
    monkeypatch.setattr("lens_affect.steering_study.text_languages", name_languages)
    rows = study.dose.table.copy()
    at = rows.index[(rows["kind"] == "steered") & (rows["strength"] == 0.8)]
    rows["text"] = "a text"
    rows.loc[at[:3], "text"] = ["hola amigos", "hola perhaps", ""]
    table = replace(study, dose=replace(study.dose, table=rows)).language_table()
    row = table.set_index(["kind", "strength"]).loc[("steered", 0.8)]
    n = len(at)
    assert (row["spanish"], row["undecided"], row["english"]) == pytest.approx((1 / n, 2 / n, (n - 3) / n))
    assert row["texts_in_foreign"] == pytest.approx(1 / n)
    assert row["texts_in_foreign_low"] <= 1 / n <= row["texts_in_foreign_high"]
    assert table[["english", "spanish", "undecided"]].sum(axis=1).to_numpy() == pytest.approx(1.0)
    assert (table[table["kind"] != "steered"]["texts_in_foreign"] == 0).all()


def test_samples_carry_the_damage_label_of_their_own_text(study):
    samples = study.samples()
    assert samples
    texts = [" ".join(t.split()) for t in study.dose.texts]
    for heading, text in samples:
        labels = {study.regimes.damage[i] for i, t in enumerate(texts) if t == text}
        assert heading.split(" (")[0].replace(" ", "_") in labels
    assert not any(kind.split(" (")[1].startswith(UNSTEERED) for kind, _ in samples)
