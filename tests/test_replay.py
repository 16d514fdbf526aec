"""Replayed patches against full forward passes with plain hooks, one patch and one unpadded text at a time."""

import copy

import pytest
import torch
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lens_affect.adapter import add_hooks, run_logits
from lens_affect.models import load_model
from lens_affect.recording import Recording, record
from lens_affect.replay import Patch, Replay, tolerance
from lens_affect.sites import SITES, resolve_site
from tests.pairs import FIRST_DIFFERENCE, LENGTHS, make_pairs
from tests.tiny import _GATED, FAMILIES, make_hf_model, make_tokenizer

EXTRA = {
    "qwen2-sliding": (
        Qwen2ForCausalLM,
        Qwen2Config(**_GATED, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**_GATED, head_dim=16)),
    "gemma": (GemmaForCausalLM, GemmaConfig(**_GATED, head_dim=16)),
    "phi3": (Phi3ForCausalLM, Phi3Config(**_GATED)),
    # four layers of three kinds in turn: sliding, sliding, global, sliding
    "gemma3-global": (
        FAMILIES["gemma3"][0],
        type(FAMILIES["gemma3"][1])(
            **(_GATED | {"num_hidden_layers": 4}),
            head_dim=16,
            sliding_window=8,
            layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
}


@pytest.fixture(scope="module")
def extra_models():
    return {}


@pytest.fixture
def model_of(tiny_model, extra_models):
    def make(family: str):
        if family in FAMILIES:
            return tiny_model(family)
        if family not in extra_models:
            cls, config = EXTRA[family]
            torch.manual_seed(0)
            hf = cls(copy.deepcopy(config)).eval()
            hf.config.architectures = [cls.__name__]
            extra_models[family] = load_model(hf, tokenizer=make_tokenizer())
        return extra_models[family]

    return make


def spans(pair: int, mode: str) -> list[tuple[int, int]]:
    first, length = FIRST_DIFFERENCE[pair], LENGTHS[pair]
    if mode == "last":
        return [(length - 1, length - 1)]
    return [(first, length - 1)] if mode == "all" else [(p, p) for p in range(first, length)]


def denoise(sites, layers, mode: str) -> list[Patch]:
    n = len(LENGTHS)
    return [
        Patch(site, layer, pair + n, pair, first, last)
        for site in sites
        for layer in layers
        for pair in range(n)
        for first, last in spans(pair, mode)
    ]


def available(model) -> list[str]:
    found = []
    for site in SITES:
        try:
            resolve_site(model, site)
        except ValueError:
            continue
        found.append(site)
    return found


def plainly(model, recording: Recording, patch: Patch, *, read: int | None = None) -> torch.Tensor:
    """The patched text's last logits, or its last resid_post at a layer, by definition: two passes of one unpadded text, with one hook each."""
    length = int(recording.lengths[patch.text])
    name = resolve_site(model, patch.site).at(patch.layer)
    text, source = (recording.tokens[row : row + 1, :length] for row in (patch.text, patch.source))
    kept = []
    with add_hooks(model, [(name, lambda activation, hook: kept.append(activation.clone()))]):
        run_logits(model, source, torch.ones_like(source))

    def replace(activation, hook):
        changed = activation.clone()
        changed[:, patch.first : patch.last + 1] = kept[0][:, patch.first : patch.last + 1]
        return changed

    seen = []
    after = (
        [] if read is None else [(resolve_site(model, "resid_post").at(read), lambda x, hook: seen.append(x[0, -1]))]
    )
    with add_hooks(model, [(name, replace), *after]):
        logits = run_logits(model, text, torch.ones_like(text))[0, -1]
    return logits if read is None else seen[0]


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= tolerance(expected, torch.float32)


@pytest.mark.parametrize("family", [*FAMILIES, *EXTRA])
def test_every_site_layer_and_position_gives_the_logits_of_a_full_pass_with_plain_hooks(model_of, family):
    model = model_of(family)
    recording = record(model, *make_pairs())
    sites = available(model)
    assert len(sites) >= (9 if family == "mixtral" else 12)
    replay = Replay(model, recording, sites=sites)
    assert replay.way == "resumed", replay.reason
    layers = range(model.cfg.n_layers)
    # every eleventh of them, so that every site meets several layers, pairs and spans in a few seconds
    patches = (denoise(sites, layers, "last") + denoise(sites, layers, "all"))[::11]
    patches += denoise(sites, [1], "each")[::61]
    found = replay.run(patches)
    assert_close(found, torch.stack([plainly(model, recording, patch) for patch in patches]))
    moved = (found - recording.logits[[patch.text for patch in patches]]).abs().amax(1)
    assert float((moved > 0.01).float().mean()) > 0.5


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gemma3-global", "llama", "qwen2-sliding"])
def test_the_stream_of_a_layer_is_read_as_a_full_pass_with_plain_hooks_shows_it(model_of, family):
    model = model_of(family)
    recording = record(model, *make_pairs())
    sites = ["attn_out", "v", "mlp_out", "resid_mid", "resid_pre", "resid_post"]
    replay = Replay(model, recording, sites=sites, read=1)
    assert replay.way == "resumed", replay.reason
    patches = (denoise(sites, [0, 1], "all") + denoise(sites, [0, 1], "last"))[::5]
    seen = []

    def keep(stream, hook):
        seen.append(stream[0, -1].clone())

    with add_hooks(model, [(resolve_site(model, "resid_post").at(1), keep)]):
        for text, length in zip(recording.tokens, recording.lengths.tolist(), strict=True):
            run_logits(model, text[None, :length], torch.ones(1, length, dtype=torch.long))
    assert_close(replay.unpatched(), torch.stack(seen))
    found = replay.run(patches)
    expected = torch.stack([plainly(model, recording, patch, read=1) for patch in patches])
    assert_close(found, expected)
    assert float((found - replay.unpatched()[[p.text for p in patches]]).abs().max()) > 0.01
    replay.way = "full"
    assert_close(replay.run(patches), expected)
    with pytest.raises(ValueError, match="received a patch at layer 2; allowed are 0 to 1"):
        replay.run([patches[0]._replace(layer=2)])
    with pytest.raises(ValueError, match=r"received read=9; allowed are layers 0 to"):
        Replay(model, recording, sites=sites, read=9)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gemma3", "llama"])
def test_the_logits_of_some_tokens_are_those_among_all(model_of, family):
    model = model_of(family)
    recording = record(model, *make_pairs())
    patches, tokens = denoise(["attn_out", "mlp_out"], [0, 2], "all"), [7, 400, 3]
    whole = Replay(model, recording, sites=["attn_out", "mlp_out"])
    some = Replay(model, recording, sites=["attn_out", "mlp_out"], tokens=tokens)
    assert some.way == "resumed", some.reason
    assert_close(some.run(patches), whole.run(patches)[:, tokens])
    assert_close(some.unpatched(), whole.unpatched()[:, tokens])
    some.way = "full"
    assert_close(some.run(patches), whole.run(patches)[:, tokens])


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "llama"])
def test_full_passes_give_the_same_logits(model_of, family):
    model = model_of(family)
    recording = record(model, *make_pairs())
    sites = available(model)
    replay = Replay(model, recording, sites=sites)
    patches = denoise(sites, [0, 2], "all") + denoise(sites, [1], "last")
    resumed = replay.run(patches)
    replay._give_up("a test")
    assert_close(resumed, replay.run(patches))


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gemma3", "qwen2"])
def test_patching_everything_gives_the_clean_logits(model_of, family):
    model = model_of(family)
    recording = record(model, *make_pairs())
    n = len(LENGTHS)
    first, last = [("resid_pre", 0), ("resid_post", 0)], [("resid_post", model.cfg.n_layers - 1)]
    replay = Replay(model, recording, sites=["resid_pre", "resid_post", "mlp_out"])
    for site, layer in first + last:
        found = replay.run([Patch(site, layer, i + n, i, 0, LENGTHS[i] - 1) for i in range(n)])
        assert_close(found, recording.logits[:n])
    # the stream itself is copied there, so nothing is left to round
    assert torch.equal(found, recording.logits[:n]) or float((found - recording.logits[:n]).abs().max()) < 2e-6


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "llama"])
def test_patching_a_text_with_itself_changes_nothing(model_of, family):
    model = model_of(family)
    recording = record(model, *make_pairs())
    replay = Replay(model, recording, sites=available(model))
    patches = [Patch(s, 1, text, text, 5, 12) for s in available(model) for text in range(2 * len(LENGTHS))]
    found = replay.run(patches)
    assert_close(found, recording.logits[[patch.text for patch in patches]])
    # by the same path, bit by bit: the patch copies what is there
    again = replay.run([patch._replace(site="q") for patch in patches])
    for text in range(2 * len(LENGTHS)):
        rows = [i for i, patch in enumerate(patches) if patch.text == text and not patch.site.startswith("resid_p")]
        assert_close(found[rows], again[rows])


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_processed_weights_are_resumed_too(family):
    model = load_model(make_hf_model(family), tokenizer=make_tokenizer(), compatibility=True)
    recording = record(model, *make_pairs())
    replay = Replay(model, recording, sites=available(model))
    assert replay.way == "resumed", replay.reason
    patches = denoise(available(model), [1], "all")[::5]
    assert_close(replay.run(patches), torch.stack([plainly(model, recording, patch) for patch in patches]))


def test_noise_and_mismatched_sources_come_from_the_same_recording(model_of):
    model = model_of("llama")
    recording = record(model, *make_pairs())
    # clean text 0 patched with corrupted text 4, and with text 2 of the other pair of that length
    patches = [Patch(site, 1, 0, source, 3, 15) for site in ("k", "gate", "resid_post") for source in (4, 2, 6)]
    replay = Replay(model, recording, sites=["k", "gate", "resid_post"])
    assert_close(replay.run(patches), torch.stack([plainly(model, recording, patch) for patch in patches]))


def test_a_patch_gives_the_same_logits_alone_and_in_any_company(model_of):
    model = model_of("gemma3")
    recording = record(model, *make_pairs())
    patches = denoise(["v", "act", "resid_mid", "resid_post"], [0, 1, 2], "all")
    together = Replay(model, recording, sites=["v", "act", "resid_mid", "resid_post"]).run(patches)
    small = Replay(model, recording, sites=["v", "act", "resid_mid", "resid_post"], batch_tokens=1)
    assert_close(small.run(patches[::5]), together[::5])
    assert_close(torch.flip(small.run(patches[:9][::-1]), [0]), together[:9])


def test_what_is_measured_is_kept_for_every_patch_in_its_order(model_of):
    model = model_of("llama")
    recording = record(model, *make_pairs())
    replay = Replay(model, recording, sites=["resid_pre", "resid_post", "up"])
    patches = denoise(["up", "resid_post", "resid_pre"], [1, 0, 2], "all")
    seen = []
    kept = replay.run(
        patches,
        measure=lambda o: torch.stack([o.output[:, 7], o.texts.float()], 1),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert kept.shape == (len(patches), 2)
    assert kept[:, 1].tolist() == [patch.text for patch in patches]
    assert_close(kept[:, 0], replay.run(patches)[:, 7])
    assert seen[-1] == (len(patches), len(patches))


def test_the_host_library_gives_the_same_effects(model_of):
    patching = pytest.importorskip("transformer_lens.patching")
    model = model_of("qwen2")
    tokens, mask = (part[[0, 2, 4, 6], :20] for part in make_pairs())  # its batches know no padding
    recording = record(model, tokens, mask)
    _, cache = model.run_with_cache(tokens[:2])
    host = patching.generic_activation_patch(
        model, tokens[2:], cache, lambda logits: logits[:, -1, 7], patching.layer_pos_patch_setter, "pre", ("layer", "pos"), reduce="none"
    ).values  # fmt: skip
    patches = [Patch("gate", layer, i + 2, i, p, p) for layer in range(3) for p in range(20) for i in range(2)]
    found = Replay(model, recording, sites=["gate"]).run(patches, measure=lambda o: o.output[:, 7])
    assert_close(found.reshape(3, 20, 2), host)


def test_a_model_whose_blocks_cannot_be_resumed_takes_full_passes_and_says_why(tiny_model, monkeypatch, caplog):
    model = tiny_model("llama")
    recording = record(model, *make_pairs())
    patches = denoise(["k", "gate", "resid_mid"], [1], "all")
    resumed = Replay(model, recording, sites=["k", "gate", "resid_mid"]).run(patches)
    # an attention that ignores what stands before the suffix
    monkeypatch.setattr("lens_affect.replay._Prefix.update", lambda self, k, v, layer: (k * 0.5, v))
    replay = Replay(model, recording, sites=["k", "gate", "resid_mid"])
    assert replay.way == "full"
    assert "failed" in replay.reason or "differ" in replay.reason
    assert "full forward passes" in caplog.text
    assert_close(replay.run(patches), resumed)


def test_a_hooked_transformer_takes_full_passes(tiny_model, monkeypatch):
    model = tiny_model("gpt2")
    monkeypatch.setattr("lens_affect.recording.is_bridge", lambda model: False)
    recording = record(model, *make_pairs())
    assert recording.trunk is None
    replay = Replay(model, recording, sites=["v"])
    assert replay.way == "full"
    assert "HookedTransformer" in replay.reason
    patches = denoise(["v"], [1], "all")
    assert_close(replay.run(patches), torch.stack([plainly(model, recording, patch) for patch in patches]))


def test_no_hook_is_left_behind_after_a_run_or_an_error(model_of):
    model = model_of("llama")
    recording = record(model, *make_pairs())
    replay = Replay(model, recording, sites=["gate", "v"])

    def fail(outcome):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        replay.run(denoise(["gate", "v"], [1], "last"), measure=fail)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in model.blocks)
    assert_close(record(model, *make_pairs()).logits, recording.logits)


def test_wrong_patches_and_masks_are_refused_with_the_next_step(model_of):
    model = model_of("llama")
    tokens, mask = make_pairs()
    replay = Replay(model, record(model, tokens, mask), sites=["gate"])
    good = Patch("gate", 1, 4, 0, 3, 5)
    for wrong, message in (
        ({"site": "up"}, "name every site"),
        ({"layer": 3}, "allowed are 0 to 2"),
        ({"text": 8}, "recorded are texts 0 to 7"),
        ({"text": 5}, "counted from the end"),
        ({"last": 20}, "has 0 to 19"),
        ({"first": 6}, "positions 6 to 5"),
    ):
        with pytest.raises(ValueError, match=message):
            replay.run([good._replace(**wrong)])
    with pytest.raises(ValueError, match="one or more"):
        replay.run([])
    with pytest.raises(ValueError, match="pad_right"):
        record(model, tokens, mask.flip(1))


def plainly_changed(model, recording: Recording, patch: Patch) -> float:
    """Relative change of resid_post of the patched layer by definition."""
    length, kept = int(recording.lengths[patch.text]), []
    shift = int(recording.lengths[patch.source]) - length
    name, after = (resolve_site(model, site).at(patch.layer) for site in (patch.site, "resid_post"))
    rows = [recording.tokens[row : row + 1, : int(recording.lengths[row])] for row in (patch.text, patch.source)]

    def put(activation, hook):
        changed = activation.clone()
        changed[:, patch.first : patch.last + 1] = kept[0][:, patch.first + shift : patch.last + 1 + shift]
        return changed

    with add_hooks(model, [(name, lambda activation, hook: kept.append(activation.clone()))]):
        run_logits(model, rows[1], torch.ones_like(rows[1]))
    seen = []
    for hooks in ([], [(name, put)]):
        with add_hooks(model, [*hooks, (after, lambda activation, hook: seen.append(activation.clone()))]):
            run_logits(model, rows[0], torch.ones_like(rows[0]))
    here = slice(patch.first, patch.last + 1)
    relative = (seen[1] - seen[0])[0, here].norm(dim=-1) / seen[0][0, here].norm(dim=-1)
    return float(relative.mean())


@pytest.mark.parametrize("way", ["resumed", "full"])
@pytest.mark.parametrize("family", ["gpt2", "gemma3", "llama"])
def test_the_change_behind_the_patched_layer_is_measured_both_ways(model_of, family, way):
    model = model_of(family)
    recording = record(model, *make_pairs())
    sites = [
        s for s in ("resid_pre", "resid_mid", "resid_post", "v", "attn_out", "gate", "mlp_out") if s in available(model)
    ]
    replay = Replay(model, recording, sites=sites)
    if way == "full":
        replay._give_up("a test")
    patches = denoise(sites, [0, 2], "all") + denoise(sites, [1], "last")
    patches = patches[::7] + [Patch(site, 1, 5, 3, 20, 26) for site in sites]  # a source of another length
    found = replay.run(patches, measure=lambda outcome: outcome.change)
    expected = torch.tensor([plainly_changed(model, recording, p) for p in patches])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("way", ["resumed", "full"])
def test_sources_of_another_length_correspond_counted_from_the_end(model_of, way):
    model = model_of("llama")
    tokens, mask = make_pairs()
    recording = record(model, tokens, mask)
    # Row 1 has 27 tokens. Its copy without the first 7 is a source of 20: where they agree, so must a patch between equals.
    replay = Replay(model, recording, sites=["gate", "k", "resid_post"])
    if way == "full":
        replay._give_up("a test")
    patches = [Patch(site, layer, 5, 0, 22, 26) for site in ("gate", "k", "resid_post") for layer in (0, 1)]
    found = replay.run(patches)
    for patch, logits in zip(patches, found, strict=True):
        name, kept = resolve_site(model, patch.site).at(patch.layer), []
        with add_hooks(model, [(name, lambda activation, hook, kept=kept: kept.append(activation.clone()))]):
            run_logits(model, tokens[:1, :20], mask[:1, :20])

        def put(activation, hook, kept=kept):
            changed = activation.clone()
            changed[:, 22:27] = kept[0][:, 15:20]
            return changed

        with add_hooks(model, [(name, put)]):
            assert_close(logits, run_logits(model, tokens[5:6, :27], mask[5:6, :27])[0, -1])
    with pytest.raises(ValueError, match="source 0 of 20 tokens for the last 22 positions"):
        replay.run([Patch("gate", 0, 5, 0, 5, 26)])


@pytest.mark.parametrize("way", ["resumed", "full"])
@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "z", "gate", "mlp_out"])
def test_an_edit_sees_both_activations_and_where_they_stand(model_of, site, way):
    model = model_of("gemma3")
    recording = record(model, *make_pairs())
    told = []

    def half(own, source, name, layer, texts, from_end):
        told.append((name, layer, own.shape, source.shape, from_end.shape))
        weight = torch.where(from_end == 1, 1.0, 0.5) * (1 + texts[:, None])  # depends on text and place
        return own + weight[:, :, None] * (source - own)

    replay = Replay(model, recording, sites=[site], edits={"half": half})
    if way == "full":
        replay._give_up("a test")
    patches = [Patch(site, 1, pair + 4, pair, FIRST_DIFFERENCE[pair], LENGTHS[pair] - 1, "half") for pair in range(4)]
    found = replay.run(patches)
    assert {t[:2] for t in told} == {(site, 1)}
    name = resolve_site(model, site).at(1)
    for patch, logits in zip(patches, found, strict=True):
        length, kept = LENGTHS[patch.source], []
        text, source = (recording.tokens[row : row + 1, :length] for row in (patch.text, patch.source))
        with add_hooks(model, [(name, lambda activation, hook, kept=kept: kept.append(activation.clone()))]):
            run_logits(model, source, torch.ones_like(source))

        def put(activation, hook, patch=patch, kept=kept, length=length):
            places = torch.arange(patch.first, length)
            weight = torch.where(places == length - 1, 1.0, 0.5) * (1 + patch.text)
            weight = weight.reshape(-1, *[1] * (activation.ndim - 2))
            changed = activation.clone()
            changed[:, places] += weight * (kept[0] - activation)[:, places]
            return changed

        with add_hooks(model, [(name, put)]):
            assert_close(logits, run_logits(model, text, torch.ones_like(text))[0, -1])
    with pytest.raises(ValueError, match=r"the edit 'third'; allowed are \['half'\]"):
        replay.run([patches[0]._replace(edit="third")])
