"""A small internet in network namespaces: public hosts, and homes behind routers that translate addresses.

    public 7.7.7.1   public 7.7.7.2 …            home host 192.168.1.2        home host 192.168.2.2
          └───────────────┴──── the internet 7.7.7.0/24 ────┴── router 7.7.7.101      └── router 7.7.7.102

The addresses look like those of the internet, because libp2p and Swarm treat private ones otherwise; no namespace has
a way out of this machine. A router lets connections out and drops what comes in unasked, as home routers do.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

SUBNET = "7.7.7"
COMMAND_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 8.0


def why_not() -> str:
    """Why this machine allows no such lab; empty if it does."""
    missing = [name for name in ("ip", "iptables") if shutil.which(name) is None]
    if missing:
        return f"this machine has no {' and no '.join(missing)} command"
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    name = f"swarm{os.getpid()}try"
    try:
        _run("ip", "netns", "add", name)
    except LabError as exc:
        return f"network namespaces are not allowed here ({exc})"
    try:
        _run("ip", "-n", name, "link", "add", "try0", "type", "veth", "peer", "name", "try1")
        _run("ip", "netns", "exec", name, "iptables", "-t", "nat", "-A", "POSTROUTING", "-j", "MASQUERADE")
        _run("ip", "netns", "exec", name, "iptables", "-A", "INPUT", "-m", "conntrack", "--ctstate", "NEW")
    except LabError as exc:
        return f"address translation is not allowed here ({exc})"
    finally:
        _run("ip", "netns", "del", name)
    return ""


class LabError(Exception):
    """A command that builds the lab failed."""


class Lab:
    """Use as a context manager: processes and namespaces end with its body."""

    def __init__(self) -> None:
        self._prefix = f"swarm{os.getpid()}"
        self._internet = f"{self._prefix}net"
        self._namespaces: list[str] = []
        self._processes: list[subprocess.Popen[str]] = []
        self._ports: dict[str, str] = {}
        """Namespace -> where its cable ends on the bridge."""

    def __enter__(self) -> Lab:
        try:
            self._add(self._internet)
            self._ip(self._internet, "link", "add", "bridge", "type", "bridge")
            self._ip(self._internet, "link", "set", "bridge", "up")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def add_public(self, number: int) -> str:
        """Add a host with a public address, SUBNET.number; return its namespace."""
        name = self._add(f"{self._prefix}p{number}")
        self._plug_in(name, f"{SUBNET}.{number}")
        return name

    def add_home(self, number: int, *, is_symmetric: bool = False) -> str:
        """Add a router, SUBNET.(100 + number), and a host behind it, 192.168.number.2; return the host's namespace.

        Args:
            is_symmetric: the router gives each connection a random port, so that nobody can know from which one comes.
        """
        router, host = self._add(f"{self._prefix}r{number}"), self._add(f"{self._prefix}h{number}")
        self._plug_in(router, f"{SUBNET}.{100 + number}")
        self._ip(router, "link", "add", "lan", "type", "veth", "peer", "name", "eth0", "netns", host)
        self._ip(router, "addr", "add", f"192.168.{number}.1/24", "dev", "lan")
        self._ip(router, "link", "set", "lan", "up")
        self._ip(host, "addr", "add", f"192.168.{number}.2/24", "dev", "eth0")
        self._ip(host, "link", "set", "eth0", "up")
        self._ip(host, "route", "add", "default", "via", f"192.168.{number}.1")
        in_router = ("ip", "netns", "exec", router)
        ports = ("--random-fully",) if is_symmetric else ()
        _run(*in_router, "sysctl", "-q", "-w", "net.ipv4.ip_forward=1")
        _run(*in_router, "iptables", "-t", "nat", "-A", "POSTROUTING", "-o", "eth0", "-j", "MASQUERADE", *ports)
        unasked = ("-i", "eth0", "-m", "conntrack", "--ctstate", "NEW,INVALID", "-j", "DROP")
        for chain in ("INPUT", "FORWARD"):
            _run(*in_router, "iptables", "-A", chain, *unasked)
        return host

    def cut(self, number: int) -> None:
        """Pull the cable of a public host: nothing arrives any more on either side, and nobody is told."""
        self._ip(self._internet, "link", "set", self._ports[f"{self._prefix}p{number}"], "down")

    def carried_bytes(self, number: int) -> int:
        """How many bytes a public host has received so far."""
        at = f"/sys/class/net/{self._ports[f'{self._prefix}p{number}']}/statistics/tx_bytes"
        return int(_run("ip", "netns", "exec", self._internet, "cat", at))

    def heal(self, number: int) -> None:
        """Put the cable back."""
        self._ip(self._internet, "link", "set", self._ports[f"{self._prefix}p{number}"], "up")

    def forward_port(self, number: int, port: int) -> None:
        """Let the router of a home pass connections to one TCP port on to its host, as a person would set it up."""
        in_router = ("ip", "netns", "exec", f"{self._prefix}r{number}", "iptables")
        target = f"192.168.{number}.2"
        match = ("-i", "eth0", "-p", "tcp", "--dport", str(port))
        _run(*in_router, "-t", "nat", "-A", "PREROUTING", *match, "-j", "DNAT", "--to-destination", target)
        _run(*in_router, "-I", "FORWARD", *match, "-d", target, "-j", "ACCEPT")

    def start(self, namespace: str, command: Sequence[str], output: IO[str] | None = None) -> subprocess.Popen[str]:
        """Start a process in a namespace; what it says goes to `output`, errors included."""
        process = subprocess.Popen(
            ["ip", "netns", "exec", namespace, *command],
            stdin=subprocess.DEVNULL, stdout=output or subprocess.DEVNULL, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )  # fmt: skip
        self._processes.append(process)
        return process

    def run(self, namespace: str, command: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
        """Run a process in a namespace to its end."""
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                ["ip", "netns", "exec", namespace, *command],
                stdin=subprocess.DEVNULL, stdout=output, stderr=errors, text=True, start_new_session=True,
            )  # fmt: skip
            self._processes.append(process)
            try:
                process.wait(timeout_s)
            finally:
                _end(process, signal.SIGKILL)
            output.seek(0)
            errors.seek(0)
            return subprocess.CompletedProcess(command, process.returncode, output.read(), errors.read())

    def close(self) -> None:
        """End all processes, politely and the first one last, then remove all namespaces."""
        for processes in (self._processes[1:], self._processes[:1]):
            for process in processes:
                _signal(process, signal.SIGTERM)
            for process in processes:
                try:
                    process.wait(STOP_TIMEOUT_S)
                except subprocess.TimeoutExpired:
                    _end(process, signal.SIGKILL)
        self._processes.clear()
        while self._namespaces:
            _run("ip", "netns", "del", self._namespaces.pop())

    def _add(self, name: str) -> str:
        _run("ip", "netns", "add", name)
        self._namespaces.append(name)
        self._ip(name, "link", "set", "lo", "up")
        return name

    def _plug_in(self, name: str, address: str) -> None:
        port = self._ports[name] = f"port{len(self._ports)}"
        self._ip(name, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", self._internet)
        self._ip(self._internet, "link", "set", port, "master", "bridge", "up")
        self._ip(name, "addr", "add", f"{address}/24", "dev", "eth0")
        self._ip(name, "link", "set", "eth0", "up")

    def _ip(self, namespace: str, *arguments: str) -> None:
        _run("ip", "-n", namespace, *arguments)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
    if done.returncode != 0:
        raise LabError(f"{' '.join(command)}: {' '.join(done.stderr.split()) or done.returncode}")
    return done.stdout


def _signal(process: subprocess.Popen[str], number: int) -> None:
    if process.poll() is None:
        os.killpg(process.pid, number)


def _end(process: subprocess.Popen[str], number: int) -> None:
    _signal(process, number)
    process.wait(STOP_TIMEOUT_S)


def read_file(path: Path) -> str:
    """What a file says; empty while it does not exist."""
    return path.read_text() if path.exists() else ""
