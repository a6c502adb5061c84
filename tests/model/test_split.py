"""What the two halves promise beyond plain decoding: rewinding, beams, deep prompts, heads, clean parameters."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from exact import LocalCache, generate, open_split, save_tiny, whole_model
from tiny_configs import VOCAB, tiny_config
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
)

from swarm.errors import BadRequest, UnsupportedModel
from swarm.model.anatomy import anatomy_of
from swarm.model.checkpoint import Checkpoint, CheckpointSource
from swarm.model.shadows import RemoteLayers, RemoteTensor
from swarm.model.span import Span, load_span
from swarm.ranges import BlockRange

TYPES = ["llama", "gpt2", "gpt_oss", "qwen3_next"]


class Both:
    """A model whole and cut."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.whole: PreTrainedModel = whole_model(directory)
        self.client, self.chain = open_split(directory)


@pytest.fixture(scope="module", params=TYPES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    return Both(save_tiny(tmp_path_factory.mktemp(request.param), tiny_config(request.param)))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Both:
    return Both(save_tiny(tmp_path_factory.mktemp("llama"), tiny_config("llama")))


def open_span(both: Both, blocks: str, dtype: torch.dtype = torch.float32) -> Span:
    checkpoint = Checkpoint.open(CheckpointSource(str(both.directory)))
    return load_span(checkpoint, BlockRange.parse(blocks), dtype=dtype, device="cpu")


def tokens(batch: int, length: int, seed: int = 3) -> Tensor:
    return torch.randint(2, VOCAB - 1, (batch, length), generator=torch.Generator().manual_seed(seed))


def hidden(batch: int, length: int, span: Span, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, span.hidden_size, generator=generator)


def test_beam_search_equals_local(both: Both) -> None:
    inputs = {"input_ids": tokens(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.int64), "num_beams": 4}
    assert torch.equal(generate(both.client, **inputs), generate(both.whole, **inputs))


def test_sampling_equals_local_under_the_same_seed(both: Both) -> None:
    results = []
    for model in (both.client, both.whole):
        torch.manual_seed(7)
        results.append(generate(model, input_ids=tokens(1, 7), do_sample=True, top_k=20, num_return_sequences=3))
    assert torch.equal(*results)


def test_generating_from_embeddings_equals_local(both: Both) -> None:
    embeddings = both.whole.get_input_embeddings()(tokens(1, 7)).detach()
    assert torch.equal(*(generate(model, inputs_embeds=embeddings) for model in (both.client, both.whole)))


def test_a_cache_continues_where_it_stopped(both: Both) -> None:
    cache = LocalCache()
    first = generate(both.client, input_ids=tokens(1, 7), past_key_values=cache, max_new_tokens=4, min_new_tokens=4)
    assert cache.position == 10
    longer = torch.cat([first, tokens(1, 3, seed=5)], dim=1)
    mask = torch.ones_like(longer)
    ours = generate(both.client, input_ids=longer, attention_mask=mask, past_key_values=cache)
    assert torch.equal(ours, generate(both.whole, input_ids=longer, attention_mask=mask))


def test_forward_uses_a_cache_only_when_asked(llama: Both) -> None:
    ids = tokens(1, 5)
    llama.client(ids)
    assert llama.chain.calls[-1]["cache"] is None
    assert isinstance(llama.client(ids, use_cache=True).past_key_values, LocalCache)
    with pytest.raises(BadRequest, match="DynamicCache"):
        llama.client(ids, past_key_values=DynamicCache())


def test_only_padding_and_unusual_positions_travel(llama: Both) -> None:
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    llama.client(tokens(2, 5), attention_mask=torch.ones_like(mask), position_ids=torch.arange(5).unsqueeze(0))
    assert llama.chain.calls[-1] == {"cache": None, "mask": None, "position_ids": None}
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    llama.client(tokens(2, 5), attention_mask=mask, position_ids=positions)
    assert torch.equal(llama.chain.calls[-1]["mask"], mask)
    assert torch.equal(llama.chain.calls[-1]["position_ids"], positions)


def test_rewound_cache_gives_the_same_as_a_fresh_one(both: Both) -> None:
    for span in both.chain.spans:
        x = hidden(2, 12, span)
        with torch.no_grad():
            expected = span(x)
            cache = span.new_cache(2)
            span(x[:, :8], cache=cache)
            span(hidden(2, 3, span, seed=9), cache=cache)
            cache.rewind(8)
            assert cache.length == 8
            torch.testing.assert_close(span(x[:, 8:], cache=cache), expected[:, 8:], atol=2e-5, rtol=0)
            cache.rewind(0)
            assert cache.num_bytes == 0
            torch.testing.assert_close(span(x, cache=cache), expected, atol=2e-5, rtol=0)


def test_far_rewind_works_or_is_refused_in_words(both: Both) -> None:
    for span in both.chain.spans:
        cache, x = span.new_cache(1), hidden(1, 9, span)
        with torch.no_grad():
            for position in range(9):
                span(x[:, position : position + 1], cache=cache)
        if span.can_rewind:
            cache.rewind(3)
            with torch.no_grad():
                torch.testing.assert_close(span(x[:, 3:], cache=cache), span(x)[:, 3:], atol=2e-5, rtol=0)
        else:
            with pytest.raises(UnsupportedModel, match="linear-attention"):
                cache.rewind(3)
            assert cache.length == 9
        with pytest.raises(BadRequest, match="cannot rewind"):
            cache.rewind(10)


def test_failed_step_leaves_the_cache_as_it_was(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    span = both.chain.spans[1]
    cache, x = span.new_cache(1), hidden(1, 9, span)
    with torch.no_grad():
        expected = span(x)
        span(x[:, :6], cache=cache)
        last = span.layers[-1]
        with monkeypatch.context() as patch:
            patch.setattr(last, "forward", lambda *args, **kwargs: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                span(x[:, 6:], cache=cache)
        assert cache.length == 6
        torch.testing.assert_close(span(x[:, 6:], cache=cache), expected[:, 6:], atol=2e-5, rtol=0)


def test_reordered_cache_follows_its_rows(both: Both) -> None:
    span = both.chain.spans[1]
    x = hidden(3, 8, span)
    order = torch.tensor([2, 0, 2])
    with torch.no_grad():
        cache = span.new_cache(3)
        span(x[:, :5], cache=cache)
        cache.reorder(order)
        out = span(x[order][:, 5:], cache=cache)
        torch.testing.assert_close(out, span(x[order])[:, 5:], atol=2e-5, rtol=0)


def plain_loop(blocks: list[Span], x: Tensor, prompts: Tensor) -> Tensor:
    """The oracle of deep prompts: add, run one block, and so on."""
    for block, prompt in zip(blocks, prompts, strict=True):
        x = block(torch.cat([x[:, : prompt.shape[1]] + prompt, x[:, prompt.shape[1] :]], dim=1))
    return x


def test_deep_prompts_equal_a_plain_loop(llama: Both) -> None:
    span = llama.chain.spans[1]
    x = hidden(2, 6, span).requires_grad_()
    prompts = torch.randn(2, 1, 4, span.hidden_size, requires_grad=True)
    out = span(x, prompts_NBPD=prompts)
    gradients = torch.autograd.grad(out.pow(2).mean(), (x, prompts))
    single = [open_span(llama, f"{number}:{number + 1}") for number in span.blocks]
    oracle = plain_loop(single, x, prompts)
    expected = torch.autograd.grad(oracle.pow(2).mean(), (x, prompts))
    torch.testing.assert_close(out, oracle, atol=1e-5, rtol=0)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_deep_prompts_keep_their_positions_when_a_cache_grows(both: Both) -> None:
    span = both.chain.spans[1]
    x, prompts = hidden(2, 7, span), torch.randn(2, 2, 4, span.hidden_size)
    with torch.no_grad():
        expected = span(x, prompts_NBPD=prompts)
        cache = span.new_cache(2)
        parts = [span(x[:, a:b], cache=cache, prompts_NBPD=prompts) for a, b in ((0, 3), (3, 6), (6, 7))]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "bad", [{"x": (2, 3, 8)}, {"mask": (2, 5)}, {"positions": (3, 3)}, {"prompts": (3, 2, 4, 64)}, {"cache": 3}]
)
def test_shapes_that_do_not_fit_are_refused(llama: Both, bad: dict[str, object]) -> None:
    span = llama.chain.spans[1]
    with pytest.raises(BadRequest):
        span(
            torch.zeros(bad.get("x", (2, 3, 64))),
            cache=span.new_cache(3) if "cache" in bad else None,
            attention_mask_BT=torch.ones(bad["mask"], dtype=torch.int64) if "mask" in bad else None,
            position_ids_BL=torch.zeros(bad["positions"], dtype=torch.int64) if "positions" in bad else None,
            prompts_NBPD=torch.zeros(bad["prompts"]) if "prompts" in bad else None,
        )


def test_cache_bytes_per_token_are_those_of_the_real_tensors(llama: Both) -> None:
    span = llama.chain.spans[1]
    cache = span.new_cache(3)
    with torch.no_grad():
        span(hidden(3, 5, span), cache=cache)
    assert cache.num_bytes == 3 * 5 * span.cache_bytes_per_token() == 3 * 5 * 2 * 2 * 2 * 16 * 4


def test_client_is_the_library_class_and_owns_no_block_weight(both: Both) -> None:
    assert isinstance(both.client, type(both.whole)) and isinstance(both.client, GenerationMixin)
    assert both.client.config.num_hidden_layers == 4
    ours = dict(both.client.named_parameters())
    assert ours and not [name for name in both.client.state_dict() if ".0." in name]
    assert all(parameter.device.type == "cpu" for parameter in ours.values())
    names = {name for name, _ in both.client.named_modules()}
    assert {name for name, _ in both.whole.named_modules()} <= names
    both.client.to(torch.float32)
    assert "0:" not in repr(both.client) and type(both.whole).__name__ in repr(both.client)


def test_shadows_have_the_shapes_of_the_real_weights(llama: Both) -> None:
    layers = llama.client.model.layers
    assert isinstance(layers, RemoteLayers) and len(layers) == 4
    shadow = llama.client.get_submodule("model.layers.2.self_attn.q_proj")
    assert isinstance(shadow, torch.nn.Linear) and isinstance(shadow.weight, RemoteTensor)
    assert shadow.weight.shape == llama.whole.model.layers[2].self_attn.q_proj.weight.shape


def test_embeddings_train_through_the_call(both: Both) -> None:
    ids, grads = tokens(2, 6), []
    for model in (both.client, both.whole):
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        grads.append(model.get_input_embeddings().weight.grad.clone())
        model.zero_grad()
    torch.testing.assert_close(*grads, atol=1e-5, rtol=0)


def test_base_model_equals_local(llama: Both) -> None:
    client, _ = open_split(llama.directory, auto_class=AutoModel)
    with torch.no_grad():
        ours, theirs = (model(tokens(2, 6)).last_hidden_state for model in (client, llama.whole.model))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_classifier_without_a_head_gets_a_new_one(llama: Both) -> None:
    client, _ = open_split(llama.directory, auto_class=AutoModelForSequenceClassification, num_labels=3)
    assert client.score.weight.shape == (3, 64) and bool(client.score.weight.isfinite().all())
    client(tokens(2, 6), labels=torch.tensor([0, 2])).loss.backward()
    assert client.score.weight.grad is not None


def test_classifier_with_a_saved_head_equals_local(tmp_path: Path) -> None:
    config = tiny_config("llama")
    config.num_labels = 3
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    client, _ = open_split(tmp_path, auto_class=AutoModelForSequenceClassification)
    whole = whole_model(tmp_path, AutoModelForSequenceClassification)
    with torch.no_grad():
        torch.testing.assert_close(client(tokens(2, 6)).logits, whole(tokens(2, 6)).logits, atol=1e-5, rtol=0)


def test_tied_head_stays_tied(tmp_path: Path) -> None:
    config = tiny_config("llama")
    config.tie_word_embeddings = True
    client, _ = open_split(save_tiny(tmp_path, config))
    assert client.lm_head.weight is client.model.embed_tokens.weight
    ids = tokens(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(client(ids).logits, whole_model(tmp_path)(ids).logits, atol=1e-5, rtol=0)


def test_threads_do_not_see_each_others_masks(llama: Both) -> None:
    masks = [torch.tensor([[0] * n + [1] * (8 - n)]) for n in range(4)]
    results: dict[int, Tensor] = {}

    def run(number: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                results[number] = llama.client(tokens(1, 8), attention_mask=masks[number]).logits

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, mask in enumerate(masks):
        expected = llama.whole(tokens(1, 8), attention_mask=mask).logits
        torch.testing.assert_close(results[number][:, number:], expected[:, number:], atol=1e-5, rtol=0)


def test_bfloat16_span_runs_and_returns_bfloat16(llama: Both) -> None:
    span = open_span(llama, "1:3", dtype=torch.bfloat16)
    out = span(hidden(1, 4, span))
    assert out.dtype == torch.bfloat16 == span.dtype
    inv_freq = span.model.rotary_emb.inv_freq
    assert inv_freq.dtype == torch.float32 and torch.equal(inv_freq, llama.whole.model.rotary_emb.inv_freq)


def test_auto_class_of_another_kind_is_refused(llama: Both) -> None:
    with pytest.raises(UnsupportedModel, match="AutoModelForMaskedLM"):
        open_split(llama.directory, auto_class=AutoModelForMaskedLM)
    assert issubclass(type(llama.client), AutoModelForCausalLM._model_mapping[type(llama.client.config)])


def test_longrope_limits_sessions_to_where_its_frequencies_do_not_change() -> None:
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    config = tiny_config("phi3")
    config.max_position_embeddings, config.original_max_position_embeddings = 64, 16
    config.rope_parameters = {**factors, "rope_theta": 1e4, "original_max_position_embeddings": 16}
    assert anatomy_of(config).max_session_tokens == 16
    assert anatomy_of(tiny_config("phi3")).max_session_tokens is None


def test_dynamic_rotary_embeddings_are_refused() -> None:
    config = tiny_config("llama")
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(UnsupportedModel, match="dynamic rotary"):
        anatomy_of(config)
