"""Job scripts from the templates beside this file."""

import shlex
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from slurm.job import Job

_FOLDER = Path(__file__).parent


def render(template: str, **values: object) -> str:
    """A template with its values; an unknown name is an error."""
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        undefined=StrictUndefined,
        comment_start_string="<#",  # `{#` is bash: ${#list[@]}
        comment_end_string="#>",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    # What follows a line break would be a command.
    environment.filters["comment"] = lambda text: "\n# ".join(str(text).splitlines())
    return environment.get_template(template).render(**values)


def job_script(job: Job) -> str:
    """The batch script of a job."""
    return render("job.sh.jinja", job=job, cluster=job.cluster, health=job.cluster.health)


def report_script(job: Job, arguments: list[str]) -> str:
    """The batch script that compares the runs of an array, after them."""
    return render("report.sh.jinja", job=job, cluster=job.cluster, arguments=arguments)
