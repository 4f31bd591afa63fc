"""The start-up table, the device choice and packages that must not be installed."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from model.backends import Backends, install_backends
from parallel.device import choose_device
from recipes.errors import ConfigError

ROOT = Path(__file__).parents[2]
COMPONENTS = [
    "megatron-core",
    "torch",
    "CUDA runtime",
    "collectives",
    "transformer_engine",
    "mamba_ssm",
    "apex",
]


@pytest.fixture(scope="module")
def backends() -> Backends:
    return install_backends("host")


def test_table_names_every_component(backends: Backends) -> None:
    assert [row.component for row in backends.table] == COMPONENTS
    kinds = {row.component: row.kind for row in backends.table}
    assert kinds["megatron-core"] == kinds["torch"] == "real"
    assert kinds["CUDA runtime"] == kinds["transformer_engine"] == "stand-in"
    assert kinds["apex"] == "absent"
    assert backends.table[0].version == version("megatron-core")
    assert (backends.device, backends.collectives) == ("host", "gloo")


def test_table_as_text_and_as_data(backends: Backends) -> None:
    header, *lines = str(backends).splitlines()
    assert header.split() == ["component", "is", "version", "runs"]
    assert [line[: len(name)] for line, name in zip(lines, COMPONENTS, strict=True)] == COMPONENTS
    rows = backends.as_dicts()
    assert [row["component"] for row in rows] == COMPONENTS
    assert all(set(row) == {"component", "kind", "version", "runs"} for row in rows)
    assert all(value for row in rows for value in row.values())


def test_installing_twice_gives_the_same_table(backends: Backends) -> None:
    from megatron.core.transformer.moe import token_dispatcher

    before = len(sys.path)
    assert install_backends("host").table == backends.table
    assert len(sys.path) == before
    moved = token_dispatcher.maybe_move_tensor_to_cpu(torch.tensor([1, 2]), as_numpy=True)
    assert moved.tolist() == [1, 2] and not isinstance(moved, torch.Tensor)


def test_tokens_are_sorted_only_if_they_are_not(backends: Backends) -> None:
    from megatron.core.transformer.moe.token_dispatcher import sort_chunks_by_idxs

    x, probs = torch.arange(6.0).unsqueeze(1), torch.arange(6.0)
    sizes = torch.tensor([1, 2, 3])
    same, same_probs = sort_chunks_by_idxs(x, sizes, torch.tensor([0, 1, 2]), probs=probs)
    assert same is x and same_probs is probs
    moved, moved_probs = sort_chunks_by_idxs(x, sizes, torch.tensor([2, 0, 1]), probs=probs)
    assert moved.flatten().tolist() == moved_probs.tolist() == [3, 4, 5, 0, 1, 2]


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("host") == "host"
    with pytest.raises(ConfigError, match="device=cuda, .* no CUDA GPU .* use device=host"):
        choose_device("cuda")
    with pytest.raises(ConfigError, match="device=tpu .* use auto, cuda or host"):
        choose_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == choose_device("cuda") == "cuda"
    assert choose_device("host") == "host"


def start(tmp_path: Path) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys; sys.path.append(sys.argv[1]);"
        "from model.backends import _refuse_foreign_apex as check, _apex; check();"
        "print(_apex().kind)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, text=True, capture_output=True
    )


def test_foreign_apex_is_refused(tmp_path: Path) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    done = start(tmp_path)
    assert done.returncode != 0
    assert "ConfigError" in done.stderr and "pip uninstall apex" in done.stderr


def test_nvidia_apex_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "apex" / "multi_tensor_apply").mkdir(parents=True)
    for folder in ("apex", "apex/multi_tensor_apply"):
        (tmp_path / folder / "__init__.py").write_text("")
    done = start(tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "real"), done.stderr
