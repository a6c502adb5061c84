"""Compare a model cut into three spans and a client half with the whole model: same logits, tokens, gradients."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from tiny_configs import VOCAB, tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from swarm.model.checkpoint import Checkpoint, CheckpointSource
from swarm.model.client_half import load_client_half
from swarm.model.prefixes import ModelPrefix
from swarm.model.remote_cache import RemoteCache
from swarm.model.span import Span, load_span
from swarm.model.span_cache import SpanCache
from swarm.ranges import BlockRange

RANGES = ("0:1", "1:3", "3:4")
NUM_TOKENS = 16


class LocalCache(RemoteCache):
    """A RemoteCache whose remote caches lie in the same process."""

    def __init__(self) -> None:
        super().__init__()
        self.caches: list[SpanCache] = []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for cache in self.caches:
            cache.reorder(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        for cache in self.caches:
            cache.rewind(self.position)


@dataclass
class SpanChain:
    """A RemoteCall that runs spans one after the other."""

    spans: list[Span]
    calls: list[dict[str, object]] = field(default_factory=list)

    def __call__(
        self,
        x_BLD: Tensor,
        *,
        cache: RemoteCache | None,
        attention_mask_BT: Tensor | None,
        position_ids_BL: Tensor | None,
        prefix: ModelPrefix | None,
    ) -> Tensor:
        self.calls.append({"cache": cache, "mask": attention_mask_BT, "position_ids": position_ids_BL})
        caches: list[SpanCache | None] = [None] * len(self.spans)
        if cache is not None:
            assert isinstance(cache, LocalCache)
            cache.caches = cache.caches or [span.new_cache(x_BLD.shape[0]) for span in self.spans]
            caches = list(cache.caches)
        for span, span_cache in zip(self.spans, caches, strict=True):
            x_BLD = span(x_BLD, cache=span_cache, attention_mask_BT=attention_mask_BT, position_ids_BL=position_ids_BL)
        return x_BLD


def save_tiny(directory: Path, config: PretrainedConfig, seed: int = 0, **save_kwargs: object) -> Path:
    """Save a random model; every weight is disturbed, so that none has a value that hides its absence."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(directory, **save_kwargs)
    return directory


def open_split(
    directory: Path, ranges: tuple[str, ...] = RANGES, auto_class: type = AutoModelForCausalLM, **kwargs: object
) -> tuple[PreTrainedModel, SpanChain]:
    """Load the client half and the spans of a checkpoint, chained in this process."""
    checkpoint = Checkpoint.open(CheckpointSource(str(directory)))
    spans = [load_span(checkpoint, BlockRange.parse(r), dtype=torch.float32, device="cpu") for r in ranges]
    chain = SpanChain(spans)
    client = load_client_half(auto_class, checkpoint, chain, dtype=torch.float32, **kwargs)
    client.new_remote_cache = LocalCache
    return client, chain


def whole_model(directory: Path, auto_class: type = AutoModelForCausalLM) -> PreTrainedModel:
    return auto_class.from_pretrained(directory, dtype=torch.float32).eval()


def generate(model: PreTrainedModel, **kwargs: object) -> Tensor:
    options = {"max_new_tokens": NUM_TOKENS, "min_new_tokens": NUM_TOKENS, "do_sample": False, "pad_token_id": 0}
    return model.generate(**{**options, **kwargs})


@dataclass
class Comparison:
    """How far a cut model is from the whole one."""

    logits_error: float
    padded_logits_error: float
    gradient_error: float
    same_tokens: bool
    same_padded_tokens: bool
    can_rewind: bool

    @property
    def exact(self) -> bool:
        return (
            max(self.logits_error, self.padded_logits_error) <= 1e-5
            and self.gradient_error <= 1e-4
            and self.same_tokens
            and self.same_padded_tokens
        )


def compare(model_type: str, directory: Path) -> Comparison:
    """Cut the tiny model of a type 0:1, 1:3, 3:4 and compare it with the whole."""
    save_tiny(directory, tiny_config(model_type))
    whole = whole_model(directory)
    client, chain = open_split(directory)
    input_ids = torch.randint(2, VOCAB - 1, (2, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(input_ids)
    mask[0, :4] = 0
    with torch.no_grad():
        logits = [model(input_ids=input_ids, use_cache=False).logits for model in (client, whole)]
        padded = [model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits for model in (client, whole)]
    tokens = [generate(model, input_ids=input_ids, attention_mask=torch.ones_like(mask)) for model in (client, whole)]
    padded_tokens = [generate(model, input_ids=input_ids, attention_mask=mask) for model in (client, whole)]
    gradients = [_gradient(model, input_ids) for model in (client, whole)]
    seen = mask.bool()
    return Comparison(
        logits_error=_error(*logits),
        padded_logits_error=_error(*(each[seen] for each in padded)),
        gradient_error=_error(*gradients),
        same_tokens=torch.equal(*tokens),
        same_padded_tokens=torch.equal(*padded_tokens),
        can_rewind=all(span.can_rewind for span in chain.spans),
    )


def _gradient(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    embeddings = model.get_input_embeddings()(input_ids).detach().requires_grad_()
    # times one: some models write into what they are given, which a leaf does not allow
    model(inputs_embeds=embeddings * 1, use_cache=False).logits.float().pow(2).mean().backward()
    assert embeddings.grad is not None
    model.zero_grad()
    return embeddings.grad


def _error(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape or not torch.isfinite(theirs).all():
        return float("inf")
    return float((ours - theirs).abs().max())
