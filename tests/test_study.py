"""Studies: the paper's models are a spec that runs; specs are read strictly."""

from pathlib import Path

import pandas as pd
import pytest
import yaml

from lens_affect.study import load_study, run_study
from tests.test_scorecard import FLAT, PEAK, planted_run, verdicts

ROOT = Path(__file__).resolve().parent.parent


def test_the_papers_models_are_nine_with_hub_ids_and_memory():
    study = load_study(ROOT / "analyses" / "specs" / "jeong2026.yaml")
    paper = [c for c in study.cells if c.of_the_paper]
    assert len(paper) == 9
    assert {c.family for c in paper} == {"GPT-2", "Gemma", "Qwen", "Llama", "Mistral"}
    assert all("/" in c.model for c in paper)
    assert sum(c.certain for c in paper) == 6
    for cell in paper:
        billions = float(cell.parameters[:-1]) / (1000 if cell.parameters.endswith("M") else 1)
        assert cell.memory_gb == pytest.approx(4 * billions, rel=0.1)
    pairs = {c.pair for c in paper if c.pair}
    assert all({c.tuning for c in paper if c.pair == p} == {"base", "instruct"} for p in pairs)


def test_a_study_runs_the_cells_that_were_asked_for_and_judges_them_together(tmp_path):
    study = load_study(ROOT / "analyses" / "specs" / "jeong2026.yaml")
    asked = []

    def run(spec, folder, *, resume, **options):
        asked.append((spec.model, Path(folder).name, resume, spec.n_permutations, spec.compare_methods))
        return planted_run(Path(folder), PEAK, FLAT, model=spec.model)

    card = run_study(study, tmp_path, only=["gpt2", "embedded"], run=run)
    assert asked == [
        ("openai-community/gpt2", "gpt2", True, 1000, True),
        ("smollm2-135m-instruct", "embedded", True, 1000, True),
    ]
    assert len(verdicts(card, "P4")) == 4
    assert pd.read_csv(tmp_path / "scorecard.csv")["id"].tolist() == card.table["id"].tolist()
    with pytest.raises(ValueError, match=r"received cells \['gpt3'\]; allowed are \['gpt2'"):
        run_study(study, tmp_path, only=["gpt3"], run=run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cell": []}, r"received cell = \[\]"),
        ({"cells": [{"name": "a"}]}, r"received cells.0.model"),
        ({"settings": {"permutations": 5}}, r"received permutations = 5"),
        ({"settings": {"scores": ["nearest"]}}, r"received scores \['nearest'\]"),
    ],
)
def test_a_spec_with_an_unknown_key_is_refused(tmp_path, change, message):
    good = {
        "name": "x",
        "cells": [{"name": "a", "model": "gpt2", "family": "GPT-2", "tuning": "base", "memory_gb": 1.0}],
    }
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(good))
    assert load_study(path).cells[0].name == "a"
    path.write_text(yaml.safe_dump(good | change))
    with pytest.raises(ValueError, match=message):
        load_study(path)


def test_a_missing_or_broken_spec_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="which is no file; give a study"):
        load_study(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(ValueError, match="no YAML mapping"):
        load_study(tmp_path / "list.yaml")
