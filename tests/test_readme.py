"""What the README shows is what runs."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
import typer

import lens_affect
from lens_affect.cli import app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.weights
def test_the_examples_run_in_turn_and_print_what_the_readme_shows(real_model, monkeypatch):
    real_model(
        "smollm2-135m-instruct"
    )  # fetched, or skipped with the reason; loaded once, since loading is tested elsewhere
    monkeypatch.setattr(lens_affect, "load_model", real_model, raising=False)
    printed = io.StringIO()
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(printed):
        for code in blocks("python"):
            exec(compile(code, "README.md", "exec"), names)
    shown = "".join(blocks("text"))
    # Another processor may round the last digit differently: words must agree, and numbers to 0.02 (of logits' differences, 2e-4).
    number = r"\d+\.\d+(?:e-?\d+)?"
    assert re.sub(number, "#", printed.getvalue().strip()) == re.sub(number, "#", shown.strip())
    for seen, stated in zip(re.findall(number, printed.getvalue()), re.findall(number, shown), strict=True):
        assert abs(float(seen) - float(stated)) <= 0.02


def test_every_command_exists_with_its_options():
    root = typer.main.get_command(app)
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("lens-affect ")]
    assert commands
    for line in commands:
        name, *arguments = shlex.split(line, comments=True)[1:]
        command = root.get_command(None, name)
        with command.make_context(name, arguments):
            pass


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_the_module_map_is_complete():
    modules = {path.name for path in (ROOT / "lens_affect").glob("[a-z]*.py")}
    assert modules == set(re.findall(r"^\| `(\w+\.py)` \|", README, flags=re.MULTILINE))


def test_every_file_that_is_linked_is_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
