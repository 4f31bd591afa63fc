"""What the end-to-end tests share: a small data set, prepared once."""

from pathlib import Path

import pytest

from tests.end_to_end.training import SMALL, Command, sources


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data folder."""
    folder = tmp_path_factory.mktemp("data")
    Command([*SMALL, sources(folder)], folder, "data.prepare").run()
    return folder
