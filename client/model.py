"""What a distributed model adds to the Hugging Face class that it is: sessions, remote blocks, prompts."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from swarm.announcement import AdapterListing
from swarm.errors import BadRequest
from swarm.model.adapters import ModelAdapter, frozen, undropped
from swarm.model.client_half import num_virtual_tokens
from swarm.model.prefixes import ModelPrefix, with_prefix
from swarm.model.remote_cache import RemoteCache
from swarm.ranges import BlockRange

from .blocks import RemoteBlocks
from .caches import DEFAULT_SESSION_TOKENS, DeferredCache, SessionCache
from .chain import ChainConfig
from .compute import RemoteCompute
from .connection import Connection
from .drafts import AdaptiveDrafts
from .hosted import check_one_way
from .prompts import Prompts
from .restarts import Tainted, until_untainted
from .routing import ExplainedRoute, Needs
from .session import InferenceSession
from .uploads import names_of

# B batch, L new tokens, T cached and new tokens, D hidden, P virtual tokens

OPEN_TIMEOUT_S = 2.0
"""How long one server may let us wait for room; another one may have some."""


class _ActiveSession(InferenceSession):
    """A session of a model; inside its `with` block, the model's `generate` continues it."""

    active: list[InferenceSession]

    def __enter__(self) -> InferenceSession:
        self.active.append(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.active.remove(self)
        self.close()


class _ThreadState(threading.local):
    """What belongs to the calls of one thread."""

    def __init__(self) -> None:
        self.sessions: list[InferenceSession] = []
        self.may_restart = False
        """Whether a generation that begins again would not be noticed."""
        self.generating: list[SessionCache] = []
        """The caches of the calls of `generate` that are under way."""
        self.num_outputs: int | None = None
        self.through: nn.Module | None = None
        """What runs in place of all remote blocks."""


@dataclass(slots=True)
class SwarmCall:
    """Runs hidden states through all remote blocks: through a session where there is a cache, else statelessly."""

    connection: Connection
    needs: Needs
    hidden_size: int
    blocks: RemoteBlocks
    prompts: Prompts | None = None
    adapters: Callable[[], ModelAdapter | None] = lambda: None
    """Says what is changed in the blocks: asked for each stateless call, and when a session opens."""
    hosted: AdapterListing | None = None
    """The hosted adapter to use instead, where a session does not say another."""
    state: _ThreadState = field(default_factory=_ThreadState)

    def __call__(
        self,
        x_BLD: Tensor,
        *,
        cache: RemoteCache | None,
        attention_mask_BT: Tensor | None,
        position_ids_BL: Tensor | None,
        prefix: ModelPrefix | None = None,
    ) -> Tensor:
        """See swarm.model.client_half.RemoteCall."""
        if prefix is not None and self.prompts is not None:
            raise BadRequest("tuning_mode and prefix tuning cannot be used together: choose one of them")
        length = x_BLD.shape[1]
        mask_BL = None if attention_mask_BT is None else attention_mask_BT[:, -length:]
        if position_ids_BL is not None:
            position_ids_BL = position_ids_BL.expand(x_BLD.shape[0], -1)
        if cache is not None:
            assert isinstance(cache, SessionCache)
            cache.mask_BT = attention_mask_BT if attention_mask_BT is not None else cache.mask_BT
            if not (isinstance(cache, DeferredCache) and cache.is_empty):
                return self._cached(x_BLD, cache, mask_BL, position_ids_BL)
        y_BLD = self._stateless(x_BLD, mask_BL, position_ids_BL, with_prefix(self.adapters(), prefix))
        if isinstance(cache, DeferredCache):
            cache.hold(x_BLD, mask_BL, position_ids_BL)
        return y_BLD

    def _stateless(
        self,
        x_BLD: Tensor,
        mask_BL: Tensor | None,
        position_ids_BL: Tensor | None,
        adapters: ModelAdapter | None,
    ) -> Tensor:
        blocks = self.blocks if self.state.through is None else self.state.through
        prompts, changes = self.prompts, {"adapters": adapters, "active_adapter": self.hosted}
        if prompts is None:
            y_BLD: Tensor = blocks(x_BLD, attention_mask=mask_BL, position_ids=position_ids_BL, **changes)
            return y_BLD
        y_BLD = blocks(
            prompts.prepend(x_BLD),
            attention_mask=prompts.prepend_mask(mask_BL),
            position_ids=prompts.prepend_position_ids(position_ids_BL),
            prompts=prompts.deep_NBPD,
            **changes,
        )
        return y_BLD[:, prompts.pre_seq_len :]

    def _cached(
        self, x_BLD: Tensor, cache: SessionCache, mask_BL: Tensor | None, position_ids_BL: Tensor | None
    ) -> Tensor:
        adapters = with_prefix(self.adapters(), cache.prefix) if torch.is_grad_enabled() else None
        if torch.is_grad_enabled() and (x_BLD.requires_grad or _are_trained(adapters)):
            raise BadRequest(
                "gradients do not flow through a session's cache: call the model with use_cache=False to train it, "
                "or under torch.no_grad() to generate"
            )
        self.refuse_between()
        length = x_BLD.shape[1]
        if mask_BL is not None and bool(mask_BL.all()):
            mask_BL = None
        num_outputs = min(length, self.state.num_outputs or length)
        y_BLD = cache.session.step(
            x_BLD,
            attention_mask=mask_BL,
            position_ids=position_ids_BL,
            beam_idx=cache.take_beam_idx(),
            num_outputs=num_outputs,
        )
        if self.state.may_restart and cache.session.take_tainted():
            raise Tainted
        if num_outputs == length:
            return y_BLD
        # The head looks at the last positions only; the others are not fetched.
        return torch.cat([y_BLD.new_zeros(y_BLD.shape[0], length - num_outputs, y_BLD.shape[2]), y_BLD], dim=1)

    def refuse_between(self) -> None:
        """Raise BadRequest where a session would leave out the module that runs in place of the blocks."""
        if self.state.through is not None:
            raise BadRequest(
                "a session's tokens go from server to server, so nothing of yours can run between the blocks: call the "
                "model with use_cache=False inside run_through"
            )

    @property
    def num_virtual_tokens(self) -> int:
        return 0 if self.prompts is None else self.prompts.pre_seq_len


class DistributedMixin:
    """What every distributed model can do beside what its Hugging Face class can."""

    _swarm: SwarmCall

    @property
    def remote_blocks(self) -> RemoteBlocks:
        """The remote blocks as a differentiable module; slices of it are modules too."""
        return self._swarm.blocks

    @contextmanager
    def run_through(self, module: nn.Module) -> Iterator[None]:
        """Inside, run a module of your own in place of all remote blocks, in this thread: embeddings before it, norm
        and head after it are the model's.

        Args:
            module: made of slices of `remote_blocks` and of what is to happen between them. It is called with hidden
                states [B, L, D] and the keyword arguments that each slice takes: hand them on as they are.
        """
        state = self._swarm.state
        outer, state.through = state.through, module
        try:
            yield
        finally:
            state.through = outer

    @property
    def hosted_adapter(self) -> AdapterListing | None:
        """The hosted adapter in use; None: none."""
        return self._swarm.hosted

    def use_adapter(self, name: str | None) -> None:
        """Use an adapter that servers host, from the next call and the next session on; None: none.

        The name means one adapter from then on: servers that host another one under it are not used.

        Args:
            name: as `swarm status` shows it; NAME@DIGEST to choose among several of one name.
        Raises: BadRequest: no server has it.
        """
        self._swarm.hosted = self._swarm.blocks.find_adapter(name)

    def inference_session(
        self,
        max_length: int = DEFAULT_SESSION_TOKENS,
        *,
        batch_size: int | None = None,
        active_adapter: str | None = None,
    ) -> Any:
        """Open a decoding session of at most `max_length` tokens per sequence, virtual tokens not counted.

        Inside its `with` block, every call of `generate` continues it, with the adapter that it was opened with.

        Args:
            active_adapter: name of one that servers host; None: that of the model, if it has one; "": none.
        Raises: BadRequest: no server has it, or the model has adapters of its own.
        """
        swarm = self._swarm
        swarm.refuse_between()
        if max_length < 1:
            raise BadRequest(f"max_length must be at least 1, got {max_length}")
        max_tokens = max_length + swarm.num_virtual_tokens
        deep = None if swarm.prompts is None else swarm.prompts.deep_NBPD
        hosted = swarm.hosted if active_adapter is None else swarm.blocks.find_adapter(active_adapter or None)
        adapters = frozen(undropped(swarm.adapters()))
        check_one_way(adapters, hosted)
        config = ChainConfig(
            fingerprint=swarm.needs.fingerprint,
            batch_size=batch_size or 1,
            max_tokens=max_tokens,
            hidden_size=swarm.hidden_size,
            open_timeout_s=OPEN_TIMEOUT_S,
            prompts_NBPD=None if deep is None else deep.detach().cpu().clone(),
            adapters=adapters,
            hosted=hosted,
            commits=swarm.connection.network.config.audit_fraction > 0,
        )
        connection, needs = swarm.connection, replace(swarm.needs, session_tokens=max_tokens, adapter=hosted)
        session = _ActiveSession(
            connection.loop, connection.network, needs, config, batch_size=batch_size, prompts=swarm.prompts
        )
        session.active = swarm.state.sessions
        return session

    def new_remote_cache(self, max_length: int = DEFAULT_SESSION_TOKENS) -> SessionCache:
        """Return a cache with a session of its own, which ends with `generate`, or with the cache."""
        session = self.inference_session(max_length)
        cache = SessionCache(session)
        weakref.finalize(cache, session.close_soon)
        return cache

    def new_cache_behind(self, prefix: ModelPrefix) -> SessionCache:
        """Return a cache that begins with a prefix: the one of the generation under way, for which PEFT has put its own
        in place, or a new one."""
        generating = self._swarm.state.generating
        fresh = bool(generating) and generating[-1].get_seq_length() == 0
        cache = generating[-1] if fresh else self.new_remote_cache()
        cache.session.begin_with(prefix)
        cache.prefix = prefix
        return cache

    def new_default_cache(self) -> DeferredCache:
        """Return the cache of a call that neither brings nor asks for one."""
        return DeferredCache(self.inference_session if self._swarm.state.through is None else _refuse_session)

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, session: Any = None, **kwargs: Any) -> Any:
        """Hugging Face's `generate`, over the swarm.

        Args:
            inputs: token ids [B, L]; in a session that generated before, only the new ones, or None for none.
            session: continue this session; default: the one whose `with` block we are in, else a session of its own.
        Returns: as Hugging Face's; in a continued session, without the tokens of earlier calls.
        """
        state = self._swarm.state
        session = session or (state.sessions[-1] if state.sessions else None)
        if session is not None:
            return self._continue(session, inputs, *args, **kwargs)

        def anew() -> Any:
            with self._own_sessions() as sessions:
                result = super(DistributedMixin, self).generate(inputs, *args, **kwargs)  # type: ignore[misc]
                self._check_untainted(sessions())
                return result

        return self._untainted(anew, kwargs)

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> AdaptiveDrafts:
        """The library's: what drafts tokens in assisted generation."""
        return AdaptiveDrafts(super()._get_candidate_generator(*args, **kwargs))  # type: ignore[misc]

    def _untainted(self, generate: Callable[[], Any], kwargs: Mapping[str, Any]) -> Any:
        """Generate, again if a server turns out to have lied, unless a streamer has shown the tokens already."""
        network, state = self._swarm.connection.network, self._swarm.state
        if not network.config.audit_fraction or kwargs.get("streamer") is not None:
            return generate()
        outer, state.may_restart = state.may_restart, True
        try:
            return until_untainted(generate)
        finally:
            state.may_restart = outer

    def _check_untainted(self, sessions: Sequence[InferenceSession]) -> None:
        """Raise Tainted if a generation that is complete has to begin again."""
        if self._swarm.state.may_restart:
            for session in sessions:
                session.settle()
                if session.take_tainted():
                    raise Tainted

    def _continue(self, session: InferenceSession, inputs: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        """Generate in a session that may hold tokens already."""
        return self._untainted(lambda: self._continued(session, inputs, *args, **kwargs), kwargs)

    def _continued(self, session: InferenceSession, inputs: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        past = session.output_ids
        inputs = inputs if inputs is not None else kwargs.pop("input_ids", None)
        if past is None and session.position:
            raise BadRequest(
                "this session was not fed with token ids by generate, which therefore cannot tell what it holds: "
                "use another session, or set its position to 0"
            )
        if session.position and num_virtual_tokens(self):
            raise BadRequest(
                "PEFT's prompt learning takes only the last token of what continues a session: "
                "open a new session, and pass all tokens"
            )
        if not session.position:
            session.begin_with(None)  # until the call brings a prefix
        num_past = 0 if past is None else past.shape[1]
        if past is not None:
            inputs, kwargs["attention_mask"] = _joined(session, past, inputs, kwargs.get("attention_mask"))
        if names_of(session.adapters) != names_of(undropped(self._swarm.adapters())):
            raise BadRequest("this session was opened with other adapters than the model has now: open a new one")
        cache, position = SessionCache(session), session.position
        generating = self._swarm.state.generating
        generating.append(cache)
        try:
            result = super().generate(inputs, *args, past_key_values=cache, **kwargs)  # type: ignore[misc]
            self._check_untainted([session])
        except BaseException:
            session.rewind(min(position, session.position))
            raise
        finally:
            generating.remove(cache)
        sequences = result if isinstance(result, Tensor) else result.sequences
        if kwargs.get("inputs_embeds") is None:
            _remember(session, sequences, cache.mask_BT)
        if cache.used_beams or session.batch_size != sequences.shape[0]:
            session.restart()  # its rows are beams, not the sequences; the next call feeds these anew
        if isinstance(result, Tensor):
            return result[:, num_past:]
        result.sequences = sequences[:, num_past:]
        return result

    @contextmanager
    def _own_sessions(self) -> Iterator[Callable[[], list[InferenceSession]]]:
        """Close the sessions that a `generate` opens for itself; yield what says which they are."""
        generating = self._swarm.state.generating
        start = len(generating)
        try:
            yield lambda: [cache.session for cache in generating[start:]]
        finally:
            for cache in generating[start:]:
                cache.session.close()
            del generating[start:]

    def new_generation_cache(self, max_length: int) -> SessionCache:
        """A session just as long as one generation can get; it ends with the generation."""
        cache = self.new_remote_cache(max_length)
        self._swarm.state.generating.append(cache)
        return cache

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The class's own forward; where only the last logits are wanted, only they travel."""
        state = self._swarm.state
        keep = kwargs.get("logits_to_keep")
        hidden = kwargs.get("output_hidden_states") or getattr(self.config, "output_hidden_states", False)  # type: ignore[attr-defined]
        state.num_outputs = keep if isinstance(keep, int) and keep > 0 and not hidden else None
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            state.num_outputs = None

    def explain_route(self) -> ExplainedRoute:
        """The hops that a session would take now, and what each is expected to cost; print it. Raises: NoRoute."""
        connection = self._swarm.connection
        needs = replace(self._swarm.needs, adapter=self._swarm.hosted)
        return connection.loop.run(connection.network.explain_route(needs))

    def close(self) -> None:
        """Leave the swarm; the model can no longer be used."""
        self._swarm.connection.close()


def _refuse_session(max_length: int) -> InferenceSession:
    raise BadRequest(
        "this cache comes from a call inside run_through, and a session would run the blocks without what is between "
        "them: call the model with use_cache=False there"
    )


def _are_trained(adapters: ModelAdapter | None) -> bool:
    changed = [adapter for adapter in adapters or () if adapter is not None]
    return any(tensor.requires_grad for adapter in changed for tensor in adapter.tensors().values())


def _joined(
    session: InferenceSession, past: Tensor, inputs: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The token ids of a session with the new ones behind them, and the attention mask of all of them."""
    new = past[:, :0] if inputs is None else inputs
    if new.shape[0] != past.shape[0]:
        raise BadRequest(f"the session holds {past.shape[0]} sequences, the new input has {new.shape[0]}")
    ids = torch.cat([past.to(new.device), new], dim=1)
    if mask is not None and mask.shape[1] == ids.shape[1]:
        return ids, mask
    if mask is not None and mask.shape != new.shape:
        raise BadRequest(f"attention_mask must cover the {new.shape[1]} new tokens or all {ids.shape[1]}")
    known = session.output_mask if session.output_mask is not None else torch.ones_like(past)
    added = mask if mask is not None else torch.ones_like(new)
    return ids, torch.cat([known.to(added.device, added.dtype), added], dim=1)


def _remember(session: InferenceSession, sequences: Tensor, mask_BT: Tensor | None) -> None:
    """Note what a generation has made of a session, and which of its tokens are padding."""
    session.output_ids = sequences
    if mask_BT is not None:
        rows = mask_BT[:: max(1, mask_BT.shape[0] // sequences.shape[0])]
        known = rows[:, : sequences.shape[1]]
        session.output_mask = torch.cat([known, known.new_ones(len(known), sequences.shape[1] - known.shape[1])], dim=1)


def make_call(connection: Connection, needs: Needs, *, num_blocks: int, hidden_size: int) -> SwarmCall:
    """Return what the client half calls in place of its blocks."""
    compute = RemoteCompute(connection.network, needs)
    blocks = RemoteBlocks(connection.loop, compute, BlockRange(0, num_blocks), hidden_size)
    return SwarmCall(connection, needs, hidden_size, blocks)
