"""What a job is: the numbers and paths its script is rendered from."""

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from parallel.layout import Layout
from recipes.errors import ConfigError
from recipes.rules import fail
from recipes.schema import ClusterConfig

PROJECT = Path(__file__).resolve().parents[1]
"""Where Strata's packages are, on a file system that every node sees."""

_EXCLUDE = re.compile(r"(?:--exclude(?:=|\s+)|-x\s*)(.+)")


@dataclass(frozen=True)
class Run:
    """One training run of a job: all of it, or one task of its array."""

    name: str
    folder: Path
    """Run directory, absolute."""
    recipe: Path
    """Folder that holds the resolved recipe as experiment/submitted.yaml."""
    steps: int
    """Steps of the whole run."""


@dataclass(frozen=True)
class Job:
    """A batch job: one run, or an array of runs of one size."""

    name: str
    folder: Path
    """Folder of this submission: script, recipes, log."""
    cluster: ClusterConfig
    runs: list[Run]
    nodes: int
    ranks_per_node: int
    command: str
    """The command line that made it."""
    working_folder: Path
    """Where it was given: relative paths of the recipe begin there."""
    python: str = sys.executable
    project: Path = PROJECT
    bad_nodes: list[str] = field(default_factory=list)
    """Nodes an earlier submission found bad."""

    @property
    def own_excluded(self) -> list[str]:
        """Nodes that options of cluster.sbatch exclude, as Slurm writes lists of them."""
        found = (_EXCLUDE.fullmatch(option) for option in self.cluster.sbatch)
        return [match[1].strip("\"'") for match in found if match]

    @property
    def excluded(self) -> list[str]:
        """Nodes the job must not have: of two --exclude Slurm takes the last alone."""
        return [*self.own_excluded, *self.bad_nodes]

    @property
    def options(self) -> list[str]:
        """What else cluster.sbatch says."""
        return [option for option in self.cluster.sbatch if not _EXCLUDE.fullmatch(option)]

    @property
    def ranks(self) -> int:
        """Ranks of one run."""
        return self.nodes * self.ranks_per_node


def shape(cluster: ClusterConfig, layout: Layout) -> tuple[int, int]:
    """Nodes of a job and ranks of a node.

    Raises:
        ConfigError: the ranks of the layout do not fill whole nodes.
    """
    per_node = ranks_per_node(cluster)
    world = layout.world_size
    if world < per_node and cluster.nodes in (None, 1):
        return 1, world
    if world % per_node:
        raise ConfigError(
            f"cluster={cluster.name} has {per_node} ranks a node and the layout {world}, which do "
            "not fill whole nodes; change parallel.data_parallel_size or cluster.ranks_per_node"
        )
    return world // per_node, per_node


def ranks_per_node(cluster: ClusterConfig) -> int:
    """Ranks of a node: one a GPU, unless the recipe says so many.

    Raises:
        ConfigError: the recipe says neither.
    """
    ranks = cluster.ranks_per_node or cluster.gpus_per_node
    if not ranks:
        fail(
            "cluster.ranks_per_node",
            cluster.ranks_per_node,
            f"and cluster.gpus_per_node=0 leave open what a node of cluster={cluster.name} runs",
            "give one of them",
        )
    return ranks


def launched_ranks(cluster: ClusterConfig) -> int | None:
    """Ranks of cluster.nodes nodes; None: the layout decides."""
    return None if cluster.nodes is None else cluster.nodes * ranks_per_node(cluster)
