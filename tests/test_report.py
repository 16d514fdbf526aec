"""The report: one offline page with every headline, and nothing a text could smuggle in."""

import dataclasses
import re

import pytest

from lens_affect.comparison import compare_cells
from lens_affect.report import write_report
from lens_affect.scorecard import make_scorecard
from lens_affect.sweeps import make_spec, run_sweep
from tests.test_comparison import cells
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
