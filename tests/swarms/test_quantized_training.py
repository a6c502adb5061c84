"""LoRA over servers with weights in few bits learns what it learns over servers in full precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from swarms_help import weights
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from swarm import EMBEDDED_MODEL, AutoDistributedModelForCausalLM
from swarm.server import LocalSwarm

DATA = Path(__file__).parents[2] / "examples" / "data"
NUM_STEPS, BATCH_SIZE = 24, 8
MOST_LOST = 0.03
"""Share of the loss that few bits may cost."""


def read(name: str) -> list[Tensor]:
    """Exchanges as token ids."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    rows = [json.loads(line) for line in (DATA / name).read_text("utf-8").splitlines()]
    texts = [f"Question: {row['question']}\nAnswer: {row['answer']}{tokenizer.eos_token}" for row in rows]
    return [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]


def batch(rows: list[Tensor]) -> dict[str, Tensor]:
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad(rows, batch_first=True)
    mask = pad([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def losses(model_path: str, quantization: str) -> tuple[float, float, float]:
    """Of text that is not trained on before and after, and the mean of the last steps' own; no server is changed."""
    torch.manual_seed(0)
    training, held_out = read("chat_style.jsonl"), batch(read("chat_style_held_out.jsonl"))
    with LocalSwarm(model_path, [(0, 6)], dtype="float32", quantization=quantization, in_process=True) as swarm:
        before = weights(swarm)
        base = AutoDistributedModelForCausalLM.from_pretrained(model_path, join=swarm.link, dtype="float32")
        try:
            config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
            model: Any = get_peft_model(base, config)
            optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=5e-3)
            found = [_evaluate(model, held_out)]
            steps = []
            for _ in range(NUM_STEPS):
                chosen = torch.randperm(len(training))[:BATCH_SIZE].tolist()
                loss = model(**batch([training[number] for number in chosen]), use_cache=False).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                steps.append(loss.item())
            assert weights(swarm) == before
            return found[0], _evaluate(model, held_out), sum(steps[-8:]) / 8
        finally:
            base.close()


@torch.no_grad()
def _evaluate(model: Any, inputs: dict[str, Tensor]) -> float:
    return float(model(**inputs, use_cache=False).loss)


@pytest.fixture(scope="module")
def in_full() -> tuple[float, float, float]:
    return losses(EMBEDDED_MODEL, "none")


def in_nf4(directory: Path) -> str:
    """The embedded model as bitsandbytes saves it in NF4, which it can run on a CPU as well."""
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(
        EMBEDDED_MODEL, dtype=torch.float32, device_map={"": "cpu"}, quantization_config=config
    )
    whole.save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize("quantization", ["int8", "int4", "nf4"])
def test_lora_over_few_bits_reaches_the_loss_of_full_precision(
    in_full: tuple[float, float, float], quantization: str, tmp_path: Path
) -> None:
    if quantization == "nf4" and not torch.cuda.is_available():  # where there is CUDA, servers take it by themselves
        found = losses(in_nf4(tmp_path), "none")
    else:
        found = losses(EMBEDDED_MODEL, quantization)
    print(f"\nnone {in_full}, {quantization} {found}")
    assert in_full[1] < in_full[0] - 1
    for ours, wanted in zip(found[1:], in_full[1:], strict=True):
        assert abs(ours / wanted - 1) < MOST_LOST
