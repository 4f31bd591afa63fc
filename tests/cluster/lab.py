"""`python -m tests.cluster.lab start`: a real Slurm on this machine, in seconds.

Nodes n1, n2, ... are ports of this machine, or network namespaces (`--network netns`) whose
cable can be cut. Everything is kept under one folder, and `stop` ends every daemon and removes
what was added to the machine. Needs root and, the first time, Debian's registry.
"""

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.cluster import packages
from tests.cluster.network import Namespaces, Ports

FOLDER = Path("/tmp/strata-lab")
"""Where the lab is unless said otherwise; one lab a machine."""
_TEMPLATE = Path(__file__).with_name("slurm.conf.template")
CPUS = 4
"""Cores a node claims."""


@dataclass
class Lab:
    """One Slurm cluster: where it is and what its nodes are called."""

    folder: Path = FOLDER
    network: str = "ports"
    num_nodes: int = 3

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes."""
        return [f"n{i}" for i in range(1, self.num_nodes + 1)]

    @property
    def wires(self) -> Ports | Namespaces:
        """The nodes' network."""
        return (Namespaces if self.network == "netns" else Ports)(self.nodes)

    @property
    def conf(self) -> Path:
        """slurm.conf, for the variable SLURM_CONF of every client."""
        return self.folder / "slurm.conf"

    def start(self) -> None:
        """Install Slurm if need be, start every daemon and wait until all nodes are idle.

        Raises:
            RuntimeError: a lab is running already, or something does not start; says what.
        """
        if running(self.folder):
            raise RuntimeError(f"a lab is running in {self.folder}; stop it first")
        packages.install()
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in ("munge", "state", "log", *(f"spool-{n}" for n in self.nodes)):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)  # munged refuses a socket below a folder others can write to
        try:
            self.wires.up()
            self._configure()
            self._start_daemons()
            self.wait_idle()
        except BaseException:
            self.stop()
            raise

    def _configure(self) -> None:
        key = self.folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        lines = [
            f"NodeName={n} NodeHostname={n} {self.wires.node_options(n)} CPUs={CPUS} "
            "RealMemory=4096 State=UNKNOWN"
            for n in self.nodes
        ]
        text = _TEMPLATE.read_text().format(
            folder=self.folder,
            host=socket.gethostname().split(".")[0],
            controller=self.wires.controller,
            nodes="\n".join(lines),
        )
        self.conf.write_text(text)
        # slurmd looks for cgroups though no plugin uses them, and may find none.
        plugin = "cgroup/v1" if packages.version() < (23, 11) else "disabled"
        (self.folder / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")

    def _start_daemons(self) -> None:
        folder = self.folder / "munge"
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "seed-file": "seed"}
        options = [f"--{name}={folder / file}" for name, file in files.items()]
        self._daemon("munged", [*options, f"--log-file={folder}/log", "--foreground", "--force"])
        _until(lambda: (folder / "socket").exists(), "munged to listen", 10)
        self._daemon("slurmctld", ["-D", "-f", str(self.conf)])
        for node in self.nodes:
            options = ["-D", "-N", node, "-f", str(self.conf)]
            self._daemon("slurmd", options, self.wires.prefix(node))

    def _daemon(self, name: str, options: Sequence[str], prefix: Sequence[str] = ()) -> None:
        path = packages.program(name)
        assert path is not None, "installed before"
        with (self.folder / "log" / "daemons.log").open("ab") as log:
            process = subprocess.Popen(
                [*prefix, path, *options],
                env=os.environ | self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        # A pid alone may be somebody else's later: with its start it is one process for ever.
        entry = {"pid": process.pid, "started": psutil.Process(process.pid).create_time()}
        with (self.folder / "daemons").open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def environment(self) -> dict[str, str]:
        """What a client needs."""
        return {"SLURM_CONF": str(self.conf)}

    def call(self, *command: str) -> str:
        """Output of a Slurm client."""
        environment = os.environ | self.environment()
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def wait_idle(self, nodes: Sequence[str] = (), seconds: float = 60) -> None:
        """Wait until the nodes (default: all) are idle."""
        wanted = dict.fromkeys(nodes or self.nodes, "idle")

        def idle() -> bool:
            try:
                lines = self.call("sinfo", "-N", "-h", "-p", "main", "-o", "%N %T").split("\n")
            except RuntimeError:  # the controller does not answer yet
                return False
            return wanted.items() <= dict(line.split() for line in lines).items()

        _until(idle, f"{', '.join(wanted)} to be idle; see {self.folder}/log", seconds)

    def stop(self) -> None:
        """End every daemon and job of this lab, undo what was done to the network."""
        processes = [*daemons(self.folder), *_steps(self.folder)]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(processes, timeout=5)
        for process in [*alive, *_steps(self.folder)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=5)
        self.wires.down()
        (self.folder / "daemons").unlink(missing_ok=True)


def daemons(folder: Path) -> list[psutil.Process]:
    """The daemons of a lab that are alive."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for line in (folder / "daemons").read_text().splitlines():
            entry = json.loads(line)
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(entry["pid"])
                same = process.create_time() == entry["started"]
                if same and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
    return found


def running(folder: Path) -> bool:
    """Whether a lab is up in the folder."""
    return bool(daemons(folder))


def _steps(folder: Path) -> list[psutil.Process]:
    """What is left of jobs: a node that was lost leaves its step daemons and tasks behind.

    A step daemon writes its title over its environment, but has the log of its node open.
    """
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.name() == "slurmstepd":
                mine = any(file.path.startswith(f"{folder}/") for file in process.open_files())
            else:
                env = process.environ()
                mine = env.get("SLURM_CONF") == f"{folder}/slurm.conf" and "SLURM_JOB_ID" in env
            if mine and process.pid != os.getpid():
                found.append(process)
    return found


def _until(condition: Callable[[], bool], what: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited {seconds:g} s for {what}")
        time.sleep(0.1)


@contextlib.contextmanager
def started(lab: Lab) -> Iterator[Lab]:
    """A lab that is up inside."""
    lab.start()
    try:
        yield lab
    finally:
        lab.stop()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.lab", description=__doc__)
    parser.add_argument("do", choices=("install", "start", "stop", "status"))
    parser.add_argument("--network", choices=("ports", "netns"), default="ports")
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    described = options.folder / "lab.json"
    settings = {"network": options.network, "num_nodes": options.nodes}
    if options.do != "start" and described.exists():
        settings = json.loads(described.read_text())
    lab = Lab(options.folder, **settings)
    try:
        if options.do == "install":
            packages.install()
        elif options.do == "start":
            began = time.monotonic()
            lab.start()
            described.write_text(json.dumps(settings) + "\n")
            print(f"{', '.join(lab.nodes)} are idle after {time.monotonic() - began:.1f} s")
            print(f"export SLURM_CONF={lab.conf}")
        elif options.do == "stop":
            lab.stop()
        elif not running(lab.folder):
            raise SystemExit("no lab is running")
        else:
            print(lab.call("sinfo", "-N", "-l"))
    except RuntimeError as error:
        raise SystemExit(f"RuntimeError: {error}") from None


if __name__ == "__main__":
    main()
