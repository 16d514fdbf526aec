"""Looks and saving: every emotion can be told apart; a figure comes with its numbers, with or without a browser."""

import json
import logging
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import pytest

from lens_affect.comparison import compare_cells
from lens_affect.plotting import plot_methods
from lens_affect.stimuli import EMOTIONS
from lens_affect.style import EMOTION_COLOURS, EMOTION_MARKERS, QUADRANT_COLOURS, save_figure
from tests.test_comparison import cells


@pytest.fixture(scope="module")
def comparison():
    return compare_cells(cells(pooling=0.9))


def test_every_emotion_has_its_own_look_and_every_quadrant_one_colour():
    assert len({(EMOTION_COLOURS[e], EMOTION_MARKERS[e]) for e in EMOTIONS}) == len(EMOTIONS)
    assert {EMOTION_COLOURS[e] for e in EMOTIONS} == set(QUADRANT_COLOURS.values())


def test_a_saved_figure_has_its_page_and_its_numbers(comparison, tmp_path, monkeypatch):
    monkeypatch.setattr(go.Figure, "write_image", lambda self, path, **k: Path(path).write_bytes(b"png"))
    page = save_figure(plot_methods(comparison), tmp_path / "f" / "methods", comparison)
    assert page.is_file()
    assert (tmp_path / "f" / "plotly.min.js").is_file()
    assert (tmp_path / "f" / "methods.png").is_file()
    numbers = json.loads((tmp_path / "f" / "methods.json").read_text())
    assert numbers[0]["provenance"]["model"] == "planted"
    table = pd.DataFrame(**{k: numbers[0]["table"][k] for k in ("columns", "data")})
    assert table["value"].tolist() == pytest.approx(comparison.table["value"].tolist())


def test_without_a_browser_the_page_is_there_and_the_log_says_what_to_do(comparison, tmp_path, monkeypatch, caplog):
    def fail(self, path, **k):
        raise RuntimeError("no Chrome")

    monkeypatch.setattr(go.Figure, "write_image", fail)
    assert save_figure(plot_methods(comparison), tmp_path / "methods", comparison).is_file()
    assert "install the group `figures`" in caplog.text


def test_what_the_browser_says_that_is_no_message_is_not_logged(comparison, tmp_path, monkeypatch, caplog):
    browser = logging.getLogger("choreographer.channels.pipe")

    def draw(self, path, **k):
        browser.error("JSONError decoding message. Ignoring")
        Path(path).write_bytes(b"png")

    monkeypatch.setattr(go.Figure, "write_image", draw)
    save_figure(plot_methods(comparison), tmp_path / "methods", comparison)
    browser.error("JSONError decoding message. Ignoring")  # some come when the picture is done
    assert "JSONError" not in caplog.text
