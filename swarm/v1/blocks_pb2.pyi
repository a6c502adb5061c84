from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    DTYPE_FLOAT32: _ClassVar[DType]
    DTYPE_FLOAT16: _ClassVar[DType]
    DTYPE_BFLOAT16: _ClassVar[DType]
    DTYPE_INT64: _ClassVar[DType]

class Codec(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CODEC_UNSPECIFIED: _ClassVar[Codec]
    CODEC_RAW: _ClassVar[Codec]
    CODEC_INT8_PER_ROW: _ClassVar[Codec]

class ErrorCode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ERROR_CODE_UNSPECIFIED: _ClassVar[ErrorCode]
    ERROR_CODE_INTERNAL: _ClassVar[ErrorCode]
    ERROR_CODE_BAD_REQUEST: _ClassVar[ErrorCode]
    ERROR_CODE_PROMPT_TOO_LONG: _ClassVar[ErrorCode]
    ERROR_CODE_UNSUPPORTED: _ClassVar[ErrorCode]
    ERROR_CODE_UNAVAILABLE: _ClassVar[ErrorCode]
    ERROR_CODE_SESSION_LOST: _ClassVar[ErrorCode]
    ERROR_CODE_CACHE_FULL: _ClassVar[ErrorCode]
    ERROR_CODE_DRAINING: _ClassVar[ErrorCode]
    ERROR_CODE_PROTOCOL: _ClassVar[ErrorCode]
    ERROR_CODE_ADAPTER_MISSING: _ClassVar[ErrorCode]
    ERROR_CODE_NOT_A_MEMBER: _ClassVar[ErrorCode]
    ERROR_CODE_TOO_MANY_REQUESTS: _ClassVar[ErrorCode]

class Retry(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RETRY_UNSPECIFIED: _ClassVar[Retry]
    RETRY_NEVER: _ClassVar[Retry]
    RETRY_SAME_PEER: _ClassVar[Retry]
    RETRY_OTHER_PEER: _ClassVar[Retry]
DTYPE_UNSPECIFIED: DType
DTYPE_FLOAT32: DType
DTYPE_FLOAT16: DType
DTYPE_BFLOAT16: DType
DTYPE_INT64: DType
CODEC_UNSPECIFIED: Codec
CODEC_RAW: Codec
CODEC_INT8_PER_ROW: Codec
ERROR_CODE_UNSPECIFIED: ErrorCode
ERROR_CODE_INTERNAL: ErrorCode
ERROR_CODE_BAD_REQUEST: ErrorCode
ERROR_CODE_PROMPT_TOO_LONG: ErrorCode
ERROR_CODE_UNSUPPORTED: ErrorCode
ERROR_CODE_UNAVAILABLE: ErrorCode
ERROR_CODE_SESSION_LOST: ErrorCode
ERROR_CODE_CACHE_FULL: ErrorCode
ERROR_CODE_DRAINING: ErrorCode
ERROR_CODE_PROTOCOL: ErrorCode
ERROR_CODE_ADAPTER_MISSING: ErrorCode
ERROR_CODE_NOT_A_MEMBER: ErrorCode
ERROR_CODE_TOO_MANY_REQUESTS: ErrorCode
RETRY_UNSPECIFIED: Retry
RETRY_NEVER: Retry
RETRY_SAME_PEER: Retry
RETRY_OTHER_PEER: Retry

class TensorSpec(_message.Message):
    __slots__ = ("dtype", "codec", "shape", "num_bytes")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    dtype: DType
    codec: Codec
    shape: _containers.RepeatedScalarFieldContainer[int]
    num_bytes: int
    def __init__(self, dtype: _Optional[_Union[DType, str]] = ..., codec: _Optional[_Union[Codec, str]] = ..., shape: _Optional[_Iterable[int]] = ..., num_bytes: _Optional[int] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "retry", "message", "peer_id", "retry_after_ms")
    CODE_FIELD_NUMBER: _ClassVar[int]
    RETRY_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    code: ErrorCode
    retry: Retry
    message: str
    peer_id: str
    retry_after_ms: int
    def __init__(self, code: _Optional[_Union[ErrorCode, str]] = ..., retry: _Optional[_Union[Retry, str]] = ..., message: _Optional[str] = ..., peer_id: _Optional[str] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...

class BlockRange(_message.Message):
    __slots__ = ("start", "end")
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    start: int
    end: int
    def __init__(self, start: _Optional[int] = ..., end: _Optional[int] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ("protocol_version", "padding", "echo")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    ECHO_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    padding: bytes
    echo: bool
    def __init__(self, protocol_version: _Optional[int] = ..., padding: _Optional[bytes] = ..., echo: _Optional[bool] = ...) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("protocol_version", "software_version", "peer_id", "model_name", "model_fingerprint", "num_model_blocks", "blocks", "dtype", "hidden_size", "limits", "load", "can_rewind", "clock_s", "padding")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_VERSION_FIELD_NUMBER: _ClassVar[int]
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NUM_MODEL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    CAN_REWIND_FIELD_NUMBER: _ClassVar[int]
    CLOCK_S_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    software_version: str
    peer_id: str
    model_name: str
    model_fingerprint: str
    num_model_blocks: int
    blocks: BlockRange
    dtype: DType
    hidden_size: int
    limits: Limits
    load: Load
    can_rewind: bool
    clock_s: float
    padding: bytes
    def __init__(self, protocol_version: _Optional[int] = ..., software_version: _Optional[str] = ..., peer_id: _Optional[str] = ..., model_name: _Optional[str] = ..., model_fingerprint: _Optional[str] = ..., num_model_blocks: _Optional[int] = ..., blocks: _Optional[_Union[BlockRange, _Mapping]] = ..., dtype: _Optional[_Union[DType, str]] = ..., hidden_size: _Optional[int] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., can_rewind: _Optional[bool] = ..., clock_s: _Optional[float] = ..., padding: _Optional[bytes] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_session_tokens", "max_step_tokens", "max_batch_tokens", "max_batch_size", "max_adapter_bytes")
    MAX_SESSION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_STEP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_ADAPTER_BYTES_FIELD_NUMBER: _ClassVar[int]
    max_session_tokens: int
    max_step_tokens: int
    max_batch_tokens: int
    max_batch_size: int
    max_adapter_bytes: int
    def __init__(self, max_session_tokens: _Optional[int] = ..., max_step_tokens: _Optional[int] = ..., max_batch_tokens: _Optional[int] = ..., max_batch_size: _Optional[int] = ..., max_adapter_bytes: _Optional[int] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("num_sessions", "cache_used_bytes", "cache_total_bytes", "queue_length", "queue_s")
    NUM_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    CACHE_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    CACHE_TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    QUEUE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    num_sessions: int
    cache_used_bytes: int
    cache_total_bytes: int
    queue_length: int
    queue_s: float
    def __init__(self, num_sessions: _Optional[int] = ..., cache_used_bytes: _Optional[int] = ..., cache_total_bytes: _Optional[int] = ..., queue_length: _Optional[int] = ..., queue_s: _Optional[float] = ...) -> None: ...

class PeerAddress(_message.Message):
    __slots__ = ("peer_id", "direct", "tls_certificate", "multiaddrs")
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    DIRECT_FIELD_NUMBER: _ClassVar[int]
    TLS_CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    MULTIADDRS_FIELD_NUMBER: _ClassVar[int]
    peer_id: str
    direct: _containers.RepeatedScalarFieldContainer[str]
    tls_certificate: bytes
    multiaddrs: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, peer_id: _Optional[str] = ..., direct: _Optional[_Iterable[str]] = ..., tls_certificate: _Optional[bytes] = ..., multiaddrs: _Optional[_Iterable[str]] = ...) -> None: ...

class SessionRequest(_message.Message):
    __slots__ = ("open", "attach", "step", "more", "close")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    open: SessionOpen
    attach: SessionAttach
    step: Step
    more: bytes
    close: SessionClose
    def __init__(self, open: _Optional[_Union[SessionOpen, _Mapping]] = ..., attach: _Optional[_Union[SessionAttach, _Mapping]] = ..., step: _Optional[_Union[Step, _Mapping]] = ..., more: _Optional[bytes] = ..., close: _Optional[_Union[SessionClose, _Mapping]] = ...) -> None: ...

class SessionClose(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SessionOpen(_message.Message):
    __slots__ = ("protocol_version", "model_fingerprint", "session_id", "blocks", "batch_size", "max_tokens", "timeout_ms", "next", "next_session_id", "prompts", "data", "epoch", "adapters", "hosted_adapter")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    NEXT_FIELD_NUMBER: _ClassVar[int]
    NEXT_SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    HOSTED_ADAPTER_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    model_fingerprint: str
    session_id: bytes
    blocks: BlockRange
    batch_size: int
    max_tokens: int
    timeout_ms: int
    next: PeerAddress
    next_session_id: bytes
    prompts: TensorSpec
    data: bytes
    epoch: int
    adapters: _containers.RepeatedScalarFieldContainer[bytes]
    hosted_adapter: bytes
    def __init__(self, protocol_version: _Optional[int] = ..., model_fingerprint: _Optional[str] = ..., session_id: _Optional[bytes] = ..., blocks: _Optional[_Union[BlockRange, _Mapping]] = ..., batch_size: _Optional[int] = ..., max_tokens: _Optional[int] = ..., timeout_ms: _Optional[int] = ..., next: _Optional[_Union[PeerAddress, _Mapping]] = ..., next_session_id: _Optional[bytes] = ..., prompts: _Optional[_Union[TensorSpec, _Mapping]] = ..., data: _Optional[bytes] = ..., epoch: _Optional[int] = ..., adapters: _Optional[_Iterable[bytes]] = ..., hosted_adapter: _Optional[bytes] = ...) -> None: ...

class SessionAttach(_message.Message):
    __slots__ = ("protocol_version", "session_id", "epoch")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    session_id: bytes
    epoch: int
    def __init__(self, protocol_version: _Optional[int] = ..., session_id: _Optional[bytes] = ..., epoch: _Optional[int] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("step_id", "position", "num_outputs", "beam_idx", "hidden_states", "attention_mask", "position_ids", "data", "hop_us", "held")
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    NUM_OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    BEAM_IDX_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_STATES_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_MASK_FIELD_NUMBER: _ClassVar[int]
    POSITION_IDS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    HOP_US_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    step_id: int
    position: int
    num_outputs: int
    beam_idx: _containers.RepeatedScalarFieldContainer[int]
    hidden_states: TensorSpec
    attention_mask: TensorSpec
    position_ids: TensorSpec
    data: bytes
    hop_us: _containers.RepeatedScalarFieldContainer[int]
    held: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, step_id: _Optional[int] = ..., position: _Optional[int] = ..., num_outputs: _Optional[int] = ..., beam_idx: _Optional[_Iterable[int]] = ..., hidden_states: _Optional[_Union[TensorSpec, _Mapping]] = ..., attention_mask: _Optional[_Union[TensorSpec, _Mapping]] = ..., position_ids: _Optional[_Union[TensorSpec, _Mapping]] = ..., data: _Optional[bytes] = ..., hop_us: _Optional[_Iterable[int]] = ..., held: _Optional[_Iterable[int]] = ...) -> None: ...

class SessionResponse(_message.Message):
    __slots__ = ("opened", "result", "more", "draining")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    opened: SessionOpened
    result: StepResult
    more: bytes
    draining: SessionDraining
    def __init__(self, opened: _Optional[_Union[SessionOpened, _Mapping]] = ..., result: _Optional[_Union[StepResult, _Mapping]] = ..., more: _Optional[bytes] = ..., draining: _Optional[_Union[SessionDraining, _Mapping]] = ...) -> None: ...

class SessionDraining(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SessionOpened(_message.Message):
    __slots__ = ("max_tokens", "max_step_tokens", "position")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_STEP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    max_step_tokens: int
    position: int
    def __init__(self, max_tokens: _Optional[int] = ..., max_step_tokens: _Optional[int] = ..., position: _Optional[int] = ...) -> None: ...

class StepResult(_message.Message):
    __slots__ = ("step_id", "hidden_states", "data", "hop_us")
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_STATES_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    HOP_US_FIELD_NUMBER: _ClassVar[int]
    step_id: int
    hidden_states: TensorSpec
    data: bytes
    hop_us: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, step_id: _Optional[int] = ..., hidden_states: _Optional[_Union[TensorSpec, _Mapping]] = ..., data: _Optional[bytes] = ..., hop_us: _Optional[_Iterable[int]] = ...) -> None: ...

class PushResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ComputeRequest(_message.Message):
    __slots__ = ("open", "more")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    open: ComputeOpen
    more: bytes
    def __init__(self, open: _Optional[_Union[ComputeOpen, _Mapping]] = ..., more: _Optional[bytes] = ...) -> None: ...

class ComputeOpen(_message.Message):
    __slots__ = ("protocol_version", "model_fingerprint", "blocks", "hidden_states", "attention_mask", "position_ids", "prompts", "grad_outputs", "data", "forward_id", "adapters", "dropout_seed", "first_row", "hosted_adapter")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_STATES_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_MASK_FIELD_NUMBER: _ClassVar[int]
    POSITION_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    GRAD_OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    FORWARD_ID_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    DROPOUT_SEED_FIELD_NUMBER: _ClassVar[int]
    FIRST_ROW_FIELD_NUMBER: _ClassVar[int]
    HOSTED_ADAPTER_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    model_fingerprint: str
    blocks: BlockRange
    hidden_states: TensorSpec
    attention_mask: TensorSpec
    position_ids: TensorSpec
    prompts: TensorSpec
    grad_outputs: TensorSpec
    data: bytes
    forward_id: bytes
    adapters: _containers.RepeatedScalarFieldContainer[bytes]
    dropout_seed: int
    first_row: int
    hosted_adapter: bytes
    def __init__(self, protocol_version: _Optional[int] = ..., model_fingerprint: _Optional[str] = ..., blocks: _Optional[_Union[BlockRange, _Mapping]] = ..., hidden_states: _Optional[_Union[TensorSpec, _Mapping]] = ..., attention_mask: _Optional[_Union[TensorSpec, _Mapping]] = ..., position_ids: _Optional[_Union[TensorSpec, _Mapping]] = ..., prompts: _Optional[_Union[TensorSpec, _Mapping]] = ..., grad_outputs: _Optional[_Union[TensorSpec, _Mapping]] = ..., data: _Optional[bytes] = ..., forward_id: _Optional[bytes] = ..., adapters: _Optional[_Iterable[bytes]] = ..., dropout_seed: _Optional[int] = ..., first_row: _Optional[int] = ..., hosted_adapter: _Optional[bytes] = ...) -> None: ...

class ComputeResponse(_message.Message):
    __slots__ = ("result", "more")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    result: ComputeResult
    more: bytes
    def __init__(self, result: _Optional[_Union[ComputeResult, _Mapping]] = ..., more: _Optional[bytes] = ...) -> None: ...

class ComputeResult(_message.Message):
    __slots__ = ("hidden_states", "prompts", "data", "adapter_grads")
    HIDDEN_STATES_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_GRADS_FIELD_NUMBER: _ClassVar[int]
    hidden_states: TensorSpec
    prompts: TensorSpec
    data: bytes
    adapter_grads: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    def __init__(self, hidden_states: _Optional[_Union[TensorSpec, _Mapping]] = ..., prompts: _Optional[_Union[TensorSpec, _Mapping]] = ..., data: _Optional[bytes] = ..., adapter_grads: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ...) -> None: ...

class PutAdaptersRequest(_message.Message):
    __slots__ = ("open", "adapter", "more")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    open: PutAdaptersOpen
    adapter: AdapterFile
    more: bytes
    def __init__(self, open: _Optional[_Union[PutAdaptersOpen, _Mapping]] = ..., adapter: _Optional[_Union[AdapterFile, _Mapping]] = ..., more: _Optional[bytes] = ...) -> None: ...

class PutAdaptersOpen(_message.Message):
    __slots__ = ("protocol_version", "model_fingerprint")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    model_fingerprint: str
    def __init__(self, protocol_version: _Optional[int] = ..., model_fingerprint: _Optional[str] = ...) -> None: ...

class AdapterFile(_message.Message):
    __slots__ = ("digest", "num_bytes", "data")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    num_bytes: int
    data: bytes
    def __init__(self, digest: _Optional[bytes] = ..., num_bytes: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class PutAdaptersResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
