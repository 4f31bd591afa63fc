"""Set-up and structure: the Makefile, the search for Python, the pins, who imports whom."""

import ast
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from runpy import run_path
from typing import Any
from unittest import mock

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]

# What each folder may import of ours when it is imported itself.
MAY_IMPORT = {
    "recipes": set(),
    "parallel": {"recipes"},
    "precision": {"recipes"},
    "data": {"recipes"},
    "model": {"recipes", "parallel", "precision"},
    "train": {"recipes", "parallel", "precision", "data", "model"},
    "slurm": {"recipes", "parallel"},
}

# A Python as far as set-up can see: it answers -c, makes environments that hold a copy of
# itself, and writes down how it was called.
FAKE_PYTHON = """#!/bin/sh
echo "$*" >> calls
case "$1 $2" in
    "-c "*) echo "$0" ;;
    "-m venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
esac
"""
BROKEN_PYTHON = "#!/bin/sh\necho 'pyenv: version not active' >&2; exit 127\n"


class Machine:
    """A machine with nothing but what a test puts on it, and a fresh clone."""

    def __init__(self, folder: Path):
        self.bin = folder / "bin"
        self.home = folder / "home"
        self.clone = folder / "clone"
        for path in (self.bin, self.home, self.clone):
            path.mkdir()
        for tool in ("make", "echo", "cat", "mkdir", "cp", "touch"):
            (self.bin / tool).symlink_to(str(shutil.which(tool)))
        for name in ("Makefile", "setup.py", "pyproject.toml"):
            shutil.copy(ROOT / name, self.clone)
        shutil.copytree(ROOT / ".ci", self.clone / ".ci")

    def add(self, path: Path, script: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(script)
        path.chmod(0o755)
        return path

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self.clone,
            env={"PATH": str(self.bin), "HOME": str(self.home)} | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    def calls(self) -> str:
        return (self.clone / "calls").read_text()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def real_python(wrapped: str = sys.executable) -> str:
    return f'#!/bin/sh\nexec "{wrapped}" "$@"\n'


def setup_arguments() -> dict[str, Any]:
    with mock.patch("setuptools.setup") as setup, mock.patch.object(os, "curdir", str(ROOT)):
        run_path(str(ROOT / "setup.py"))
    return dict(setup.call_args.kwargs)


def test_without_python_it_says_what_to_do(machine: Machine):
    process = machine.run("make", "setup")
    assert process.returncode != 0
    for words in ("3.12", "pyenv install", "uv python install", "PYTHON="):
        assert words in process.stderr
    assert "Traceback" not in process.stderr
    assert not (machine.clone / ".venv").exists()


def test_an_old_python_is_not_taken(machine: Machine):
    old = real_python().replace("exec", "# 3.11 as far as the check can see\nexit 1\nexec")
    machine.add(machine.bin / "python3", old)
    process = machine.run(".ci/find_python")
    assert process.returncode != 0
    assert process.stdout == ""


def test_the_version_check_itself(machine: Machine):
    """The real check, run by this Python, which is new enough, and by one that claims 3.11."""
    machine.add(machine.bin / "python3", real_python())
    assert machine.run(".ci/find_python").stdout.strip() == sys.executable
    pretend = "import sys; sys.version_info = (3, 11, 9); exec(sys.argv[1])"
    script = f'#!/bin/sh\nexec "{sys.executable}" -c "{pretend}" "$2"\n'
    machine.add(machine.bin / "python3", script)
    assert machine.run(".ci/find_python").returncode == 1


def test_pyenv_python_is_found_though_its_shim_does_not_work(machine: Machine):
    machine.add(machine.bin / "python3.12", BROKEN_PYTHON)
    machine.add(machine.home / ".pyenv/versions/3.9.18/bin/python", BROKEN_PYTHON)
    good = machine.add(machine.home / ".pyenv/versions/3.12.1/bin/python", FAKE_PYTHON)
    process = machine.run(".ci/find_python")
    assert process.returncode == 0
    assert process.stdout.strip() == str(good)


def test_pyenv_root_is_honoured(machine: Machine, tmp_path: Path):
    good = machine.add(tmp_path / "elsewhere/versions/3.13.0/bin/python", FAKE_PYTHON)
    process = machine.run(".ci/find_python", PYENV_ROOT=str(tmp_path / "elsewhere"))
    assert process.stdout.strip() == str(good)


def test_a_chosen_python_is_used_or_refused_never_replaced(machine: Machine, tmp_path: Path):
    machine.add(machine.bin / "python3.12", FAKE_PYTHON)
    chosen = machine.add(tmp_path / "mine/python", FAKE_PYTHON)
    assert machine.run(".ci/find_python", PYTHON=str(chosen)).stdout.strip() == str(chosen)
    process = machine.run("make", "setup", "PYTHON=/no/such/python")
    assert process.returncode != 0
    assert "PYTHON=/no/such/python is not a Python 3.12" in process.stderr


def test_setup_installs_once_and_again_when_the_pins_change(machine: Machine):
    machine.add(machine.bin / "python3.12", FAKE_PYTHON)
    install = "-m pip install --disable-pip-version-check --editable .[dev]"
    for _ in range(2):
        process = machine.run("make", "setup")
        assert process.returncode == 0, process.stderr
    assert machine.calls().count(install) == 1
    assert machine.calls().count("-m venv") == 1
    os.utime(machine.clone / "setup.py", (2e9, 2e9))
    assert machine.run("make", "setup").returncode == 0
    assert machine.calls().count(install) == 2
    assert machine.calls().count("-m venv") == 1, "a good environment is kept"


def test_a_failed_install_is_tried_again(machine: Machine):
    machine.add(
        machine.bin / "python3.12", FAKE_PYTHON.replace("case", '[ "$2" = pip ] && exit 1\ncase')
    )
    for tries in (1, 2):
        assert machine.run("make", "setup").returncode != 0
        assert machine.calls().count("pip install") == tries


def test_help_lists_every_target(machine: Machine):
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets is not None
    process = machine.run("make")
    assert process.returncode == 0
    for target in set(targets[1].split()) - {"help"}:
        assert f"make {target} " in process.stdout


def test_ci_checks_and_tests():
    run = ROOT / ".ci/run"
    assert os.access(run, os.X_OK)
    lines = run.read_text().splitlines()
    assert "set -euo pipefail" in lines
    assert lines[-3:] == ["make check", "make test", "make test-cluster-quick"]


def test_pins_are_exact_and_are_what_is_installed():
    arguments = setup_arguments()
    assert arguments["python_requires"] == ">=3.12"
    pins = map(Requirement, arguments["install_requires"] + arguments["extras_require"]["dev"])
    installed = {pin.name: (str(pin.specifier), f"=={version(pin.name)}") for pin in pins}
    different = {name: pair for name, pair in installed.items() if pair[0] != pair[1]}
    assert not different
    # NVIDIA's Apex is not PyPI's.
    everything = [*arguments["install_requires"], *sum(arguments["extras_require"].values(), [])]
    assert "apex" not in {Requirement(line).name for line in everything}


def test_every_folder_is_packaged_with_its_recipes():
    arguments = setup_arguments()
    assert set(MAY_IMPORT) <= set(arguments["packages"])
    assert not [name for name in arguments["packages"] if "tests" in name or "__" in name]
    recipes = {
        ".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "recipes").rglob("*.yaml")
    }
    assert recipes <= set(arguments["packages"])


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folders_import_in_one_direction(folder: str):
    """Looks at what runs when a module is imported, not at imports inside functions."""
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            ours = {name.split(".")[0] for name in names} & set(MAY_IMPORT)
            wrong = ours - MAY_IMPORT[folder] - {folder}
            assert not wrong, f"{file.relative_to(ROOT)}:{node.lineno} imports {sorted(wrong)}"
