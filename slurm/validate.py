"""Rules of recipes/cluster/*.yaml for a job of Slurm."""

import re

from recipes.rules import at_least, fail, one_of
from recipes.schema import ClusterConfig

_OF_THE_JOB = {
    *("--array", "--dependency", "--no-requeue", "--nodes", "--ntasks", "--ntasks-per-node"),
    *("--open-mode", "--output", "--signal", "--time", "-N", "-a", "-d", "-n", "-o", "-t"),
}
"""Options without which the chain would not work; of two Slurm takes the last."""


def validate_cluster(cluster: ClusterConfig) -> None:
    """Check what only a submission needs.

    Raises:
        ConfigError: the first rule that is broken.
    """
    if cluster.scheduler != "slurm":
        fail(
            "cluster.scheduler",
            cluster.scheduler,
            f"of cluster={cluster.name} queues no jobs",
            "choose a cluster of slurm: cluster=lab, or one of your own with --config-dir",
        )
    one_of("cluster.launcher", cluster.launcher, ("srun", "torchrun", "ft"))
    for name in ("nodes", "ranks_per_node", "cpus_per_rank", "gpus_per_numa_node"):
        at_least(f"cluster.{name}", getattr(cluster, name), 1, "left to the site or the layout")
    at_least("cluster.gpus_per_node", cluster.gpus_per_node, 0)
    if cluster.gpus_per_node and (cluster.ranks_per_node or 0) > cluster.gpus_per_node:
        fail(
            "cluster.ranks_per_node",
            cluster.ranks_per_node,
            f"is more than cluster.gpus_per_node={cluster.gpus_per_node}",
            "use null, one rank a GPU",
        )
    for name in ("warning_seconds", "chain_length", "max_strikes"):
        at_least(f"cluster.{name}", getattr(cluster, name), 1)
    limit = seconds(cluster.time_limit)
    if limit <= cluster.warning_seconds:
        fail(
            "cluster.warning_seconds",
            cluster.warning_seconds,
            f"is not shorter than cluster.time_limit={cluster.time_limit} ({limit} seconds)",
            "warn later or ask for more time",
        )
    if cluster.warning_seconds > 65535:
        fail(
            "cluster.warning_seconds",
            cluster.warning_seconds,
            "is more than 65535",
            "Slurm has no more",
        )
    for name in ("partition", "account", "qos", "memory_per_node", "dependency"):
        _one_line(f"cluster.{name}", getattr(cluster, name))
    _container(cluster)
    _health(cluster)
    for i, variable in enumerate(cluster.environment):
        if not re.fullmatch(r"[A-Za-z_]\w*", variable.name):
            fail(f"cluster.environment[{i}].name", variable.name, "is no name", "use A-Z, 0-9, _")
    for i, option in enumerate(cluster.sbatch):
        if not option.startswith("-"):
            fail(f"cluster.sbatch[{i}]", option, "is no option", "write --name=value")
        _one_line(f"cluster.sbatch[{i}]", option)
        if re.split(r"[=\s]", option)[0] in _OF_THE_JOB:
            fail(
                f"cluster.sbatch[{i}]",
                option,
                "would take the place of what the job itself asks for",
                "use the key of cluster.* or parallel.* for it, or leave it out",
            )
    for i, option in enumerate(cluster.srun):
        if not option.startswith("-"):  # srun would run it
            fail(f"cluster.srun[{i}]", option, "is no option", "write --name=value")


def _one_line(key: str, text: str | None) -> None:
    """A #SBATCH line ends where the text breaks: what follows would be a command."""
    if text is not None and (not text.strip() or not text.isprintable()):
        fail(key, repr(text), "is empty or has a line break in it", "write it in one line")


def seconds(time_limit: str) -> int:
    """Seconds of a limit as Slurm reads it: M, M:SS, H:MM:SS, D-H, D-H:MM or D-H:MM:SS.

    Raises:
        ConfigError: it is none of these.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time_limit, re.ASCII)
    if match is None:
        fail(
            "cluster.time_limit",
            time_limit,
            "is no time",
            "write minutes, H:MM:SS or D-HH:MM:SS, in quotes",
        )
    days, *parts = match.groups()
    if time_limit.isdecimal() and int(time_limit) >= 60:
        fail(
            "cluster.time_limit",
            time_limit,
            "may be a time without quotes, which YAML reads as one number (8:00:00 is 28800)",
            "write H:MM:SS or D-HH:MM:SS, in quotes",
        )
    numbers = [int(part) for part in parts if part is not None]
    units = [3600, 60, 1]
    if days is None:
        units = {1: [60], 2: [60, 1]}.get(len(numbers), units)
    rest = sum(number * unit for number, unit in zip(numbers, units, strict=False))
    return int(days or 0) * 86400 + rest


def _container(cluster: ClusterConfig) -> None:
    container = cluster.container
    one_of("cluster.container.runtime", container.runtime, ("none", "pyxis", "apptainer"))
    if (container.runtime == "none") != (container.image is None):
        fail(
            "cluster.container.image",
            container.image,
            f"does not go with cluster.container.runtime={container.runtime}",
            "give both a runtime and an image, or neither",
        )
    for i, mount in enumerate(container.mounts):
        if not re.match(r"/[^:]*:/", mount):
            fail(f"cluster.container.mounts[{i}]", mount, "is no mount", "write /outside:/inside")


def _health(cluster: ClusterConfig) -> None:
    health = cluster.health
    for name in ("timeout_seconds", "max_gpu_temperature"):
        at_least(f"cluster.health.{name}", getattr(health, name), 1)
    for name in (
        "min_free_disk_gb",
        "min_free_memory_gb",
        "max_clock_skew_seconds",
        "max_gpu_memory_used_mb",
        "all_reduce_mb",
    ):
        at_least(f"cluster.health.{name}", getattr(health, name), 0)
