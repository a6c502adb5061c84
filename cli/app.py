"""The `swarm` command: flags in, exit codes out. Logging is set up here and nowhere else.

Exit codes: 0 done, 1 it failed (a peer, the network, a resource), 2 the command or its input is wrong,
130 interrupted.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer

import swarm
from swarm.errors import ResourceError, SwarmError, UserError

app = typer.Typer(
    name="swarm",
    help="Run and fine-tune large language models on the computers of people who share them.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback()
def _common(
    verbose: Annotated[int, typer.Option("--verbose", "-v", count=True, help="Say more; twice: debug.")] = 0,
) -> None:
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    if level > logging.DEBUG:
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC writes past Python's logging; our errors say it all
        for noisy in ("hivemind", "transformers", "asyncio", "httpx", "huggingface_hub"):
            logging.getLogger(noisy).setLevel(logging.ERROR)


@app.command()
def version() -> None:
    """Print the version.

    Example: swarm version
    """
    typer.echo(f"swarm {swarm.__version__} (protocol {swarm.PROTOCOL_VERSION})")


def _register() -> None:
    from . import api, bootstrap, demo, doctor, generate, private, serve, status

    app.command("demo")(demo.demo_command)
    app.command("serve")(serve.serve_command)
    app.command("dht")(bootstrap.dht_command)
    app.command("status")(status.status_command)
    app.command("doctor")(doctor.doctor_command)
    app.command("generate")(generate.generate_command)
    app.command("api")(api.api_command)
    app.command("invite")(private.invite_command)
    app.command("members")(private.members_command)
    app.command("revoke")(private.revoke_command)
    app.command("join")(private.join_command)


OPENMP_SPINS = "20000"
"""How long an idle OpenMP thread spins before it sleeps. Its default of 300,000 turns (milliseconds) takes a core from
whoever computes next, which on one machine is the next server; much less slows the layers of small models down."""


OLD_TLS_CIPHERS = "ECDHE-RSA-AES128-GCM-SHA256"
"""What gRPC may use in TLS 1.2: something for RSA keys, which no certificate of ours has, so TLS 1.3 is left. gRPC has
no setting for the version, and reads this one when it is loaded, which it is not yet."""


def main() -> None:
    """Run the command line; every error that Swarm raises on purpose becomes one sentence and an exit code."""
    os.environ["GRPC_SSL_CIPHER_SUITES"] = OLD_TLS_CIPHERS
    os.environ.setdefault("GOMP_SPINCOUNT", OPENMP_SPINS)  # read when torch is loaded, which it is not yet
    try:
        _register()
        app(standalone_mode=True)
    except ResourceError as exc:
        _fail(exc, 1)
    except UserError as exc:
        _fail(exc, 2)
    except SwarmError as exc:
        _fail(exc, 1)
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(error: SwarmError, code: int) -> None:
    print(f"swarm: {error}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
