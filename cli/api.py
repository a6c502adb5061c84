"""`swarm api`: an OpenAI-compatible HTTP API over a swarm."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.errors import BadRequest, ResourceError

from .common import (
    AllowOption,
    BlockOption,
    JoinOption,
    Lifetime,
    TrustOption,
    console,
    need_join,
    run_until_signal,
)

if TYPE_CHECKING:
    from swarm.api.app import AppConfig
    from swarm.api.generation import Engine
    from swarm.api.service import ServiceConfig
    from swarm.link import JoinLink

MAX_LENGTH = 8192
"""The longest session that servers take by default."""


def limit(what: str, **more: Any) -> Any:
    """A flag for how much is done, and for whom."""
    return typer.Option(help=what, rich_help_panel="Limits", **more)


def api_command(
    model: Annotated[str, typer.Argument(help="Hub repository or local directory; the model that the swarm serves.")],
    join: JoinOption = "",
    host: Annotated[str, typer.Option(help="IP address to listen on; 0.0.0.0: all, which needs keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="TCP port; 0: any.", min=0, max=65535)] = 8000,
    name: Annotated[
        str,
        typer.Option(help="What clients call the model; default: MODEL, or its directory's name.", show_default=False),
    ] = "",
    api_key_file: Annotated[
        Path | None, typer.Option(help="Keys that callers need: KEY or NAME KEY on each line.", show_default=False)
    ] = None,
    allow_anyone: Annotated[bool, typer.Option(help="Listen beyond this machine although there are no keys.")] = False,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="Web pages that may use the API, as https://HOST, or *; repeatable.", show_default=False),
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="Jinja file, in place of the model's chat template.", show_default=False)
    ] = None,
    max_length: Annotated[
        int, limit("Tokens of prompt and answer; default: the model's, at most 8192.", show_default=False)
    ] = 0,
    max_running: Annotated[int, limit("Choices that are generated at a time.", min=1)] = 32,
    max_waiting: Annotated[int, limit("Choices that may wait beside them.", min=0)] = 256,
    requests_per_minute: Annotated[int, limit("Of each key, or address; 0: any number.", min=0)] = 0,
    tokens_per_minute: Annotated[int, limit("Of prompts and answers of each key; 0: any number.", min=0)] = 0,
    drain_timeout: Annotated[float, typer.Option(help="Seconds for running requests when stopping.")] = 20.0,
    route_timeout: Annotated[float, typer.Option(help="Seconds to wait for missing servers.")] = 30.0,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub repository.")] = None,
    adapter: Annotated[
        str | None, typer.Option(help="Adapter that servers host, by its name.", show_default=False)
    ] = None,
    token: Annotated[str | None, typer.Option(envvar="HF_TOKEN", help="Hub token.", show_default=False)] = None,
    quantization: Annotated[
        str, typer.Option(help="Keep the head, which runs here, in fewer bits: int8 or int4. Faster, not exact.")
    ] = "none",
    allow: AllowOption = None,
    block: BlockOption = None,
    trust: TrustOption = None,
) -> None:
    """Serve an OpenAI-compatible HTTP API over a swarm.

    Example: swarm api Qwen/Qwen3-8B --join swarm://… --port 8000
    """
    link = need_join(join)
    missing = [package for package in ("fastapi", "uvicorn") if importlib.util.find_spec(package) is None]
    if missing:
        raise ResourceError(f"the API needs {' and '.join(missing)}: pip install 'swarm-llm[api]'")
    from swarm.api.app import AppConfig
    from swarm.api.door import DoorConfig, read_keys
    from swarm.api.service import ServiceConfig
    from swarm.api.serving import is_loopback, open_port

    keys = read_keys(api_key_file) if api_key_file is not None else ()
    if not (is_loopback(host) or keys or allow_anyone):
        raise BadRequest(
            f"anybody who reaches {host} could use the swarm through this API: pass --api-key-file, or --allow-anyone "
            "if that is what you want"
        )
    template = _read(chat_template) if chat_template is not None else None
    app_config = AppConfig(
        model_name=name or (Path(model).resolve().name if Path(model).is_dir() else model),
        door=DoorConfig(keys=keys, cors_origins=tuple(cors_origin or ()), hosts=(*DoorConfig().hosts, host)),
        requests_per_min=requests_per_minute,
        tokens_per_min=tokens_per_minute,
    )
    service_config = ServiceConfig(max_running=max_running, max_waiting=max_waiting)
    with open_port(host, port) as sock:
        engine = _load_engine(
            model, link, max_length, route_timeout,
            revision=revision, token=token, quantization=quantization, active_adapter=adapter,
            allowed_servers=allow or None, blocked_servers=block or (), trusted_servers=trust or None,
        )  # fmt: skip
        try:
            _serve(engine, template, app_config, service_config, sock, drain_timeout)
        finally:
            engine.model.close()


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as exc:
        raise BadRequest(f"the chat template {path} cannot be read: {exc}") from exc


def _load_engine(model: str, link: JoinLink, max_length: int, route_timeout_s: float, **kwargs: Any) -> Engine:
    """Join the swarm and load the client's part of the model."""
    import transformers

    from swarm.api.generation import Engine
    from swarm.client import AutoDistributedModelForCausalLM, ClientConfig

    config = ClientConfig(initial_peers=link.initial_peers, invitation=link.invitation, route_timeout_s=route_timeout_s)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model, revision=kwargs["revision"], token=kwargs["token"])
    distributed = AutoDistributedModelForCausalLM.from_pretrained(model, client_config=config, **kwargs).eval()
    longest = getattr(distributed.config.get_text_config(), "max_position_embeddings", None) or MAX_LENGTH
    return Engine(distributed, tokenizer, max_length or min(longest, MAX_LENGTH))


def _serve(
    engine: Engine, template: str | None, config: AppConfig, service_config: ServiceConfig, sock: Any, drain_s: float
) -> None:
    from swarm.api.app import make_app
    from swarm.api.door import Rates
    from swarm.api.requests import Reader
    from swarm.api.service import Service
    from swarm.api.serving import serve

    host, port = sock.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def work(lifetime: Lifetime) -> None:
        rates = Rates(config.requests_per_min, config.tokens_per_min)
        service = Service(engine, service_config, rates.tokens)
        app = make_app(service, Reader(engine, template), rates, config)

        def on_ready() -> None:
            lifetime.ready = True
            console.print(f"[bold]{config.model_name}[/] at {address}/v1. Ctrl-C to stop.", highlight=False)

        await serve(app, service, sock, lifetime.stop, on_ready, drain_timeout_s=drain_s)

    run_until_signal(work)
