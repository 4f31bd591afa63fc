"""Where the lab's nodes live: ports of this machine, or network namespaces with a cable each."""

import socket
import subprocess
from pathlib import Path

_HOSTS = Path("/etc/hosts")
_BEGIN, _END = "# begin strata lab", "# end strata lab"


class Ports:
    """Every node is a port on 127.0.0.1."""

    name = "ports"
    controller = "127.0.0.1"

    def __init__(self, nodes: list[str]) -> None:
        self.nodes = nodes

    def node_options(self, node: str) -> str:
        """Address of a node, for slurm.conf."""
        return f"NodeAddr=127.0.0.1 Port={18000 + self.nodes.index(node)}"

    def prefix(self, node: str) -> list[str]:
        """Command line that runs the rest of it on a node."""
        return []

    def up(self) -> None:
        """Let the nodes' names resolve."""
        _add_hosts({"127.0.0.1": self.nodes})

    def down(self) -> None:
        """Undo `up`."""
        _remove_hosts()


class Namespaces:
    """Every node is a network namespace, joined to a bridge by a pair of virtual cards."""

    name = "netns"
    bridge = "strata0"
    controller = "10.231.77.1"

    def __init__(self, nodes: list[str]) -> None:
        self.nodes = nodes

    @staticmethod
    def impossible() -> str | None:
        """Why this machine cannot make namespaces; None: it can."""
        trial = "strata-trial"
        try:
            _ip("netns", "add", trial)
            _ip("netns", "delete", trial)
        except FileNotFoundError:
            return "there is no `ip`"
        except subprocess.CalledProcessError as error:
            return str(error.stderr).strip()
        return None

    def _address(self, node: str) -> str:
        return f"10.231.77.{10 + self.nodes.index(node)}"

    def node_options(self, node: str) -> str:
        """Address of a node, for slurm.conf."""
        return f"NodeAddr={self._address(node)} Port=18000"

    def prefix(self, node: str) -> list[str]:
        """Command line that runs the rest of it on a node."""
        return ["ip", "netns", "exec", _space(node)]

    def up(self) -> None:
        """Make bridge, namespaces and cables.

        Raises:
            RuntimeError: this machine does not let us.
        """
        self.down()
        try:
            _ip("link", "add", self.bridge, "type", "bridge")
            _ip("address", "add", f"{self.controller}/24", "dev", self.bridge)
            _ip("link", "set", self.bridge, "up")
            for node in self.nodes:
                self._add(node)
        except subprocess.CalledProcessError as error:
            self.down()
            raise RuntimeError(
                f"network namespaces cannot be made here ({error.stderr.strip()}); "
                "use the lab with --network ports"
            ) from error
        table = {self.controller: ["controller"]} | {self._address(n): [n] for n in self.nodes}
        _add_hosts(table)
        for node in self.nodes:  # `ip netns exec` puts this file in place of /etc/hosts
            hosts = Path("/etc/netns") / _space(node) / "hosts"
            hosts.parent.mkdir(parents=True, exist_ok=True)
            # The machine's own name must lead to the node: gloo listens where it points.
            own = f"127.0.0.1 localhost\n{self._address(node)} {socket.gethostname()}\n"
            hosts.write_text(own + "".join(f"{a} {names[0]}\n" for a, names in table.items()))

    def _add(self, node: str) -> None:
        space, outside = _space(node), _cable(node)
        _ip("netns", "add", space)
        _ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("link", "set", outside, "master", self.bridge, "up")
        for words in (
            ("address", "add", f"{self._address(node)}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
            ("link", "set", "lo", "up"),
        ):
            _ip("-n", space, *words)

    def cut(self, node: str) -> None:
        """Pull a node's cable."""
        _ip("link", "set", _cable(node), "down")

    def mend(self, node: str) -> None:
        """Put the cable back."""
        _ip("link", "set", _cable(node), "up")

    def down(self) -> None:
        """Undo `up`; quiet about what is not there."""
        _remove_hosts()
        for words in (
            *(("netns", "delete", _space(n)) for n in self.nodes),
            *(("link", "delete", _cable(n)) for n in self.nodes),
            ("link", "delete", self.bridge),
        ):
            subprocess.run(["ip", *words], capture_output=True)
        for node in self.nodes:
            folder = Path("/etc/netns") / _space(node)
            (folder / "hosts").unlink(missing_ok=True)
            if folder.is_dir():
                folder.rmdir()


def _space(node: str) -> str:
    return f"strata-{node}"


def _cable(node: str) -> str:
    return f"strata-{node}"  # at most 15 characters


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def _add_hosts(table: dict[str, list[str]]) -> None:
    _remove_hosts()
    lines = [_BEGIN, *(f"{address} {' '.join(names)}" for address, names in table.items()), _END]
    with _HOSTS.open("a") as file:
        file.write("\n".join(lines) + "\n")


def _remove_hosts() -> None:
    text = _HOSTS.read_text()
    before, found, rest = text.partition(_BEGIN)
    if found:
        _HOSTS.write_text(before + rest.partition(_END + "\n")[2])
