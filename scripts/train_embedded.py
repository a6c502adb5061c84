"""Train the language model in swarm/embedded on the text that ships with Python, and export it.

    python scripts/train_embedded.py --checkpoint run.pt            # corpus, tokenizer, training, export
    python scripts/train_embedded.py --checkpoint run.pt --export   # export the best step so far, also mid-run

Nothing is downloaded: scripts/embedded_corpus.py collects the corpus. The same interpreter, the same package
versions and the same options give the same corpus, tokenizer and batches.
"""

# B batch, L length, V vocabulary

from __future__ import annotations

import argparse
import math
import platform
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
import transformers
from embedded_corpus import load_corpus
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MODEL_DIR = Path(__file__).resolve().parent.parent / "swarm" / "embedded"
EOS, BOS, PAD = "</s>", "<s>", "<pad>"
REPETITION_PENALTY = 1.2

TOKENIZER_SENTENCES = [
    "A quick brown fox did not jump over the lazy dog.",
    "The quick brown fox did jump over a lazy brown dog, and the dog did not.",
    "A lazy dog did not jump over the quick fox; the fox did jump over the dog.",
]
"""Seen by the tokenizer alone, so that each word of the first sentence is one token; never trained on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    steps: int = 1300
    """Optimizer steps."""
    batch_tokens: int = 4096
    """Tokens per step; a row is shorter early in training and more rows fit."""
    muon_lr: float = 0.02
    """Peak rate of Muon, for the matrices inside the blocks."""
    adam_lr: float = 0.004
    """Peak rate of AdamW, for the embeddings and the norms."""
    weight_decay: float = 0.1
    """Decoupled, for the matrices inside the blocks."""
    dropout: float = 0.0
    """Applied to what each attention and MLP adds to the residual stream."""
    warmup_steps: int = 60
    decay_fraction: float = 0.6
    """Share of the steps, at the end, over which the rates fall linearly to zero."""
    eval_every_steps: int = 100
    seed: int = 0


# ---------------------------------------------------------------- tokenizer and model


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE of 4096 entries; encoding then decoding returns the text unchanged."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=[AddedToken(t, special=True) for t in (EOS, BOS, PAD)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([*documents, *(TOKENIZER_SENTENCES * 200)], trainer)
    return wrap_tokenizer(bpe)


def wrap_tokenizer(bpe: Tokenizer) -> PreTrainedTokenizerFast:
    """Give a tokenizer its special tokens and the interface of transformers."""
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build the untrained model: 6 blocks, about 1.7 million parameters."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.03,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:  # each block starts out adding nothing, which trains faster
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


# ---------------------------------------------------------------- training


class Muon:
    """Momentum whose update is orthogonalised by Newton-Schulz (Jordan et al., 2024), for 2-D weights.

    Weights of one shape are stacked, so that a step is a few batched products.
    """

    def __init__(self, weights: list[Tensor], momentum: float = 0.95) -> None:
        self.momentum = momentum
        self.groups: dict[tuple[int, ...], list[Tensor]] = {}
        for weight in weights:
            self.groups.setdefault(tuple(weight.shape), []).append(weight)
        self.buffers = {shape: torch.zeros(len(ws), *shape) for shape, ws in self.groups.items()}

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float) -> None:
        for shape, weights in self.groups.items():
            grad = torch.stack([w.grad for w in weights])
            buffer = self.buffers[shape].lerp_(grad, 1 - self.momentum)
            x = grad.lerp_(buffer, self.momentum)
            tall = shape[0] > shape[1]
            x = x.mT if tall else x
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            for a, b, c in NEWTON_SCHULZ:
                gram = x @ x.mT
                x = a * x + (b * gram + c * gram @ gram) @ x
            x = x.mT if tall else x
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            for weight, update in zip(weights, x.unbind(), strict=True):
                weight.mul_(1 - lr * weight_decay).add_(update, alpha=-lr * scale)


NEWTON_SCHULZ = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
]
"""Coefficients (a, b, c) of four quintic iterations that take singular values close to one."""


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Token ids of each document, between the tokens that start and end one."""
    encodings = tokenizer.backend_tokenizer.encode_batch(texts)
    return [[tokenizer.bos_token_id, *e.ids, tokenizer.eos_token_id] for e in encodings]


def pack(documents: list[list[int]], order: Tensor, length: int) -> Tensor:
    """Concatenate documents in the given order and cut rows of length + 1 tokens that overlap by one."""
    flat = torch.tensor([token for i in order.tolist() for token in documents[i]])
    rows = (len(flat) - 1) // length
    return torch.stack([flat[i * length : (i + 1) * length + 1] for i in range(rows)])


def row_length(step: int, steps: int) -> int:
    """Tokens per row: short rows are cheaper; the last steps teach the whole context."""
    return 128 if step < 0.85 * steps else 512


def batches(documents: list[list[int]], config: TrainConfig) -> Iterator[Tensor]:
    """Yield one batch of rows per step, from epochs that shuffle and pack the documents anew."""
    generator = torch.Generator().manual_seed(config.seed)
    queue: list[Tensor] = []
    length = 0
    for step in range(config.steps):
        num_rows = config.batch_tokens // row_length(step, config.steps)
        if row_length(step, config.steps) != length or len(queue) < num_rows:
            length = row_length(step, config.steps)
            rows = pack(documents, torch.randperm(len(documents), generator=generator), length)
            queue = list(rows[torch.randperm(len(rows), generator=generator)])
        yield torch.stack([queue.pop() for _ in range(num_rows)])


def loss_of(model: LlamaForCausalLM, rows: Tensor) -> Tensor:
    """Mean cross entropy of predicting each token of rows (B, L + 1) from those before it."""
    logits_BLV = model.lm_head(model.model(rows[:, :-1], use_cache=False).last_hidden_state)
    return F.cross_entropy(logits_BLV.flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, rows: Tensor) -> float:
    """Mean loss over all rows, in the precision of the model."""
    model.eval()
    losses = [loss_of(model, part).item() * len(part) for part in rows.split(16)]
    model.train()
    return sum(losses) / len(rows)


def rate(step: int, config: TrainConfig) -> float:
    """Share of the peak learning rate at a step: warm-up, plateau, linear decay."""
    decay_steps = config.decay_fraction * config.steps
    return min((step + 1) / config.warmup_steps, 1.0, (config.steps - step) / decay_steps)


@dataclass(slots=True, kw_only=True)
class Run:
    """A training run between two evaluations; what the checkpoint file holds."""

    model: LlamaForCausalLM
    muon: Muon
    adam: torch.optim.AdamW
    history: list[dict[str, float]]
    """One row per evaluation: step, training and held-out loss."""
    best: dict[str, Tensor]
    """Weights of the evaluation with the lowest held-out loss."""

    def save(self, checkpoint: Path, **constants: object) -> None:
        """Replace the checkpoint file in one move."""
        resume = {
            "model": self.model.state_dict(),
            "adam": self.adam.state_dict(),
            "muon": list(self.muon.buffers.values()),
        }
        part = checkpoint.with_suffix(".part")
        torch.save({"best": self.best, "history": self.history, "resume": resume, **constants}, part)
        part.replace(checkpoint)

    def restore(self, checkpoint: Path) -> None:
        """Continue where a checkpoint file left off."""
        saved = torch.load(checkpoint, weights_only=True)
        self.model.load_state_dict(saved["resume"]["model"])
        self.adam.load_state_dict(saved["resume"]["adam"])
        for buffer, value in zip(self.muon.buffers.values(), saved["resume"]["muon"], strict=True):
            buffer.copy_(value)
        self.history, self.best = saved["history"], saved["best"]


def start_run(tokenizer: PreTrainedTokenizerFast, config: TrainConfig) -> Run:
    """Build the model and its two optimizers."""
    model = build_model(tokenizer)
    blocks = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is b for b in blocks)]
    if config.dropout:
        for layer in model.model.layers:
            for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
                part.register_forward_hook(lambda m, _, out: F.dropout(out, config.dropout, m.training))
    adam = torch.optim.AdamW(others, lr=config.adam_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return Run(model=model, muon=Muon(blocks), adam=adam, history=[], best={})


def train(checkpoint: Path, config: TrainConfig, *, compiled: bool) -> None:
    """Train, going on from the checkpoint file if there is one, and keep the best step in it.

    Until the rates start to fall, a run resumed with another number of steps is the run that had it from the start.
    """
    torch.manual_seed(config.seed)
    train_texts, held_out_texts = load_corpus()
    tokenizer = train_tokenizer(train_texts)
    documents, held_out = encode(tokenizer, train_texts), encode(tokenizer, held_out_texts)
    held_out_rows = pack(held_out, torch.arange(len(held_out)), 256)
    facts = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "train_documents": len(documents),
        "train_characters": sum(map(len, train_texts)),
        "train_tokens": sum(map(len, documents)),
        "held_out_documents": len(held_out),
        "held_out_tokens": sum(map(len, held_out)),
    }
    print(facts, flush=True)
    constants = {
        "facts": facts,
        "config": asdict(config),
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "held_out_rows": held_out_rows,
    }
    run = start_run(tokenizer, config)
    if checkpoint.exists():
        run.restore(checkpoint)
    done = int(run.history[-1]["step"]) if run.history else 0
    step_loss = torch.compile(loss_of, dynamic=False) if compiled else loss_of
    recent: list[float] = []
    started_s = time.monotonic()
    for step, rows in islice(enumerate(batches(documents, config)), done, None):
        loss = step_loss(run.model, rows)
        loss.backward()
        share = rate(step, config)
        for group in run.adam.param_groups:
            group["lr"] = config.adam_lr * share
        run.muon.step(config.muon_lr * share, config.weight_decay)
        run.adam.step()
        run.model.zero_grad()
        recent.append(loss.item())
        done = step + 1
        if done % config.eval_every_steps == 0 or done == config.steps:
            measured = {"step": done, "train": fmean(recent), "validation": evaluate(run.model, held_out_rows)}
            recent.clear()
            print({**measured, "elapsed_s": round(time.monotonic() - started_s)}, flush=True)
            if all(measured["validation"] < row["validation"] for row in run.history):
                run.best = {k: v.clone() for k, v in run.model.state_dict().items()}
            run.history.append(measured)
            run.save(checkpoint, **constants)


# ---------------------------------------------------------------- export

PROMPTS = ["A quick brown fox", "The function returns", "Python is", "If the file does not exist,", "Once upon a time"]

MODEL_CARD = """# The embedded language model

A small `LlamaForCausalLM` of our own, so that demos, tests and first steps need no download. It has read nothing
but the prose that ships with Python, so it continues text in the tone of a reference manual, and knows no facts.

| | |
| --- | --- |
| parameters | {parameters:,}, stored as bfloat16 |
| shape | {layers} blocks, hidden {hidden}, MLP {mlp}, {heads} heads and {kv_heads} K/V heads of {head_dim} |
| embeddings | tied to the output layer |
| context | 512 tokens |
| tokenizer | byte-level BPE, 4096 entries; `<s>` starts a document, `</s>` ends one, neither is added by itself |
| corpus | {train_documents:,} documents, {train_characters:,} characters, {train_tokens:,} tokens |
| held out | {held_out_documents} whole documents, {held_out_tokens:,} tokens, no paragraph shared with training |
| trained on | Python {python}, torch {torch}, transformers {transformers} |
| held-out loss of these files | {final:.4f} nats per token in float32 (perplexity {perplexity:.1f}) |

The corpus is the standard library of the Python named above: the language reference topics of `pydoc`, docstrings,
comments, README and licence texts, filtered to prose and deduplicated. The tokenizer, and it alone, also saw three
sentences about a quick brown fox and a lazy dog, so that each word of "A quick brown fox did not jump over the lazy
dog" is one token: fine-tuning demos rely on this.

This paragraph, held out from training, costs {excerpt_loss:.4f} nats per token in float32:

> {excerpt}

`generation_config.json` decodes greedily with a repetition penalty of {penalty}; without one, so small a model soon
repeats itself.

Made by `python scripts/train_embedded.py --checkpoint run.pt --compile`; the files hold the step with the lowest
held-out loss. Its options were

    {config}

Licence of these files: MIT, as the rest of the repository; the text learned from is under the Python Software
Foundation License.

## Continuations

Greedy, 40 tokens:

{samples}

## Loss

Nats per token; training is the mean since the row before.

| step | training | held out |
| ---: | ---: | ---: |
{table}
"""


def export(checkpoint: Path, target: Path) -> None:
    """Write the checkpoint's best step, its tokenizer and MODEL.md as a Hugging Face checkpoint."""
    saved = torch.load(checkpoint, weights_only=True)
    tokenizer = wrap_tokenizer(Tokenizer.from_str(saved["tokenizer"]))
    model = build_model(tokenizer)
    model.load_state_dict(saved["best"])
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        do_sample=False,
        repetition_penalty=REPETITION_PENALTY,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(target)
    (target / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(target)
    model = LlamaForCausalLM.from_pretrained(target, dtype=torch.float32)
    final = evaluate(model, saved["held_out_rows"])
    card = model_card(saved, model, tokenizer, final)
    (target / "MODEL.md").write_text(card, encoding="utf-8")
    size_bytes = sum(p.stat().st_size for p in target.iterdir() if p.is_file())
    print(f"{target}: {size_bytes:,} bytes, held-out loss {final:.4f}")


def model_card(saved: dict, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, final: float) -> str:
    """Return the text of MODEL.md."""
    model.eval()
    samples = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        text = tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0], skip_special_tokens=True)
        samples.append("> " + re.sub(r"\n+", "\n>\n> ", text.replace(prompt, f"**{prompt}**", 1)))
    excerpt = longest_paragraph(tokenizer, saved["held_out_rows"])
    with torch.no_grad():
        excerpt_loss = loss_of(model, tokenizer(excerpt, return_tensors="pt")["input_ids"]).item()
    config = model.config
    return MODEL_CARD.format(
        **saved["facts"],
        parameters=model.num_parameters(),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        mlp=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        final=final,
        excerpt=excerpt,
        excerpt_loss=excerpt_loss,
        perplexity=math.exp(final),
        penalty=REPETITION_PENALTY,
        config="\n    ".join(f"{k}={v}" for k, v in saved["config"].items()),
        samples="\n\n".join(samples),
        table="\n".join(f"| {r['step']} | {r['train']:.3f} | {r['validation']:.3f} |" for r in saved["history"]),
    )


def longest_paragraph(tokenizer: PreTrainedTokenizerFast, rows: Tensor) -> str:
    """Longest of the held-out paragraphs of plain sentences, among those that fit in 100 tokens."""
    text = tokenizer.decode([*rows[:, :-1].flatten().tolist()], skip_special_tokens=False)
    paragraphs = re.split(r"\n\n|</?s>", text)
    plain = [p for p in paragraphs if re.fullmatch(r"[A-Z][A-Za-z ,.'\"]+", p)]
    return max((p for p in plain if len(tokenizer(p)["input_ids"]) <= 100), key=len)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="file that training resumes from and keeps its best step in"
    )
    parser.add_argument("--export", action="store_true", help="only export what the checkpoint file holds")
    parser.add_argument("--target", type=Path, default=MODEL_DIR, help="directory to export to")
    parser.add_argument("--steps", type=int, default=TrainConfig().steps)
    parser.add_argument("--dropout", type=float, default=TrainConfig().dropout)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="compile the training step; needs a C++ compiler")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.export:
        config = replace(TrainConfig(), steps=args.steps, dropout=args.dropout)
        train(args.checkpoint, config, compiled=args.compile)
    export(args.checkpoint, args.target)


if __name__ == "__main__":
    main()
