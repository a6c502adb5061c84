"""Servers with weights in 8 or 4 bits: text, gradients, what is announced, and what a trained model loses."""

from __future__ import annotations

import pytest
import torch
from tiny import load_local, random_ids
from transformers import AutoModelForCausalLM, AutoTokenizer

from swarm import EMBEDDED_MODEL, AutoDistributedModelForCausalLM
from swarm.errors import BadRequest, ResourceError
from swarm.model.weight_only import WeightOnlyLinear
from swarm.server import LocalSwarm

TEXT = (
    "The function returns the number of items in the list. If the list is empty, it returns zero. "
    "This is useful when you want to know how many values have been read from a file."
)

LOSS_TOLERANCE = {"int8": 0.01, "int4": 0.15}
"""What rounding may add to the loss of the embedded model, in nats per token."""


def local_twin(swarm: LocalSwarm, path: str):
    """The model in this process, with the weights that the servers rounded to."""
    local = load_local(path)
    for server in swarm.servers:
        span = server.running.sessions.views.span
        for index, number in enumerate(span.blocks):
            for name, module in span.layers[index].named_modules():
                if isinstance(module, WeightOnlyLinear):
                    local.model.layers[number].get_submodule(name).weight.data.copy_(module.weight)
    return local


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_text_and_gradients_are_those_of_the_rounded_weights(tiny_model, quantization):
    path = str(tiny_model("llama", intermediate_size=128))
    ranges = [(0, 2), (2, 6)]
    with LocalSwarm(path, ranges, dtype="float32", quantization=quantization, in_process=True) as swarm:
        local = local_twin(swarm, path)
        remote = AutoDistributedModelForCausalLM.from_pretrained(path, join=swarm.link).eval()
        try:
            assert {hop.server.quantization for hop in remote.explain_route()} == {quantization}
            ids = random_ids(2, 9)
            with torch.no_grad():
                ours, theirs = remote(ids).logits, local(ids).logits
            assert (ours - theirs).abs().max() <= 5e-3 * theirs.std()
            tokens = [model.generate(ids, max_new_tokens=8, do_sample=False) for model in (remote, local)]
            assert torch.equal(*tokens)
            for model in (remote, local):
                model(ids, labels=ids).loss.backward()
            gradients = [model.get_input_embeddings().weight.grad for model in (remote, local)]
            assert (gradients[0] - gradients[1]).abs().max() <= 1e-2 * gradients[1].abs().max()
        finally:
            remote.close()


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_trained_model_loses_little(quantization):
    ids = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)(TEXT, return_tensors="pt")["input_ids"]
    local = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32)
    with LocalSwarm(EMBEDDED_MODEL, [(0, 6)], dtype="float32", quantization=quantization, in_process=True) as swarm:
        remote = AutoDistributedModelForCausalLM.from_pretrained(EMBEDDED_MODEL, join=swarm.link, dtype="float32")
        try:
            with torch.no_grad():
                losses = [float(model(ids, labels=ids).loss) for model in (remote, local)]
        finally:
            remote.close()
    assert abs(losses[0] - losses[1]) < LOSS_TOLERANCE[quantization]


def test_a_server_in_a_process_of_its_own_takes_the_flag():
    with LocalSwarm(EMBEDDED_MODEL, [(0, 6)], quantization="int4") as swarm:
        remote = AutoDistributedModelForCausalLM.from_pretrained(EMBEDDED_MODEL, join=swarm.link)
        try:
            assert remote.explain_route()[0].server.quantization == "int4"
            assert remote.generate(random_ids(1, 5), max_new_tokens=3).shape == (1, 8)
            assert "with weights in int4" in " ".join(swarm.servers[0].log.split())
        finally:
            remote.close()


@pytest.mark.parametrize(
    "quantization, error, sentence",
    [("int3", BadRequest, "quantization must be one of"), ("nf4", ResourceError, "nf4 runs on cuda, not on cpu")],
)
def test_what_cannot_be_had_is_refused(tiny_model, quantization, error, sentence):
    swarm = LocalSwarm(str(tiny_model()), [(0, 2)], quantization=quantization, in_process=True)
    with pytest.raises(error, match=sentence), swarm:
        pass
