"""Shared fixtures: tiny random models (session-wide, read-only), real weights (skipped with the reason where they can't be had)."""

import collections
import os
import tempfile
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from lens_affect.catalogue import CATALOGUE, FetchError, fetch
from lens_affect.meaning import load_emotion_words
from lens_affect.models import load_model
from lens_affect.stimuli import load_stimuli
from tests.tiny import make_hf_model, make_multilingual, make_tokenizer

# Tiny models are faster on one thread, and many times faster when the other core is busy; real weights share the cores out.
torch.set_num_threads(1)
THREADS = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))

TIME_BUDGETS = {
    "test_analyses.py": 180,
    "test_comparison.py": 90,
    "test_localization.py": 90,
    "test_readme.py": 150,
    "test_real_weights.py": 240,
    "test_replay.py": 90,
    "test_scorecard.py": 90,
}
"""Seconds a test module may take; 60 where none is named."""
WEIGHTS_BUDGET = 240
"""Seconds that all tests on real weights may take together, without fetching them."""
_spent: dict[str, float] = collections.defaultdict(float)
_fetched = [0.0]
_of_weights = {"tests": 0.0, "fetching": 0.0}


def pytest_collection_modifyitems(items):
    """Long modules first: with one file at a time per worker, a long one at the end would keep the other worker waiting."""
    items.sort(key=lambda item: -TIME_BUDGETS.get(item.path.name, 60))


def pytest_runtest_logreport(report):
    fetching = sum(seconds for name, seconds in report.user_properties if name == "fetching")
    _spent[os.path.basename(report.location[0])] += report.duration
    if report.when == "teardown":
        _of_weights["fetching"] += fetching
        _of_weights["tests"] -= fetching
    if "weights" in report.keywords:
        _of_weights["tests"] += report.duration


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("time per module (budget)")
    for module, seconds in sorted(_spent.items()):
        budget = TIME_BUDGETS.get(module, 60)
        over = "  OVER BUDGET" if seconds > budget else ""
        terminalreporter.write_line(f"{module:32s} {seconds:6.1f} s ({budget} s){over}")
    over = "  OVER BUDGET" if _of_weights["tests"] > WEIGHTS_BUDGET else ""
    terminalreporter.write_line(
        f"all tests on real weights {_of_weights['tests']:.1f} s ({WEIGHTS_BUDGET} s){over}, and fetching them {_of_weights['fetching']:.1f} s"
    )


@pytest.fixture(autouse=True)
def _one_thread():
    """Small products gain nothing from a second thread and stall on a busy machine; real models ask for more (real_model)."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def _models():
    return {}


@pytest.fixture(scope="session")
def tiny_model(_models):
    """tiny_model("llama") -> a bridge around a random model of that family; shared, so tests must not change it."""

    def make(family: str, *, chat: bool = True):
        key = (family, chat)
        if key not in _models:
            _models[key] = load_model(make_hf_model(family), tokenizer=make_tokenizer(chat=chat))
        return _models[key]

    return make


@pytest.fixture(scope="module")
def tunable():
    """A bridge of this file's own: it is tuned and restored."""
    return load_model(make_hf_model("llama"), tokenizer=make_tokenizer())


@pytest.fixture(scope="module")
def tunable_state(tunable):
    return {name: p.detach().clone() for name, p in tunable.original_model.named_parameters()}


@pytest.fixture
def unchanged(tunable, tunable_state):
    """After the test the model is as before: names, values, flags, and nothing of peft left."""
    flags = {name: p.requires_grad for name, p in tunable.original_model.named_parameters()}
    yield
    now = dict(tunable.original_model.named_parameters())
    assert now.keys() == tunable_state.keys()
    assert all(torch.equal(now[name], value) for name, value in tunable_state.items())
    assert {name: p.requires_grad for name, p in now.items()} == flags
    assert not any("lora" in name for name, _ in tunable.original_model.named_modules())
    assert not hasattr(tunable.original_model, "peft_config")


@pytest.fixture(scope="session")
def multilingual():
    """A bridge around a random model whose tokenizer has our emotion words of nine languages as single tokens; read-only."""
    hf_model, tokenizer = make_multilingual(load_emotion_words()["word"])
    return load_model(hf_model, tokenizer=tokenizer)


@pytest.fixture(scope="session")
def passages():
    return load_stimuli("passages")


@pytest.fixture(scope="module")
def few_neutral_texts(passages):
    """neutral_loss reads 4 of our neutral passages instead of 36: on a random model more of them show nothing more."""
    few = passages.select(rows=[i for i, e in enumerate(passages.emotions) if e == "neutral"][:4])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lens_affect.damage.load_stimuli", lambda name: few)
        yield


@pytest.fixture(scope="session")
def few_passages(passages):
    """Four emotions and neutral on four topics."""
    return passages.select(
        emotions=["happy", "sad", "angry", "calm", "neutral"], groups=["kitchen", "train", "school", "garden"]
    )


@pytest.fixture(autouse=True)
def _fetching(request):
    """Seconds that went into fetching weights since the last test, for the report of this one."""
    yield
    if _fetched[0]:
        request.node.user_properties.append(("fetching", _fetched[0]))
        _fetched[0] = 0.0


@pytest.fixture(scope="session")
def real_model():
    """real_model("smollm2-135m-instruct") -> the model in float32; fetched if an index can be reached, else the test is skipped."""
    loaded = {}

    def make(name: str):
        torch.set_num_threads(THREADS)
        if name not in loaded:
            start = time.monotonic()
            try:
                fetch(CATALOGUE[name])
            except FetchError as error:
                pytest.skip(f"no weights: {error}")
            _fetched[0] += time.monotonic() - start
            loaded[name] = load_model(name, dtype=torch.float32)
        return loaded[name]

    return make


@pytest.fixture
def empty_cache(monkeypatch):
    """An empty model cache."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("LENS_AFFECT_CACHE", folder)
        yield folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A folder with a tiny model and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-mistral"
    make_hf_model("mistral").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def finished(model_folder, tmp_path_factory):
    """The folder of a finished sweep of that model; tests may add maps and studies to it."""
    from lens_affect.sweeps import make_spec, run_sweep
    from tests.test_sweeps import SMALL

    out = tmp_path_factory.mktemp("runs") / "run"
    run_sweep(make_spec(model=model_folder, **SMALL), out)
    return str(out)
