from swarm.v1 import blocks_pb2 as _blocks_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ServerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SERVER_STATE_UNSPECIFIED: _ClassVar[ServerState]
    SERVER_STATE_JOINING: _ClassVar[ServerState]
    SERVER_STATE_ONLINE: _ClassVar[ServerState]
    SERVER_STATE_DRAINING: _ClassVar[ServerState]
SERVER_STATE_UNSPECIFIED: ServerState
SERVER_STATE_JOINING: ServerState
SERVER_STATE_ONLINE: ServerState
SERVER_STATE_DRAINING: ServerState

class ServerEntry(_message.Message):
    __slots__ = ("protocol_version", "software_version", "server_name", "model_name", "model_commit", "num_model_blocks", "hidden_size", "start", "end", "dtype", "quantization", "state", "direct", "tls_certificate", "multiaddrs", "decode_tokens_per_s", "forward_tokens_per_s", "max_session_tokens", "max_step_tokens", "max_batch_tokens", "max_batch_size", "cache_free_tokens", "coordinates", "next_blocks", "blocks_per_s", "movable", "adapters", "queue_s", "bytes_per_s")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_VERSION_FIELD_NUMBER: _ClassVar[int]
    SERVER_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_COMMIT_FIELD_NUMBER: _ClassVar[int]
    NUM_MODEL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DIRECT_FIELD_NUMBER: _ClassVar[int]
    TLS_CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    MULTIADDRS_FIELD_NUMBER: _ClassVar[int]
    DECODE_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    FORWARD_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    MAX_SESSION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_STEP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    CACHE_FREE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COORDINATES_FIELD_NUMBER: _ClassVar[int]
    NEXT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_PER_S_FIELD_NUMBER: _ClassVar[int]
    MOVABLE_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    software_version: str
    server_name: str
    model_name: str
    model_commit: str
    num_model_blocks: int
    hidden_size: int
    start: int
    end: int
    dtype: _blocks_pb2.DType
    quantization: str
    state: ServerState
    direct: _containers.RepeatedScalarFieldContainer[str]
    tls_certificate: bytes
    multiaddrs: _containers.RepeatedScalarFieldContainer[str]
    decode_tokens_per_s: float
    forward_tokens_per_s: float
    max_session_tokens: int
    max_step_tokens: int
    max_batch_tokens: int
    max_batch_size: int
    cache_free_tokens: int
    coordinates: _containers.RepeatedScalarFieldContainer[float]
    next_blocks: _blocks_pb2.BlockRange
    blocks_per_s: float
    movable: bool
    adapters: _containers.RepeatedCompositeFieldContainer[HostedAdapter]
    queue_s: float
    bytes_per_s: float
    def __init__(self, protocol_version: _Optional[int] = ..., software_version: _Optional[str] = ..., server_name: _Optional[str] = ..., model_name: _Optional[str] = ..., model_commit: _Optional[str] = ..., num_model_blocks: _Optional[int] = ..., hidden_size: _Optional[int] = ..., start: _Optional[int] = ..., end: _Optional[int] = ..., dtype: _Optional[_Union[_blocks_pb2.DType, str]] = ..., quantization: _Optional[str] = ..., state: _Optional[_Union[ServerState, str]] = ..., direct: _Optional[_Iterable[str]] = ..., tls_certificate: _Optional[bytes] = ..., multiaddrs: _Optional[_Iterable[str]] = ..., decode_tokens_per_s: _Optional[float] = ..., forward_tokens_per_s: _Optional[float] = ..., max_session_tokens: _Optional[int] = ..., max_step_tokens: _Optional[int] = ..., max_batch_tokens: _Optional[int] = ..., max_batch_size: _Optional[int] = ..., cache_free_tokens: _Optional[int] = ..., coordinates: _Optional[_Iterable[float]] = ..., next_blocks: _Optional[_Union[_blocks_pb2.BlockRange, _Mapping]] = ..., blocks_per_s: _Optional[float] = ..., movable: _Optional[bool] = ..., adapters: _Optional[_Iterable[_Union[HostedAdapter, _Mapping]]] = ..., queue_s: _Optional[float] = ..., bytes_per_s: _Optional[float] = ...) -> None: ...

class HostedAdapter(_message.Message):
    __slots__ = ("name", "digest")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: bytes
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[bytes] = ...) -> None: ...

class ModelEntry(_message.Message):
    __slots__ = ("name", "fingerprint", "num_blocks", "hidden_size")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    name: str
    fingerprint: str
    num_blocks: int
    hidden_size: int
    def __init__(self, name: _Optional[str] = ..., fingerprint: _Optional[str] = ..., num_blocks: _Optional[int] = ..., hidden_size: _Optional[int] = ...) -> None: ...

class MeetingEntry(_message.Message):
    __slots__ = ("multiaddrs",)
    MULTIADDRS_FIELD_NUMBER: _ClassVar[int]
    multiaddrs: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, multiaddrs: _Optional[_Iterable[str]] = ...) -> None: ...
