"""From the body of a request to what is to be generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError

from .bodies import MAX_PROMPTS, ChatBody, CompletionBody, EmbeddingBody, Message, Sampled
from .choosing import Sampling
from .errors import bad
from .generation import MAX_ECHO_TOKENS, Engine, Order

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What one request wants."""

    orders: Sequence[Order]
    """One a choice: all choices of the first prompt, then those of the next one; none where no token is wanted."""
    num_choices: int
    stream: bool
    include_usage: bool
    num_prompt_tokens: int
    """Of each prompt once."""
    echoes: Sequence[Sequence[int]] = ()
    """Completions: the prompts that answers are to begin with; the choices of one follow one another."""
    num_top_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads bodies for one model.

    Args:
        chat_template: in place of the tokenizer's; None: that one, if it has one.
    """

    engine: Engine
    chat_template: str | None = None

    def completion(self, body: CompletionBody) -> Job:
        """Raises: ApiError: something in it cannot be."""
        if body.best_of not in (None, body.n or 1):
            raise bad("best_of is not supported: leave it out, or let it be n", "best_of")
        prompts = self._token_lists(body.prompt, "prompt")
        max_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        if max_tokens == 0 and not body.echo:
            raise bad("max_tokens may be 0 only together with echo", "max_tokens")
        if body.echo and body.stream:
            raise bad("echo cannot be streamed: leave out one of them", "echo")
        sampling = self._sampling(body, body.logprobs)
        if body.echo and body.logprobs is not None and max(map(len, prompts)) > MAX_ECHO_TOKENS:
            raise bad(f"a prompt to echo with logprobs may have {MAX_ECHO_TOKENS} tokens", "prompt")
        return self._job(body, prompts, max_tokens, "max_tokens", sampling, echoes=prompts if body.echo else ())

    def chat(self, body: ChatBody) -> Job:
        """Raises: ApiError: something in it cannot be."""
        if body.top_logprobs is not None and not body.logprobs:
            raise bad("top_logprobs needs logprobs to be true", "top_logprobs")
        ids = self._chat_ids(body.messages)
        max_tokens, param = body.max_completion_tokens, "max_completion_tokens"
        if max_tokens is None:
            max_tokens, param = body.max_tokens, "max_tokens"
        sampling = self._sampling(body, (body.top_logprobs or 0) if body.logprobs else None)
        return self._job(body, [ids], max_tokens, param, sampling)

    def embedding(self, body: EmbeddingBody) -> list[list[int]]:
        """The token ids of each input. Raises: ApiError: something in it cannot be."""
        inputs = self._token_lists(body.input, "input")
        for ids in inputs:
            self._check_length(len(ids), 0, "input")
        return inputs

    def _job(
        self, body: Sampled, prompts: Sequence[list[int]], max_tokens: int | None, param: str, sampling: Sampling,
        **more: Any,
    ) -> Job:  # fmt: skip
        if body.stream_options is not None and not body.stream:
            raise bad("stream_options needs stream to be true", "stream_options")
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        orders: list[Order] = []
        for ids in prompts:
            self._check_length(len(ids), 1 if max_tokens is None else max_tokens, param)
            room = self.engine.max_length - len(ids)
            order = Order(
                prompt_ids=ids, max_tokens=room if max_tokens is None else max_tokens, sampling=sampling, stops=stops
            )
            orders += [self._nth(order, number) for number in range(body.n or 1) if order.max_tokens]
        return Job(
            orders=orders,
            num_choices=len(prompts) * (body.n or 1),
            num_top_logprobs=sampling.num_top_logprobs,
            stream=bool(body.stream),
            include_usage=body.stream_options is not None and body.stream_options.include_usage,
            num_prompt_tokens=sum(map(len, prompts)),
            **more,
        )

    def _nth(self, order: Order, number: int) -> Order:
        """The choice with this number: its own random numbers, however many there are beside it."""
        seed = order.sampling.seed
        return order if seed is None else replace(order, sampling=replace(order.sampling, seed=seed + number))

    def _check_length(self, num_prompt_tokens: int, max_tokens: int, param: str) -> None:
        if num_prompt_tokens + max_tokens > self.engine.max_length:
            raise bad(
                f"the prompt has {num_prompt_tokens} tokens and {max_tokens} more are asked for, but prompt and answer "
                f"may have {self.engine.max_length} together",
                param,
                "context_length_exceeded",
            )

    def _sampling(self, body: Sampled, num_top_logprobs: int | None) -> Sampling:
        config = self.engine.model.generation_config

        def default(name: str, otherwise: Any) -> Any:
            """What the model's authors recommend, where they recommend to sample."""
            value = getattr(config, name, None) if config.do_sample else None
            return otherwise if value is None else value

        return Sampling(
            temperature=default("temperature", 1.0) if body.temperature is None else body.temperature,
            top_p=default("top_p", 1.0) if body.top_p is None else body.top_p,
            top_k=default("top_k", 0) if body.top_k is None else body.top_k,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            logit_bias=self._biases(body.logit_bias or {}),
            seed=body.seed,
            num_top_logprobs=num_top_logprobs,
        )

    def _biases(self, given: Mapping[str, float]) -> dict[int, float]:
        try:
            biases = {int(token_id): value for token_id, value in given.items()}
        except ValueError:
            raise bad("the keys of logit_bias must be token ids", "logit_bias") from None
        self._check_ids(biases, "logit_bias")
        return biases

    def _check_ids(self, ids: Any, param: str) -> None:
        if not all(0 <= token_id < self.engine.vocab_size for token_id in ids):
            raise bad(f"token ids must be between 0 and {self.engine.vocab_size - 1}", param)

    def _token_lists(self, given: Any, param: str) -> list[list[int]]:
        """Token ids of each of the texts or lists of token ids that prompt or input may be."""
        if isinstance(given, str):
            prompts: list[Any] = [given]
        elif isinstance(given[0], int):
            prompts = [given]
        else:
            prompts = given
        if len(prompts) > MAX_PROMPTS:
            raise bad(f"at most {MAX_PROMPTS} at a time, got {len(prompts)}", param)
        lists = [self.engine.encode(each, special=True) if isinstance(each, str) else each for each in prompts]
        for ids in lists:
            self._check_ids(ids, param)
            if not ids:
                raise bad("there must be at least one token", param)
        return lists

    def _chat_ids(self, messages: Sequence[Message]) -> list[int]:
        tokenizer = self.engine.tokenizer
        if not (self.chat_template or tokenizer.chat_template):
            raise bad(
                "this model has no chat template: use /v1/completions, or start the API with --chat-template FILE",
                code="no_chat_template",
            )
        try:
            text = tokenizer.apply_chat_template(
                [_plain(message) for message in messages],
                chat_template=self.chat_template,
                add_generation_prompt=True,
                tokenize=False,
            )
        except (TemplateError, ValueError, TypeError, KeyError) as exc:
            raise bad(f"the model's chat template refuses these messages: {exc}", "messages") from exc
        ids = self.engine.encode(text, special=False)
        if not ids:
            raise bad("the messages give no token", "messages")
        return ids


def _plain(message: Message) -> dict[str, Any]:
    """As chat templates expect it."""
    content = message.content
    if not isinstance(content, str):
        content = "".join(part.text for part in content)
    plain = {"role": "system" if message.role == "developer" else message.role, "content": content}
    return plain if message.name is None else plain | {"name": message.name}
