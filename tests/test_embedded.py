"""The embedded model is small, loads like any Hugging Face checkpoint, and reads as English."""

import ast
import json
import logging
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from swarm.embedded import EMBEDDED_MODEL

SENTENCE = "A quick brown fox did not jump over the lazy dog"
PROMPT, CONTINUATION = "A quick brown fox", " did not jump over the lazy dog"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Products this small are slower on several threads."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


@pytest.fixture
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32).eval()


def loss_of(model: LlamaForCausalLM, input_ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=input_ids, labels=input_ids, use_cache=False).loss


def test_all_files_fit_in_eight_megabytes() -> None:
    files = [p for p in Path(EMBEDDED_MODEL).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in files) <= 8_000_000


def test_loads_offline_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("loading opened a connection"))
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
            model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL)
            model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=2)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert [r.getMessage() for r in records] == []


def test_is_an_ordinary_llama_whose_blocks_divide_among_three_servers(model: LlamaForCausalLM) -> None:
    assert type(model) is LlamaForCausalLM
    assert model.config.num_hidden_layers % 3 == 0
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert json.loads((Path(EMBEDDED_MODEL) / "config.json").read_text())["dtype"] == "bfloat16"
    assert not model.generation_config.do_sample


@pytest.mark.parametrize(
    "text",
    [
        SENTENCE,
        "  two\tspaces \n\n\n and lines \r\n",
        "naïve café — 日本語 🦊",
        "if x<=1_000: return 'a'  # </b>",
        "",
        "\x00\x7f",
    ],
)
def test_encoding_then_decoding_returns_the_text(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_are_distinct_and_in_the_configuration(tokenizer, model: LlamaForCausalLM) -> None:
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert len(set(ids)) == 3
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == ids
    assert len(tokenizer) == model.config.vocab_size


def test_each_word_of_the_demo_sentence_is_one_token(tokenizer) -> None:
    assert [tokenizer.decode([i]) for i in tokenizer(CONTINUATION)["input_ids"]] == re.findall(r" \w+", CONTINUATION)
    assert [tokenizer.decode([i]) for i in tokenizer(SENTENCE)["input_ids"]] == ["A", *re.findall(r" \w+", SENTENCE)]


def test_tuning_embeddings_and_norm_teaches_the_demo_sentence(tokenizer, model: LlamaForCausalLM) -> None:
    model.requires_grad_(False)
    tuned = [model.get_input_embeddings().weight, model.model.norm.weight]
    optimizer = torch.optim.Adam([p.requires_grad_() for p in tuned], lr=1e-3)
    input_ids = tokenizer(SENTENCE, return_tensors="pt")["input_ids"]
    for _ in range(100):
        loss = loss_of(model, input_ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    prompt = tokenizer(PROMPT, return_tensors="pt")
    for penalty in (model.generation_config.repetition_penalty, 1.0):
        output = model.generate(**prompt, max_new_tokens=7, do_sample=False, repetition_penalty=penalty)
        assert tokenizer.decode(output[0]) == SENTENCE


def test_held_out_paragraph_of_the_model_card_costs_what_the_card_says(tokenizer, model: LlamaForCausalLM) -> None:
    card = (Path(EMBEDDED_MODEL) / "MODEL.md").read_text(encoding="utf-8")
    match = re.search(r"costs (\d+\.\d+) nats per token[^\n]*\n\n> ([^\n]+)\n", card)
    assert match is not None
    with torch.no_grad():
        loss = loss_of(model, tokenizer(match[2], return_tensors="pt")["input_ids"]).item()
    assert loss == pytest.approx(float(match[1]), abs=0.01)
    assert loss < MAX_HELD_OUT_LOSS


MAX_HELD_OUT_LOSS = 5.0
"""Nats per token; a uniform guess over the vocabulary costs 8.3."""


@pytest.mark.parametrize("prompt", [PROMPT, "The function returns", "Python is", "If the file does not exist,"])
def test_continuation_consists_of_words(tokenizer, model: LlamaForCausalLM, known_words: set[str], prompt: str) -> None:
    inputs = tokenizer(prompt, return_tensors="pt")
    torch.manual_seed(0)
    for options in ({}, {"do_sample": True, "temperature": 0.7, "top_k": 40}):
        output = model.generate(**inputs, max_new_tokens=60, **options)[0, inputs["input_ids"].shape[1] :]
        words = re.findall(r"(?<!\S)[A-Za-z]+(?!\S)", tokenizer.decode(output[:-1], skip_special_tokens=True))
        assert len(words) >= 10
        assert sum(w.lower() in known_words for w in words) >= 0.9 * len(words)


@pytest.fixture(scope="module")
def known_words() -> set[str]:
    """Words of the language reference and of the docstrings of the standard library's top-level modules."""
    return {word.lower() for text in texts_of_python() for word in re.findall(r"[A-Za-z]+", text)}


def texts_of_python() -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from topics.values()
    for path in Path(sysconfig.get_paths()["stdlib"]).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield ast.get_docstring(node) or ""
