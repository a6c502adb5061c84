"""Room for the activations of training: graphs never take more, and nobody's are dropped for what cannot be kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModel

from swarm.errors import PromptTooLong
from swarm.model.anatomy import anatomy_of
from swarm.model.span import Span
from swarm.ranges import BlockRange
from swarm.server.activations import MAX_KEPT_S, PROTECTED_S, KeptActivations, cut
from swarm.server.batches import Batch, Gradients, run_backward, run_forward
from swarm.v1 import blocks_pb2 as pb
