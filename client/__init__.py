"""The client: distributed models that are Hugging Face models."""

from .auto import (
    AutoDistributedConfig,
    AutoDistributedModel,
    AutoDistributedModelForCausalLM,
    AutoDistributedModelForSequenceClassification,
)
from .config import ClientConfig
from .session import InferenceSession
from .together import open_training_dht

__all__ = [
    "AutoDistributedConfig",
    "AutoDistributedModel",
    "AutoDistributedModelForCausalLM",
    "AutoDistributedModelForSequenceClassification",
    "ClientConfig",
    "InferenceSession",
    "open_training_dht",
]
