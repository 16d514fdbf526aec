"""The public names: complete, sorted, importable, documented."""

import importlib
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import lens_affect

ROOT = Path(__file__).resolve().parent.parent


def test_every_public_name_can_be_imported_and_dir_lists_it():
    assert list(lens_affect.__all__) == sorted(lens_affect.__all__)
    for name in lens_affect.__all__:
        assert getattr(lens_affect, name) is not None
        assert name in dir(lens_affect)


def test_an_unknown_name_says_which_there_are():
    with pytest.raises(AttributeError, match=r"has no 'sing'; it has .*load_model"):
        _ = lens_affect.sing


def test_the_names_that_type_checkers_see_are_the_names_that_run():
    source = (ROOT / "lens_affect" / "__init__.py").read_text()
    declared = {line.rsplit(" as ", 1)[1] for line in source.splitlines() if line.startswith("    from lens_affect.")}
    assert declared == set(lens_affect.__all__)


@pytest.mark.parametrize("name", [n for n in lens_affect.__all__ if callable(getattr(lens_affect, n))])
def test_every_public_function_and_class_says_what_it_is(name):
    public = getattr(lens_affect, name)
    assert (inspect.getdoc(public) or "").strip()
    if inspect.isfunction(public):
        undocumented = [p for p in inspect.signature(public).parameters if f"{p}:" not in inspect.getdoc(public)]
        # Short functions with one obvious argument may do without an Args section.
        assert not undocumented or len(inspect.signature(public).parameters) <= 2


def test_every_module_has_a_test_file_of_its_name():
    modules = {path.stem for path in (ROOT / "lens_affect").glob("[a-z]*.py")}
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    assert modules <= tests


def test_every_module_has_its_place_in_the_one_way_of_imports():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    placed = [name.strip() for layer in layers for name in layer.split("|")]
    modules = {f"lens_affect.{path.stem}" for path in (ROOT / "lens_affect").glob("[a-z]*.py")}
    assert sorted(placed) == sorted(modules)


def test_importing_the_package_loads_neither_torch_nor_transformers():
    code = "import sys, lens_affect, lens_affect.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_version_is_the_changelogs():
    version = importlib.metadata.version("lens-affect")
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
