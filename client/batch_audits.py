"""Audits of Forward and Backward calls: another server is asked the same, and the answers are compared."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from itertools import combinations
from typing import TypeVar

from torch import Tensor

from swarm.commitments import KEY_BYTES, Sketcher, relative_error
from swarm.errors import SwarmError

from .audits import settle, size_of, tolerance
from .network import Network
from .routing import Hop, Needs

logger = logging.getLogger(__name__)

# B batch, L length, D hidden

T = TypeVar("T")


def difference(one: Sequence[Tensor], other: Sequence[Tensor], mask_BL: Tensor | None) -> float:
    """How far two answers of the same shapes are apart, relative to the second one.

    Args:
        one: hidden states or their gradients, [B, L, D]; then gradients of other things, if there are any.
        mask_BL: int64, 0 for padding, of which nothing is expected.
    """
    width = one[0].shape[-1]
    sketcher = Sketcher.of_key(secrets.token_bytes(KEY_BYTES), width)
    rows = [each[0].reshape(-1, width) if mask_BL is None else each[0][mask_BL.bool()] for each in (one, other)]
    errors_X = relative_error(*(sketcher.sketch(each.unsqueeze(0))[0] for each in rows))
    further = [
        float((a - b).float().norm() / b.float().norm().clamp_min(1e-30))
        for a, b in zip(one[1:], other[1:], strict=True)
    ]
    return max([size_of(errors_X), *further])


async def audited(
    network: Network,
    needs: Needs,
    hop: Hop,
    answer: T,
    ask: Callable[[Hop], Awaitable[T]],
    tensors_of: Callable[[T], Sequence[Tensor]],
    mask_BL: Tensor | None,
) -> tuple[Hop, T]:
    """Return a hop's answer, or where it is drawn for an audit and turns out to be false, that of another peer.

    Args:
        needs: of a peer that can be asked the same.
        ask: ask another peer.
    """
    if not network.pace.is_drawn():
        return hop, answer
    peers, answers = [hop], [answer]
    try:
        while len(peers) < 3:
            (other,) = await network.auditors([hop], needs, not_these=peers)
            if other is None:
                break
            peers.append(other)
            answers.append(await ask(other))
            if len(peers) == 2 and _agree(network, peers, [tensors_of(each) for each in answers], mask_BL):
                return hop, answer
    except SwarmError as exc:
        logger.debug("an audit could not be made: %s", exc)
        await network.note_failure(exc)
        answers = answers[:2] if len(answers) > 1 else [answer]
    return _judged(network, peers[: len(answers)], answers, tensors_of, mask_BL)


def _agree(network: Network, peers: Sequence[Hop], tensors: Sequence[Sequence[Tensor]], mask_BL: Tensor | None) -> bool:
    (hop, other), exact = peers, network.config.compression == network.config.gradient_compression == "none"
    allowed = tolerance(hop.server, other.server, len(hop.blocks), exact_wire=exact)
    return difference(tensors[0], tensors[1], mask_BL) <= allowed


def _judged(
    network: Network,
    peers: Sequence[Hop],
    answers: Sequence[T],
    tensors_of: Callable[[T], Sequence[Tensor]],
    mask_BL: Tensor | None,
) -> tuple[Hop, T]:
    """Say which of the answers, which do not agree, to believe, and exclude whose is false."""
    tensors = [tensors_of(each) for each in answers]
    if len(peers) < 2:
        return peers[0], answers[0]
    if len(peers) == 2:
        network.audits.doubt(peers, difference(tensors[0], tensors[1], mask_BL))
        return peers[0], answers[0]
    between = [difference(tensors[one], tensors[other], mask_BL) for one, other in combinations(range(3), 2)]
    false = settle((between[2], between[1], between[0]))
    if false is None:
        network.audits.doubt(peers[:2], between[0])
        return peers[0], answers[0]
    network.audits.exclude(peers[false], error=between[0] if false < 2 else between[1], among_others=between[2 - false])
    return (peers[1], answers[1]) if false == 0 else (peers[0], answers[0])
