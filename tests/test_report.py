"""The report: one offline page with every headline, and nothing a text could smuggle in."""

import dataclasses
import html
import re
import shutil

import numpy as np
import pytest

from lens_affect.comparison import compare_cells
from lens_affect.judges import load_judge
from lens_affect.languages import language_transfer
from lens_affect.models import load_model
from lens_affect.patching import patch_sites
from lens_affect.report import write_report
from lens_affect.scorecard import make_scorecard
from lens_affect.steering_study import study_steering
from lens_affect.sweeps import MAPS, STEERING, make_spec, run_sweep
from tests.test_comparison import cells
from tests.test_donors import make_pairs
from tests.test_languages import language
from tests.test_sweeps import SMALL
from tests.tiny import make_hf_model, make_tokenizer


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "tiny-qwen"
    make_hf_model("qwen2").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return run_sweep(make_spec(model=str(folder), **SMALL), tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def page(sweep):
    return write_report(sweep).read_text(encoding="utf-8")


def test_the_page_loads_nothing_from_anywhere(page):
    assert not re.findall(r"<(?:script|img|link|iframe)[^>]+(?:src|href)=", page)
    assert "<script src" not in page
    own = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert "http://" not in own.replace("http://www.w3.org", "")
    assert "https://" not in own


def test_the_page_holds_the_library_once_and_stays_below_8_mb(page):
    assert page.count("plotly.js v") <= 2
    assert len(page.encode()) < 8e6


def test_every_headline_and_score_is_on_the_page(page, sweep):
    for method in sweep.spec.methods:
        assert sweep.headline(method).split(":")[0] in page
    for score in sweep.spec.scores:
        assert f"{score} by layer" in page


def test_texts_of_a_model_are_escaped(sweep, tmp_path):
    evil = "<script>alert('x')</script>" + sweep.stories.stimuli.texts[0]
    texts = (evil, *sweep.stories.stimuli.texts[1:])
    stories = dataclasses.replace(sweep.stories, stimuli=dataclasses.replace(sweep.stories.stimuli, texts=texts))
    page = write_report(dataclasses.replace(sweep, stories=stories), tmp_path / "report.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


def test_the_page_leads_with_the_scorecard_and_the_advice(page, sweep):
    body = page[page.index("<body>") :]
    assert body.index("Scorecard: published claims against this run") < body.index("nearest_mean by layer")
    for claim in make_scorecard(sweep).table["claim"]:
        assert claim in body
    assert "What to use for this model" in body
    assert "not measured" in body or "sweep with --compare" in body
    assert "Anisotropy" in body


def test_a_comparison_of_methods_is_on_the_page_when_there_is_one(sweep, tmp_path):
    page = write_report(
        dataclasses.replace(sweep, comparison=compare_cells(cells(pooling=0.9))), tmp_path / "r.html"
    ).read_text()
    assert "one changed at a time" in page
    assert "accuracy is carried by pooling" in page


def test_patching_maps_of_the_run_get_a_section(sweep, page, tmp_path):
    assert "activation patching" not in page
    model = load_model(sweep.spec.model)
    pairs = make_pairs(tails=True)
    shutil.copytree(sweep.folder, tmp_path / "run")
    copied = dataclasses.replace(sweep, folder=tmp_path / "run")
    last = patch_sites(model, pairs, sites=["gate", "up", "attn_out", "mlp_out"], positions="last")
    each = patch_sites(model, pairs, sites=["gate", "v"], positions="each", controls=[])
    last.save(copied.folder / MAPS / "our-last")
    each.save(copied.folder / MAPS / "our-each")
    assert list(copied.maps) == ["our-each", "our-last"]
    with_maps = write_report(copied).read_text()
    section = with_maps[with_maps.index("Which site carries it: activation patching") :]
    assert str(last).splitlines()[0] in html.unescape(section)
    assert "our-last" in section
    assert "effect per relative change of resid_post" in section
    assert "position, counted from the end" in section
    assert section.count("All numbers of") == 2
    assert not re.findall(r"<(?:script|img|link|iframe)[^>]+(?:src|href)=", with_maps)


def test_a_steering_study_of_the_run_gets_a_section_and_rows_of_the_scorecard(sweep, page, tmp_path):
    assert "What happens when you push" not in page
    model, vectors = load_model(sweep.spec.model), sweep.vectors["comprehension"]
    target = next(iter(vectors.emotions))
    study = study_steering(
        model, vectors, load_judge("lexicon"), prompts=["Hello <b>there</b>", "A cat", "Why"], emotions=[target], strengths=[0.2, 0.8], layers=1, n_tokens=14,
        languages=True, bisected=[target], reading=vectors,
    )  # fmt: skip
    directions = 3 * np.random.default_rng(0).standard_normal((5, 24))
    spoken = {"English": language(directions, seed=1), "Spanish": language(directions, seed=2)}
    study = dataclasses.replace(study, transfer=language_transfer(spoken, n_permutations=20))
    shutil.copytree(sweep.folder, tmp_path / "run")
    copied = dataclasses.replace(sweep, folder=tmp_path / "run")
    study.save(copied.folder / STEERING / "neutral")
    assert list(copied.steering) == ["neutral"]
    found = write_report(copied).read_text()
    section = html.unescape(found[found.index("What happens when you push: neutral") :])
    assert str(study.regimes).splitlines()[1] in section
    assert "bootstrap probability" in section
    assert "foreign letters" in section
    for heading, _ in study.samples():
        assert heading in section
    assert f"Strengths tried on the way to the boundaries of {target}" in section
    assert "grey: bracket of a boundary" in section
    languages = section[section.index("Other languages: neutral") :]
    for part in (study.scripts, study.meaning, study.transfer):
        assert str(part).splitlines()[0] in languages
    for heading in ("Scripts of the tokens", "Do foreign words", "Vectors of one language used in another"):
        assert heading in languages
    assert str(study.inside).splitlines()[0] in languages[languages.index("Behaviour and inside together: neutral") :]
    bare = dataclasses.replace(study, scripts=None, meaning=None, transfer=None, inside=None, boundaries=())
    shutil.rmtree(copied.folder / STEERING / "neutral")
    bare.save(copied.folder / STEERING / "neutral")
    page = write_report(copied).read_text()
    assert not any(words in page for words in ("Other languages", "Behaviour and inside", "grey: bracket"))
    assert not re.findall(r"<(?:script|img|link|iframe)[^>]+(?:src|href)=", found)
    card = make_scorecard(copied)
    assert {"P9", "P10", "P12"} <= set(card.table["id"])
    assert not {"P9", "P10", "P12"} & set(make_scorecard(sweep).table["id"])
