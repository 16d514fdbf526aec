"""Activations: pooling against numpy by hand on Hugging Face's states, padding, prompts, storage and bad input."""

import contextlib
import errno
import logging
import os
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tokenizers.processors import TemplateProcessing

from lens_affect.activations import SINK_RATIO, Activations, extract_activations, extract_poolings
from lens_affect.models import load_model
from lens_affect.stimuli import Stimuli
from tests.tiny import DENSE, make_hf_model, make_tokenizer

BOS, EOS, PAD = 0, 1, 2
PROMPT = "Write a story about a train."
STORY = "She read the note twice, folded it along the old crease, and put the kettle on."
TEXTS = ("The bus was late.", STORY, "Nobody had told her.<eos> So she waited<pad> in the rain.<eos>", STORY * 3)
POOLINGS = ("mean", "mean_without_sinks", "last", "midpoint", "after:5")
TOKENIZER = make_tokenizer()


def make_stimuli(*texts, prompt=""):
    n = len(texts)
    return Stimuli(texts, tuple("ab"[i % 2] for i in range(n)), ("g",) * n, ("test",) * n, (prompt,) * n)


def token_ids(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def text_of_n_tokens(n):
    return next(STORY[:i] for i in range(1, len(STORY)) if len(token_ids(STORY[:i])) == n)


def hf_states(model, ids):
    """resid_post of every block, as [layer, position, d_model], and block 0's input, by plain hooks on Hugging Face's blocks."""
    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    seen = []
    handles = [b.register_forward_hook(lambda m, a, out: seen.append(out)) for b in blocks]
    handles.append(blocks[0].register_forward_pre_hook(lambda m, a: seen.append(a[0])))
    with torch.no_grad():
        model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    states = np.stack([(x[0] if isinstance(x, tuple) else x)[0].numpy() for x in seen])
    return states[1:], states[0]


def bos_of(family):
    return [] if family == "qwen2" else [BOS]


def close(ours, theirs):
    assert ours.shape == theirs.shape
    assert np.abs(np.asarray(ours) - theirs).max() <= 1e-5 * np.abs(theirs).max()


def positions_by_hand(pooling, ids, start):
    """DESIGN section 5: special tokens, padding, the prompt and position 0 never enter."""
    content = [i for i in range(start, len(ids)) if i > 0 and ids[i] not in (BOS, EOS, PAD)]
    if pooling == "last":
        return content[-1:]
    if pooling.startswith("after:"):
        return content[int(pooling.removeprefix("after:")) :]
    if pooling == "midpoint":  # PAPERS 2.2
        n = len(ids) - start
        return [start + n // 2] if n > 10 else [start - 1]
    return content


@pytest.mark.parametrize("prompt", ["", PROMPT])
@pytest.mark.parametrize("family", DENSE)
def test_pooling_is_what_numpy_gives_by_hand_on_hugging_faces_states(tiny_model, family, prompt):
    hf, texts = make_hf_model(family), TEXTS[1:]
    head = token_ids(f"<bos>[user] {prompt}\n[assistant] ") if prompt else bos_of(family)
    ids = [[*head, *token_ids(text)] for text in texts]
    states = [hf_states(hf, row) for row in ids]
    for pooling in ("mean", "last", "midpoint", "after:5"):
        found = extract_activations(tiny_model(family), make_stimuli(*texts, prompt=prompt), pooling=pooling)
        for row, (blocks, embedding) in enumerate(states):
            where = positions_by_hand(pooling, ids[row], len(head))
            close(found.values[row], blocks[:, where].mean(1))
            close(found.embedding["embedding"][row], embedding[where].mean(0))


@pytest.mark.parametrize(("n", "offset"), [(10, -1), (11, 5), (12, 6)])
def test_midpoint_is_token_n_half_of_the_text_and_the_last_prompt_token_up_to_ten_tokens(tiny_model, n, offset):
    text = text_of_n_tokens(n)
    found = extract_activations(tiny_model("llama"), make_stimuli(text, prompt=PROMPT), pooling="midpoint")
    head = token_ids(f"<bos>[user] {PROMPT}\n[assistant] ")
    states, _ = hf_states(make_hf_model("llama"), head + token_ids(text))
    close(found.values[0], states[:, len(head) + offset])


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_midpoint_of_a_short_text_without_a_prompt_is_refused(tiny_model, family):
    stimuli = make_stimuli(STORY, text_of_n_tokens(10))
    with pytest.raises(ValueError, match=r"text of 10 tokens without a prompt in row 1; midpoint.* more than 10"):
        extract_activations(tiny_model(family), stimuli, pooling="midpoint")


@pytest.mark.parametrize(
    ("family", "pooling"), [*((f, "mean") for f in DENSE), *((f, p) for f in ("gpt2", "gemma3") for p in POOLINGS[1:])]
)
def test_a_text_gives_the_same_vector_alone_and_in_any_batch(tiny_model, family, pooling):
    model, stimuli = tiny_model(family), make_stimuli(*TEXTS[1:], STORY[:40])
    sites = ("resid_post", "q", "mlp_out")
    whole = extract_activations(model, stimuli, sites=sites, pooling=pooling, batch_tokens="auto")
    for budget in (1, 130):  # with a budget of 1 each text is alone in its batch
        other = extract_activations(model, stimuli, sites=sites, pooling=pooling, batch_tokens=budget)
        for site in sites:
            torch.testing.assert_close(other.arrays[site], whole.arrays[site], rtol=1e-5, atol=1e-5)


def test_without_a_chat_template_a_text_is_read_after_its_plain_prompt(tiny_model):
    found = extract_activations(tiny_model("llama", chat=False), make_stimuli(STORY, prompt=PROMPT))
    head = [BOS, *token_ids(PROMPT + "\n\n")]
    states, _ = hf_states(make_hf_model("llama"), head + token_ids(STORY))
    close(found.values[0], states[:, len(head) :].mean(1))
    assert found.provenance.bos == "prepended"


def test_own_bos_reads_with_the_tokenizers_own_default(tiny_model):
    hf = make_hf_model("llama")
    bare = extract_activations(tiny_model("llama"), make_stimuli(STORY), own_bos=True)
    close(bare.values[0], hf_states(hf, token_ids(STORY))[0][:, 1:].mean(1))
    assert bare.provenance.bos == "none"
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    adding = load_model(make_hf_model("llama"), tokenizer=tokenizer)
    for own_bos in (True, False):
        found = extract_activations(adding, make_stimuli(STORY), own_bos=own_bos)
        close(found.values[0], hf_states(hf, [BOS, *token_ids(STORY)])[0][:, 1:].mean(1))
        assert found.provenance.bos == "prepended"


def test_provenance_says_how_each_text_began(tiny_model):
    stimuli = make_stimuli(STORY, STORY)
    mixed = Stimuli(stimuli.texts, stimuli.emotions, stimuli.groups, stimuli.sources, ("", PROMPT))
    found = extract_activations(tiny_model("llama"), mixed).provenance
    assert found.bos == "prepended+template"
    assert found.stimuli_hash == mixed.hash
    assert len(found.checks) == 9


@pytest.fixture(scope="module")
def sink():
    """A model in which "Z" is an attention sink (embedding row times 1000), and its never-booted twin."""
    token = token_ids("Z")[0]

    def plant():
        model = make_hf_model("llama")
        with torch.no_grad():
            model.model.embed_tokens.weight[token] *= 1000
        return model

    return token, load_model(plant(), tokenizer=make_tokenizer()), plant()


def test_mean_without_sinks_leaves_out_a_planted_sink_and_the_plain_mean_warns_of_it(sink, caplog):
    token, model, hf = sink
    texts = (STORY, STORY.replace("kettle", "Z"), STORY)
    ids = [BOS, *token_ids(texts[1])]
    assert ids.count(token) == 1
    with caplog.at_level(logging.WARNING, logger="lens_affect"):
        plain = extract_activations(model, make_stimuli(*texts))
    assert "1 of 3 texts hold an attention sink" in caplog.text
    assert "pooling='mean_without_sinks'" in caplog.text
    clean = extract_activations(model, make_stimuli(*texts), pooling="mean_without_sinks")
    others = [i for i in range(1, len(ids)) if ids[i] != token]
    states, _ = hf_states(hf, ids)
    close(plain.values[1], states[:, 1:].mean(1))
    close(clean.values[1], states[:, others].mean(1))
    assert clean.texts_with_sinks["resid_post"].tolist() == plain.texts_with_sinks["resid_post"].tolist() == [1, 1, 1]
    torch.testing.assert_close(clean.values[0], plain.values[0])


@pytest.mark.parametrize("family", DENSE)
def test_sinks_are_tokens_beyond_three_times_their_texts_median_norm_layer_by_layer(tiny_model, family):
    stimuli = make_stimuli(*TEXTS)
    found = extract_activations(tiny_model(family), stimuli, pooling="mean_without_sinks")
    hf, n_texts = make_hf_model(family), np.zeros(3, dtype=int)
    for row, text in enumerate(TEXTS):
        ids = [*bos_of(family), *token_ids(text)]
        states, _ = hf_states(hf, ids)
        states = states[:, positions_by_hand("mean", ids, len(bos_of(family)))]
        norms = np.linalg.norm(states, axis=-1)
        keep = norms <= SINK_RATIO * np.quantile(norms, 0.5, axis=1, method="lower")[:, None]
        n_texts += ~keep.all(1)
        close(found.values[row], (states * keep[..., None]).sum(1) / keep.sum(1)[:, None])
    assert found.texts_with_sinks["resid_post"].tolist() == n_texts.tolist()


@pytest.mark.parametrize("pooling", ["mean", "mean_without_sinks", "last"])
def test_moments_are_means_and_mean_squares_of_the_pooled_rows_of_each_cell(tiny_model, few_passages, pooling):
    model, sites = tiny_model("llama"), ("resid_post", "gate")
    pooled = extract_activations(model, few_passages, sites=sites, pooling=pooling)
    moments = extract_activations(model, few_passages, sites=sites, pooling=pooling, keep="moments", batch_tokens=300)
    cells = list(dict.fromkeys(zip(few_passages.emotions, few_passages.groups, strict=True)))
    assert list(zip(moments.stimuli.emotions, moments.stimuli.groups, strict=True)) == cells
    assert max(moments.counts.tolist()) > 1
    keys = np.array([cells.index(k) for k in zip(few_passages.emotions, few_passages.groups, strict=True)])
    assert moments.counts.tolist() == np.bincount(keys).tolist()
    for cell in range(len(cells)):
        for site in sites:
            rows = pooled.arrays[site].double().numpy()[keys == cell]
            np.testing.assert_allclose(moments.arrays[site][cell], rows.mean(0), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(moments.squares[site][cell], (rows**2).mean(0), rtol=1e-4, atol=1e-5)
        lexical = pooled.embedding["embedding"].numpy()[keys == cell].mean(0)
        np.testing.assert_allclose(moments.embedding["embedding"][cell], lexical, rtol=1e-4, atol=1e-5)


def test_chosen_layers_are_those_of_all_layers_in_the_order_asked_for(tiny_model, few_passages):
    model = tiny_model("gemma3")
    whole = extract_activations(model, few_passages, sites="gate")
    part = extract_activations(model, few_passages, sites="gate", layers=[2, 0])
    assert (part.layers, part.n_layers) == ((2, 0), 3)
    torch.testing.assert_close(part.values, whole.values[:, [2, 0]])


def test_several_sites_are_read_in_one_pass_as_they_are_read_alone(tiny_model, few_passages):
    model, sites = tiny_model("gemma2"), ("q", "resid_post", "act")
    together = extract_activations(model, few_passages, sites=sites)
    assert together.sites == sites
    with pytest.raises(ValueError, match=r"received activations of \['q', 'resid_post', 'act'\].*\.at\('q'\)\.values"):
        together.values  # noqa: B018
    for site in sites:
        alone = extract_activations(model, few_passages, sites=site)
        torch.testing.assert_close(together.at(site).values, alone.values)
        assert set(together.at(site).embedding) == set(alone.embedding)
    with pytest.raises(
        ValueError, match=r"site 'gate' was not read; there are \['q'.*extract it with sites=\['gate'\]"
    ):
        together.at("gate")


def test_select_takes_the_rows_that_the_stimuli_take(tiny_model, few_passages):
    found = extract_activations(tiny_model("llama"), few_passages)
    chosen = found.select(emotions=["sad", "neutral"], groups=["train", "garden"])
    assert chosen.stimuli == few_passages.select(emotions=["sad", "neutral"], groups=["train", "garden"])
    texts = list(few_passages.texts)
    for row, text in enumerate(chosen.stimuli.texts):
        assert torch.equal(chosen.values[row], found.values[texts.index(text)])
    backwards = found.select(rows=[5, 2])
    assert torch.equal(backwards.values, found.values[[5, 2]])
    assert backwards.stimuli.texts == (texts[5], texts[2])


@pytest.mark.parametrize("keep", ["pooled", "moments"])
def test_saved_activations_come_back_as_they_were(tiny_model, few_passages, tmp_path, keep):
    found = extract_activations(tiny_model("llama"), few_passages, sites=("resid_post", "gate"), keep=keep)
    back = Activations.load(found.save(tmp_path / "saved"))
    for name in ("arrays", "squares", "embedding", "texts_with_sinks"):
        ours, theirs = getattr(found, name), getattr(back, name)
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(found.counts, back.counts)
    for name in ("layers", "stimuli", "n_layers", "pooling", "provenance"):
        assert getattr(found, name) == getattr(back, name)
    with pytest.raises(FileExistsError, match="existing folder"):
        found.save(tmp_path / "saved")


def test_a_spool_folder_holds_the_values_as_memory_mapped_safetensors(tiny_model, few_passages, tmp_path):
    found = extract_activations(tiny_model("llama"), few_passages, spool=tmp_path / "new" / "spool")
    file = tmp_path / "new" / "spool" / "resid_post.safetensors"
    with safe_open(file, framework="np") as tensors:
        np.testing.assert_array_equal(tensors.get_tensor("resid_post"), found.values.numpy())
    assert str(file) in Path("/proc/self/maps").read_text()


def test_without_a_spool_folder_nothing_is_left_in_the_temporary_folder(
    tiny_model, few_passages, tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = extract_activations(tiny_model("llama"), few_passages)
    assert list(tmp_path.iterdir()) == []
    assert found.values.isfinite().all()


def test_a_second_run_into_the_same_spool_folder_does_not_change_the_first_ones_values(tiny_model, tmp_path):
    first = extract_activations(tiny_model("llama"), make_stimuli(STORY), spool=tmp_path)
    before = first.values.clone()
    with contextlib.suppress(FileExistsError, ValueError):  # to refuse would do as well
        extract_activations(tiny_model("llama"), make_stimuli(TEXTS[2]), spool=tmp_path)
    assert torch.equal(first.values, before)


def test_progress_counts_texts_up_to_all(tiny_model, few_passages):
    seen = []
    extract_activations(tiny_model("llama"), few_passages, progress=lambda *n: seen.append(n), batch_tokens=300)
    done = [n for n, _ in seen]
    assert len(seen) > 2
    assert done == sorted(set(done))
    assert seen[-1] == (len(few_passages), len(few_passages))
    assert {total for _, total in seen} == {len(few_passages)}


def test_the_batch_budget_holds_for_padded_tokens(tiny_model, few_passages):
    model, sizes = tiny_model("llama"), []
    handle = model.original_model.base_model.register_forward_pre_hook(
        lambda m, args, kwargs: sizes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    try:
        extract_activations(model, few_passages, batch_tokens=400)
    finally:
        handle.remove()
    assert sum(rows for rows, _ in sizes) == len(few_passages)
    assert all(rows * width <= 400 or rows == 1 for rows, width in sizes)
    assert max(rows for rows, _ in sizes) > 1


def plant_full_disk(monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)


def test_a_full_disk_is_found_before_any_text_is_read(tiny_model, few_passages, tmp_path, monkeypatch):
    plant_full_disk(monkeypatch)
    seen = []
    with pytest.raises(OSError, match=r"received a full disk while writing .*MB free.*spool=") as error:
        extract_activations(tiny_model("llama"), few_passages, spool=tmp_path / "s", progress=lambda *n: seen.append(n))
    assert error.value.errno == errno.ENOSPC
    assert str(tmp_path / "s") in str(error.value)
    assert not seen


@pytest.mark.parametrize("named", [True, False])
def test_a_full_disk_leaves_nothing_half_written_behind(tiny_model, few_passages, tmp_path, monkeypatch, named):
    plant_full_disk(monkeypatch)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    open_before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="nothing half-written was left"):
        extract_activations(tiny_model("llama"), few_passages, spool=tmp_path / "s" if named else None)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    assert len(os.listdir("/proc/self/fd")) == open_before


def plant_nan():
    """NaN in the embedding row of "Z" only, after the self-checks have passed."""
    model = load_model(make_hf_model("llama"), tokenizer=make_tokenizer())
    with torch.no_grad():
        model.original_model.get_input_embeddings().weight[token_ids("Z")[0]] = float("nan")
    return model


def test_activations_that_are_not_finite_are_refused_with_the_text_and_what_to_do():
    with pytest.raises(ValueError, match=r"not finite: resid_post, layer.* 0, text 2, in float32.*dtype=torch.float32"):
        extract_activations(plant_nan(), make_stimuli(STORY * 2, STORY, "Zzz. " + STORY))


def test_refused_activations_leave_no_temporary_files(tmp_path, monkeypatch):
    model = plant_nan()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ValueError, match="not finite"):
        extract_activations(model, make_stimuli("Zzz. " + STORY))
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("prompt", ["", PROMPT])
def test_a_text_beyond_the_context_window_is_refused_before_any_reading(tiny_model, prompt):
    seen, long = [], STORY * 40
    n = len(token_ids(long)) + (len(token_ids(f"<bos>[user] {prompt}\n[assistant] ")) if prompt else 1)
    with pytest.raises(ValueError, match=rf"1 texts beyond the context window of 512 tokens \(row 1 has {n}\).*select"):
        extract_activations(
            tiny_model("llama"), make_stimuli(STORY, long, prompt=prompt), progress=lambda *n: seen.append(n)
        )
    assert not seen


def test_a_text_that_fills_the_context_window_is_read(tiny_model):
    text = next((STORY * 40)[:i] for i in range(1, 5000) if len(token_ids((STORY * 40)[:i])) == 511)
    found = extract_activations(tiny_model("llama"), make_stimuli(text), pooling="last")
    states, _ = hf_states(make_hf_model("llama"), [BOS, *token_ids(text)])
    close(found.values[0], states[:, -1])


@pytest.mark.parametrize(
    ("text", "pooling", "n"), [("Rain.<eos>", "after:50", None), ("<eos><pad>", "mean", 0), ("<eos>", "last", 0)]
)
def test_a_text_too_short_for_its_pooling_is_refused(tiny_model, text, pooling, n):
    n = len(token_ids("Rain.")) if n is None else n
    message = rf"{n} usable tokens in row 1; too short for pooling='{re.escape(pooling)}'"
    with pytest.raises(ValueError, match=message):
        extract_activations(tiny_model("llama"), make_stimuli(STORY * 2, text), pooling=pooling)


@pytest.mark.parametrize("pooling", ["max", "after:", "after:-1", "mean_with_sinks"])
def test_an_unknown_pooling_is_refused_with_the_allowed_ones(tiny_model, pooling):
    with pytest.raises(ValueError, match=rf"received pooling='{pooling}'; allowed are 'mean'.*'after:N'"):
        extract_activations(tiny_model("llama"), make_stimuli(STORY), pooling=pooling)


def test_a_layer_asked_for_twice_is_refused(tiny_model):
    with pytest.raises(ValueError, match=r"received layers \[1, 0, 1\]; allowed is each layer once"):
        extract_activations(tiny_model("llama"), make_stimuli(STORY), layers=[1, 0, 1])


@pytest.mark.parametrize("layers", [[3], [-1], [0, 7], []])
def test_an_unknown_layer_is_refused_with_the_allowed_range(tiny_model, layers):
    with pytest.raises(ValueError, match=rf"received layers {re.escape(str(layers))}; allowed are 0 to 2"):
        extract_activations(tiny_model("llama"), make_stimuli(STORY), layers=layers)


def test_an_unknown_site_is_refused_with_the_allowed_ones(tiny_model):
    with pytest.raises(ValueError, match=r"received site 'resid'; allowed are \['resid_pre'"):
        extract_activations(tiny_model("llama"), make_stimuli(STORY), sites=("resid_post", "resid"))


def test_no_site_at_all_is_refused(tiny_model):
    with pytest.raises(ValueError, match="site"):
        extract_activations(tiny_model("llama"), make_stimuli(STORY), sites=())


def test_activations_print_their_model_counts_and_precision(tiny_model, few_passages):
    found = extract_activations(tiny_model("llama"), few_passages, sites=("resid_post", "gate"))
    assert f"LlamaForCausalLM: {len(few_passages)} texts, mean pooling" in str(found)
    assert "float32, hf numerics, BOS prepended" in str(found)
    assert "<br>" in found._repr_html_()


def test_several_poolings_of_one_reading_are_those_of_readings_of_their_own(tiny_model):
    stimuli = make_stimuli(*TEXTS)
    together = extract_poolings(tiny_model("llama"), stimuli, POOLINGS[:3])
    assert list(together) == list(POOLINGS[:3])
    for pooling, found in together.items():
        alone = extract_activations(tiny_model("llama"), stimuli, pooling=pooling)
        assert torch.equal(found.values, alone.values)
        assert found.pooling == pooling
        assert torch.equal(found.texts_with_sinks["resid_post"], alone.texts_with_sinks["resid_post"])
    for wrong in ((), ("mean", "mean")):
        with pytest.raises(ValueError, match="allowed are one or more different ones"):
            extract_poolings(tiny_model("llama"), stimuli, wrong)


def test_the_forward_pass_ends_after_the_last_layer_that_is_read(tiny_model):
    model, stimuli = tiny_model("llama"), make_stimuli(*TEXTS)
    reached = []
    model.blocks[2].hook_in.add_hook(lambda value, hook: reached.append(2))
    try:
        part = extract_activations(model, stimuli, layers=[1], sites=("resid_post", "gate"))
        assert reached == []
        whole = extract_activations(model, stimuli, sites=("resid_post", "gate"))
        assert reached
    finally:
        model.blocks[2].hook_in.remove_hooks()
    for site in ("resid_post", "gate"):
        assert torch.equal(part.at(site).values[:, 0], whole.at(site).values[:, 1])
    assert not model.blocks[1].hook_out.fwd_hooks
