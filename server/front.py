"""The gRPC port of a server: it stays while the blocks behind it change."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from swarm.admission import Gate as Admission
from swarm.errors import Draining, ResourceError
from swarm.identity import TlsCertificate
from swarm.rpc import errors_to_wire, server_options
from swarm.rpc_members import MembersOnly
from swarm.v1 import blocks_pb2 as pb
from swarm.v1 import blocks_pb2_grpc as pb_grpc

from .config import ServerConfig
from .connections import Connections, watch_connections
from .gate import Gate
from .service import BlocksService

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Blocks"].full_name


class Front(pb_grpc.BlocksServicer):
    """Hands each call to the blocks in service when it comes; calls that run stay where they began."""

    def __init__(self) -> None:
        self.present: BlocksService | None = None
        """None: no blocks are loaded."""
        self._health = health.aio.HealthServicer()

    async def serve(self, service: BlocksService | None) -> None:
        """Let new calls go there from now on."""
        self.present = service
        status = health_pb2.HealthCheckResponse
        for name in ("", SERVICE_NAME):
            await self._health.set(name, status.NOT_SERVING if service is None else status.SERVING)

    async def Describe(self, request: pb.DescribeRequest, context: grpc.aio.ServicerContext) -> pb.DescribeResponse:
        """See the wire contract."""
        service = await self._service(context, "Describe")
        return await service.Describe(request, context)

    async def Session(self, requests: object, context: grpc.aio.ServicerContext) -> None:
        """See the wire contract."""
        service = await self._service(context, "Session")
        await service.Session(requests, context)

    async def Push(self, requests: object, context: grpc.aio.ServicerContext) -> pb.PushResponse:
        """See the wire contract."""
        service = await self._service(context, "Push")
        return await service.Push(requests, context)

    async def Forward(self, requests: object, context: grpc.aio.ServicerContext) -> None:
        """See the wire contract."""
        service = await self._service(context, "Forward")
        await service.Forward(requests, context)

    async def Backward(self, requests: object, context: grpc.aio.ServicerContext) -> None:
        """See the wire contract."""
        service = await self._service(context, "Backward")
        await service.Backward(requests, context)

    async def PutAdapters(self, requests: object, context: grpc.aio.ServicerContext) -> pb.PutAdaptersResponse:
        """See the wire contract."""
        service = await self._service(context, "PutAdapters")
        return await service.PutAdapters(requests, context)

    async def _service(self, context: grpc.aio.ServicerContext, call: str) -> BlocksService:
        async with errors_to_wire(context, call):
            if self.present is None:
                raise Draining("this server holds no blocks at the moment: use another one")
        return self.present

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serve Blocks, health and reflection on it."""
        pb_grpc.add_BlocksServicer_to_server(self, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server)

    async def aclose(self) -> None:
        """Tell those who watch its health that it ends."""
        await self._health.enter_graceful_shutdown()


@asynccontextmanager
async def open_grpc(
    config: ServerConfig, front: Front, certificate: TlsCertificate, gate: Gate, members: Admission | None = None
) -> AsyncIterator[tuple[int, Connections]]:
    """Serve over TLS while the body runs; yield the port, and what knows of the connections to it.

    Args:
        gate: says how much may be asked for.
        members: says who may ask; None: anybody.
    Raises: ResourceError: the port is taken.
    """
    limits = gate.config
    options = server_options(max_connections=limits.max_connections, max_streams=limits.max_calls)
    members_only = [] if members is None else [MembersOnly(members, certificate.certificate_der)]
    server = grpc.aio.server(options=options, interceptors=[gate, *members_only])
    front.add_to(server)
    await front.serve(None)
    credentials = grpc.ssl_server_credentials([(certificate.private_key_pem, certificate.certificate_pem)])
    host = "127.0.0.1" if config.tunnel_only else config.host
    try:
        port = server.add_secure_port(f"{host}:{config.port}", credentials)
    except RuntimeError as exc:
        raise ResourceError(
            f"port {config.port} on {host} is in use or not allowed: choose another --port, or 0 for any free one"
        ) from exc
    await server.start()
    try:
        async with watch_connections(gate, port) as connections:
            yield port, connections
    finally:
        await front.aclose()
        await server.stop(grace=0.5)
