"""Token views: small, self-contained, escaped, and right about colours and values."""

import html
import json
import re
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch

from lens_affect.views import TokenView, circuitsvis_view, view_tokens, visible, write_page

EVIL = ("<bos>", "I", " <script>alert(1)</script>", "\n\n", "\tran", "\"&'", "</div>\x00")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def data_of(view):
    return json.loads(html.unescape(re.search(r'data-view="([^"]*)"', view.html).group(1)))


def titles_of(view):
    return [html.unescape(t) for t in re.findall(r'<span[^>]* title="([^"]*)"', view.html)]


def test_a_text_cannot_smuggle_in_markup_and_its_whitespace_is_visible():
    view = view_tokens(EVIL, torch.zeros(2, len(EVIL)), title="<b>x</b>", unit="<i>")
    assert "<script" not in view.html
    assert "</div>\x00" not in view.html
    assert "<b>x</b>" not in view.html
    assert "<i>" not in view.html
    assert "·&lt;script&gt;alert(1)&lt;/script&gt;" in view.html
    assert visible("\n\n") == "↵↵"
    assert visible("\tran a\r\x00\u202e") == "→ran·a␍��"  # a text may not turn its neighbours' direction either
    assert view.html.count('class="t') == len(EVIL)


def test_thirty_layers_and_sixty_tokens_stay_below_40_kb():
    values = torch.randn(30, 60, generator=torch.Generator().manual_seed(0)) * 1000
    view = view_tokens([" footsteps"] * 60, values)
    assert len(view.html.encode()) < 40_000
    assert len(view_tokens(['"<&>"\n'] * 60, values).html.encode()) < 40_000


def test_colours_are_white_at_0_blue_below_vermillion_above_and_full_from_the_limit_on():
    view = view_tokens(list("abcde"), [0.0, -1.0, 2.0, -8.0, float("nan")], limit=4)
    looks = re.findall(r'<span class="([^"]*)"(?: style="background:rgba\(([^"]*)\)")?', view.html.split("<div>")[-1])
    assert [look[1] for look in looks[:5]] == [
        "213,94,0,0.000",
        "0,114,178,0.212",
        "213,94,0,0.425",
        "0,114,178,0.850",
        "",
    ]
    assert titles_of(view)[1] == "−1, position 1"
    assert titles_of(view)[4] == "not measured, position 4"


def test_one_scale_serves_every_layer_and_only_counted_tokens_set_it():
    values = torch.ones(3, 10)
    values[2] = 5
    values[:, 0] = 20_000  # the attention sink
    source = SimpleNamespace(
        tokens=tuple("abcdefghij"), content=tuple(range(1, 10)), emotion="afraid", layers=(4, 5, 6)
    )
    view = view_tokens(source, values)
    data = data_of(view)
    assert data["m"] == 5
    assert data["l"] == [4, 5, 6]
    assert data["s"] == [0] + [1] * 9
    assert data["v"][0][:2] == [20000, 1]
    assert titles_of(view)[0] == "+20000 (not counted), position 0"
    assert "Projection on afraid" in view.html
    assert 'class="t n"' in view.html
    assert data_of(view_tokens(source, values, limit=7))["m"] == 7
    assert ">6</output>" in view_tokens(source, values, start_layer=6).html


def test_all_zero_and_unmeasured_values_have_a_scale_too():
    assert "+1 " in view_tokens(["a", "b"], [0.0, 0.0]).html
    assert "+1 " in view_tokens(["a"], [float("nan")]).html
    assert data_of(view_tokens(["a"], [[float("nan")], [1.0]]))["v"] == [[None], [1]]


def test_no_slider_for_one_row_and_nothing_is_loaded_from_anywhere(tmp_path):
    view = view_tokens(["a", "b"], [1.0, -1.0])
    assert "<input" not in view.html
    page = view_tokens(["a", "b"], [[1.0, -1.0], [0.0, 2.0]]).save(tmp_path / "view.html").read_text()
    assert not re.findall(r"(?:src|href)=|https?://|@import|url\(", page)
    assert page.startswith("<!doctype html>")
    assert view._repr_html_() == view.html
    assert "kB of HTML" in str(view)


def test_a_page_escapes_its_title(tmp_path):
    page = write_page(tmp_path / "deep" / "page.html", "<script>", ["<p>body</p>"]).read_text()
    assert "<script>" not in page
    assert "<p>body</p>" in page


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([1.0], {}, r"shape \[1\] for 2 tokens; allowed are \[2\] and \[layers, 2\]"),
        ([[1.0, 2.0]], {"layers": (1, 2)}, "2 layers for 1 rows"),
        ([1.0, 2.0], {"start_layer": 3}, "start_layer=3; allowed are 0 to 0"),
        ([1.0, 2.0], {"limit": 0.0}, "limit=0.0; allowed is a positive"),
        ([1.0, 2.0], {"counted": [2]}, "counted positions up to 2; allowed are 0 to 1"),
    ],
)
def test_what_does_not_fit_is_refused(values, options, message):
    with pytest.raises(ValueError, match=message):
        view_tokens(["a", "b"], values, **options)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to run the page in")
def test_each_slider_moves_its_own_view_and_agrees_with_the_view_that_starts_there(tmp_path):
    values = torch.tensor([[1.0, -2.0, float("nan")], [0.5, 4.0, -4.0]])
    source = SimpleNamespace(tokens=("<bos>", " a", "b"), content=(1, 2), emotion="sad", layers=(0, 1))
    views = [view_tokens(source, values, start_layer=0, limit=4).html for _ in range(2)]
    move = "<script>var i=document.querySelectorAll('input')[1];i.value=1;i.dispatchEvent(new Event('input'))</script>"
    page = write_page(
        tmp_path / "two.html", "two", [*views, view_tokens(source, values, start_layer=1, limit=4).html, move]
    )
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
    ]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=50, check=True)
    found = done.stdout.split('<div class="lav"')[1:]

    def tokens(fragment):
        spans = re.findall(r"<span class=\"t[^>]*>", fragment)
        return [
            (
                "t n" in s,
                re.sub(r"\s", "", (re.search(r"rgba\(([^)]*)\)", s) or [None, ""])[1]),
                re.search(r'title="([^"]*)"', s)[1],
            )
            for s in spans
        ]

    still, moved, expected = (tokens(f) for f in found)
    assert [t[2] for t in still] == ["+1 (not counted), position 0", "−2, position 1", "not measured, position 2"]
    assert [(t[0], t[2]) for t in moved] == [(t[0], t[2]) for t in expected]
    for ours, theirs in zip(moved, expected, strict=True):
        assert [float(x) for x in ours[1].split(",") if x] == pytest.approx(
            [float(x) for x in theirs[1].split(",") if x], abs=0.005
        )
    assert ">1</output>" in found[1]
    assert ">0</output>" in found[0]


def test_circuitsvis_holds_its_library_and_fetches_nothing():
    view = circuitsvis_view(EVIL, torch.randn(2, len(EVIL)), layers=(3, 4))
    assert isinstance(view, TokenView)
    assert 1e6 < len(view.html) < 2e6
    tags = re.findall(r"<(?:script|link|img|iframe)[^>]*>", view.html.split("CircuitsVis=")[0] + view.html[-5000:])
    assert all("http" not in tag and "src" not in tag and "href" not in tag for tag in tags)
    assert not re.search(r"\bfrom\s*[\"']https?://|import\s*\(?[\"']https?://", view.html)
    assert "unpkg" not in view.html
    assert "layer 3" in view.html
    ours = view.html[view.html.rindex("CircuitsVis.ColoredTokensMulti") :]
    props = ours[ours.index("{") : ours.rindex("}") + 1]
    assert json.loads(props)["tokens"] == list(EVIL)
    assert "<" not in props  # or a token could end the script


def test_circuitsvis_refuses_what_json_cannot_hold():
    with pytest.raises(ValueError, match="not finite; CircuitsVis shows finite numbers only: use view_tokens"):
        circuitsvis_view(["a"], [float("nan")])
