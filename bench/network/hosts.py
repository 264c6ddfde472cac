"""Hosts on one machine: network namespaces joined by a bridge, each behind a link of a set rate.

    with standing(2, gbits=1.0) as hosts:
        output = hosts.run(launcher, ["program.py", "--argument"], timeout=60)

A host has an address of its own on `eth0`, one end of a veth pair whose other end is a port of the bridge. A token
bucket (tc tbf) at either end holds the host to the rate, sending and receiving. All hosts share the machine's
processors, memory and files. Needs root and iproute2.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from jointspar.training.launch import ENDING_SIGNALS, ending_signals_raise
from network.launchers import Launcher

INTERFACE = "eth0"
_TOOLS = ("ip", "tc", "unshare", "hostname")
_PREFIX = "jointspar-"  # of the namespaces' names; then the process that made them
_BURST_SECONDS = 1e-3  # of traffic that a bucket holds: what passes at once after a pause
_LEAST_BURST_BYTES = 128 * 1024  # above the 64 KiB that the kernel hands over in one piece
_QUEUE_MS = 50  # of traffic that waits at a link before it is dropped
_POLL_SECONDS = 0.02

# Stands in for ssh. $1 is the last option or the host's address, whose last octet is the host's number plus one.
_AGENT = """#!/bin/sh
while [ "${{1#-}}" != "$1" ]; do shift; done
host=$((${{1##*.}} - 1))
shift
exec ip netns exec "{name}$host" unshare --uts sh -c "hostname host$host; $*"
"""


class HostsError(Exception):
    """Hosts cannot be set up here; says why in one line."""


class JobError(Exception):
    """A job failed or did not end in time; with what it printed last."""


def refusal() -> str | None:
    """Why no hosts can be set up on this machine, in one line; None where they can, which is tried."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"needs iproute2 and util-linux: no {', '.join(missing)} on PATH (Debian: apt install iproute2)"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    try:
        with standing(1, gbits=1.0):
            return None
    except HostsError as error:
        return f"this machine makes no network namespaces with limited links: {error}"


@contextmanager
def standing(num_hosts: int, gbits: float) -> Iterator[Hosts]:
    """Hosts that stand for the length of a `with`, however it is left: errors, Ctrl-C, SIGTERM and SIGHUP included.

    gbits: rate of every link in Gbit/s, either way. What a run that was killed left behind is removed first. SIGTERM
    and SIGHUP become SystemExit. Call from the main thread. Raises HostsError.
    """
    _remove_stale()
    hosts = Hosts(num_hosts)
    with (
        tempfile.TemporaryDirectory(prefix=_PREFIX) as folder,
        ending_signals_raise(lambda number: SystemExit(128 + number)),
    ):
        try:
            hosts._set_up(Path(folder))
            hosts.set_rate(gbits)
            yield hosts
        finally:
            with _signals_held_back():
                _remove(hosts.name)


class Hosts:
    """A set of hosts, numbered from 0; made by `standing`. Rank k of a job runs on host k."""

    def __init__(self, num_hosts: int) -> None:
        self.num_hosts = num_hosts
        self.name = f"{_PREFIX}{_life_of(os.getpid())}-"  # of all of its namespaces, the host's number or "hub" follows
        self.addresses = [f"10.77.0.{host + 1}" for host in range(num_hosts)]
        self.gbits = 0.0
        self._agent = Path()

    def set_rate(self, gbits: float) -> None:
        """Hold every link, either way, to a rate in Gbit/s, TCP/IP headers included."""
        burst = max(_LEAST_BURST_BYTES, round(gbits * 1e9 / 8 * _BURST_SECONDS))
        limits = f"tbf rate {round(gbits * 1e6)}kbit burst {burst} latency {_QUEUE_MS}ms".split()
        for host in range(self.num_hosts):
            for namespace, device in ((f"{self.name}{host}", INTERFACE), (f"{self.name}hub", f"port{host}")):
                _run(["tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", *limits])
        self.gbits = gbits

    @property
    def slowness(self) -> float:
        """How much longer than at 0.1 Gbit/s, or faster, anything may take."""
        return max(1.0, 0.1 / self.gbits)

    def sent_bytes(self) -> list[int]:
        """What has left each host's interface so far; headers counted once for each piece of up to 64 KiB."""
        return [_interface(f"{self.name}{host}")["stats64"]["tx"]["bytes"] for host in range(self.num_hosts)]

    def run(self, launcher: Launcher, program: Sequence[str], *, timeout: float, num_ranks: int | None = None) -> str:
        """Run a Python program as one rank on each of the first hosts (default all); returns what it printed.

        timeout: seconds. However the job ends, nothing of it is left. Raises JobError.
        """
        addresses = self.addresses[: self.num_hosts if num_ranks is None else num_ranks]
        commands = launcher.commands(addresses, INTERFACE, self._agent, program)
        return self.run_commands(commands, timeout=timeout, environment=launcher.environment)

    def run_commands(
        self, commands: Sequence[Sequence[str]], *, timeout: float, environment: dict[str, str] | None = None
    ) -> str:
        """Run command k on host k, all at once, to their end; see `run`."""
        with tempfile.TemporaryFile("w+") as output:
            processes: list[subprocess.Popen] = []
            try:
                for host, command in enumerate(commands):
                    processes.append(
                        subprocess.Popen(
                            self._on_host(host, command),
                            env={**os.environ, **(environment or {})},
                            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                        )
                    )  # fmt: skip
                code = _first_failure(processes, time.monotonic() + timeout)
            finally:
                _kill_all_in(self.name)
                for process in processes:
                    if process.poll() is None:  # it has not come to its namespace yet
                        with suppress(ProcessLookupError):
                            os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            output.seek(0)
            printed = output.read()
        if code != 0:
            how = f"did not end within {timeout:g} s" if code is None else f"ended with exit code {code}"
            raise JobError(f"{' '.join(commands[0])}: {how}\n{printed[-3000:]}")
        return printed

    def _on_host(self, host: int, command: Sequence[str]) -> list[str]:
        """The command in the host's namespace; under a name of its own, without which Open MPI takes hosts for one."""
        shell = ["unshare", "--uts", "sh", "-c", f'hostname host{host}; exec "$@"', "sh"]
        return ["ip", "netns", "exec", f"{self.name}{host}", *shell, *command]

    def _set_up(self, folder: Path) -> None:
        hub = f"{self.name}hub"
        _run(["ip", "netns", "add", hub])
        _run(["ip", "-n", hub, "link", "add", "bridge0", "type", "bridge"])
        _run(["ip", "-n", hub, "link", "set", "bridge0", "up"])
        for host, address in enumerate(self.addresses):
            name, port = f"{self.name}{host}", f"port{host}"
            _run(["ip", "netns", "add", name])
            veth = ["type", "veth", "peer", "name", port, "netns", hub]
            _run(["ip", "link", "add", INTERFACE, "netns", name, *veth])
            _run(["ip", "-n", hub, "link", "set", port, "master", "bridge0", "up"])
            _run(["ip", "-n", name, "addr", "add", f"{address}/24", "dev", INTERFACE])
            for device in ("lo", INTERFACE):
                _run(["ip", "-n", name, "link", "set", device, "up"])
        self._agent = folder / "agent"
        self._agent.write_text(_AGENT.format(name=self.name))
        self._agent.chmod(0o755)


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise HostsError(f"`{' '.join(command)}`: {' '.join(done.stderr.split())}")
    return done.stdout


def _interface(namespace: str) -> dict:
    return json.loads(_run(["ip", "-n", namespace, "-s", "-json", "link", "show", INTERFACE]))[0]


def _first_failure(processes: Sequence[subprocess.Popen], deadline: float) -> int | None:
    """Waits for all to end, or for the first that fails; its exit code, 0 if none does, None past the deadline."""
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        failed = next((code for code in codes if code), None)
        if failed is not None:
            return failed
        if all(code == 0 for code in codes):
            return 0
        time.sleep(_POLL_SECONDS)
    return None


def _life_of(process: int) -> str | None:
    """The process and when it started, so that a later one of the same number is another; None if it is over."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    return f"{process}-{text.rpartition(')')[2].split()[19]}"


def _namespaces(prefix: str) -> list[str]:
    names = [line.split()[0] for line in _run(["ip", "netns", "list"]).splitlines()]
    return [name for name in names if name.startswith(prefix)]


def _remove_stale() -> None:
    """Remove the namespaces of processes that are over."""
    for name in _namespaces(_PREFIX):
        maker = name.removeprefix(_PREFIX).rpartition("-")[0]
        process = maker.partition("-")[0]
        if process.isdigit() and _life_of(int(process)) != maker:
            with suppress(HostsError):  # another run may be removing it as well
                _remove(name)


def _remove(prefix: str) -> None:
    """Kill what still runs in these namespaces, and delete them: interfaces go with them."""
    _kill_all_in(prefix)
    errors = []
    for name in _namespaces(prefix):
        try:
            _run(["ip", "netns", "delete", name])
        except HostsError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _kill_all_in(prefix: str) -> None:
    for name in _namespaces(prefix):
        for process in _run(["ip", "netns", "pids", name]).split():
            with suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """A second Ctrl-C waits until all is removed.

    Commands inherit the mask. It does not cover the threads of this process, one of which may take the signal; Python
    then calls its handler in this one.
    """
    held: list[int] = []
    numbers = (signal.SIGINT, *ENDING_SIGNALS)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    handlers = [signal.signal(number, lambda number, _: held.append(number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number in held:
            signal.raise_signal(number)
