"""transformers.Trainer on a distributed model does what it does on the whole one."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import load_local, random_ids
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithFlattening,
    EarlyStoppingCallback,
    EvalPrediction,
    Trainer,
    TrainingArguments,
)

from swarm import AutoDistributedModelForSequenceClassification

TOLERANCE = 1e-4
CURVE_TOLERANCE = 1e-3
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

EXAMPLES = [{"input_ids": row, "labels": row} for row in random_ids(24, 9, seed=5)]
OF_ALL_LENGTHS = [{name: each[:length] for name, each in example.items()} for example, length in zip(
    EXAMPLES, [3 + number * 5 % 7 for number in range(len(EXAMPLES))], strict=True)]  # fmt: skip


def trained(
    model: Any, output: Path, *, dropout: float = 0.0, resume: bool = False, task: str = "CAUSAL_LM",
    given: dict[str, Any] | None = None, **options: Any,
) -> Trainer:  # fmt: skip
    """Train LoRA; given: what else the Trainer takes."""
    torch.manual_seed(0)
    arguments = {
        "output_dir": str(output),
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 5e-3,
        "warmup_steps": 2,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_steps": 4,
        "seed": 3,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    config = LoraConfig(task_type=task, r=4, target_modules=TARGETS, lora_dropout=dropout)
    data = {"train_dataset": EXAMPLES, "eval_dataset": EXAMPLES[:4]}
    trainer = Trainer(
        get_peft_model(model, config), TrainingArguments(**{**arguments, **options}), **{**data, **(given or {})}
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def history(trainer: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_trainer_learns_as_locally(pair: Any, tmp_path: Path) -> None:
    ours, theirs = (trained(model, tmp_path, save_strategy="no") for model in pair)
    for name in ("loss", "eval_loss", "grad_norm"):
        assert history(ours, name) == pytest.approx(history(theirs, name), abs=CURVE_TOLERANCE)
    assert history(ours, "eval_loss")[-1] < history(ours, "loss")[0] - 0.2


def test_trainer_resumes_on_another_client(pair: Any, llama: Any, swarms: Any, tmp_path: Path) -> None:
    whole = trained(pair[0], tmp_path, dropout=0.2)
    shutil.rmtree(tmp_path / "checkpoint-8")
    resumed = trained(swarms.join(llama.swarm, llama.path), tmp_path, dropout=0.2, resume=True)
    assert resumed.state.global_step == 8
    assert history(resumed, "loss") == pytest.approx(history(whole, "loss"), abs=TOLERANCE)
    assert history(resumed, "eval_loss") == pytest.approx(history(whole, "eval_loss"), abs=TOLERANCE)


def assert_same_history(ours: Trainer, theirs: Trainer, *names: str) -> None:
    for name in names:
        found = history(ours, name)
        assert found and found == pytest.approx(history(theirs, name), abs=CURVE_TOLERANCE), name


def test_trainer_with_mixed_precision(pair: Any, tmp_path: Path) -> None:
    found, wanted = (trained(model, tmp_path, max_steps=4, save_strategy="no", bf16=True) for model in pair)
    assert history(found, "loss") == pytest.approx(history(wanted, "loss"), rel=0.02)


def test_trainer_stops_early_and_goes_back_to_the_best(pair: Any, tmp_path: Path) -> None:
    options = {
        "max_steps": 30,
        "gradient_accumulation_steps": 1,
        "learning_rate": 3e-2,
        "lr_scheduler_type": "constant",
        "eval_steps": 2,
        "save_steps": 2,
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
    }
    given = {"callbacks": [EarlyStoppingCallback(early_stopping_patience=2)], "eval_dataset": EXAMPLES[-4:]}
    given["train_dataset"] = EXAMPLES[:4]
    ours, theirs = (
        trained(model, tmp_path / name, given={**given}, **options)
        for model, name in zip(pair, ("ours", "theirs"), strict=True)
    )
    assert ours.state.global_step == theirs.state.global_step < 30
    assert_same_history(ours, theirs, "loss", "eval_loss")
    assert ours.state.best_metric == min(history(ours, "eval_loss")) < history(ours, "eval_loss")[-1]
    assert ours.evaluate()["eval_loss"] == pytest.approx(ours.state.best_metric, abs=TOLERANCE)


def padded(examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch with padding on the right, of sentences or of sentences with a label each."""
    pad, ids = torch.nn.utils.rnn.pad_sequence, [each["input_ids"] for each in examples]
    labels = [each["labels"] for each in examples]
    return {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": pad([torch.ones_like(each) for each in ids], batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=-100) if labels[0].dim() else torch.stack(labels),
    }


@pytest.mark.parametrize("batches", ["of one length", "packed"])
def test_trainer_with_batches_of_sentences_of_all_lengths(pair: Any, tmp_path: Path, batches: str) -> None:
    seen: list[int] = []

    def collate(examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        seen.extend(len(each["input_ids"]) for each in examples)
        return DataCollatorWithFlattening()(examples) if batches == "packed" else padded(examples)

    given = {"data_collator": collate, "train_dataset": OF_ALL_LENGTHS, "eval_dataset": OF_ALL_LENGTHS[:4]}
    options = {"max_steps": 4, "eval_steps": 4, "save_strategy": "no", "per_device_train_batch_size": 4}
    if batches == "of one length":
        options["train_sampling_strategy"] = "group_by_length"
    ours, theirs = (trained(model, tmp_path, given=given, **options) for model in pair)
    assert_same_history(ours, theirs, "loss", "eval_loss", "grad_norm")
    if batches == "of one length":
        assert seen[:8] == sorted(seen[:8], reverse=True)


def num_right(prediction: EvalPrediction) -> dict[str, float]:
    return {"right": float((numpy.argmax(prediction.predictions, axis=-1) == prediction.label_ids).sum())}


def test_trainer_trains_a_classifier_and_computes_metrics(llama: Any, swarms: Any, tmp_path: Path) -> None:
    local = load_local(llama.path, AutoModelForSequenceClassification, num_labels=3)
    remote = swarms.join(llama.swarm, llama.path, AutoDistributedModelForSequenceClassification, num_labels=3)
    remote.score.load_state_dict(local.score.state_dict())
    data = [{**each, "labels": each["input_ids"][0] % 3} for each in OF_ALL_LENGTHS]
    given = {"data_collator": padded, "compute_metrics": num_right, "train_dataset": data, "eval_dataset": data}
    options = {"task": "SEQ_CLS", "save_strategy": "no", "max_steps": 12, "eval_steps": 6, "logging_steps": 6}
    ours, theirs = (trained(model, tmp_path, given=given, **options) for model in (remote, local))
    assert_same_history(ours, theirs, "loss", "eval_loss", "eval_right")
    assert history(ours, "eval_right")[-1] > len(data) / 2
