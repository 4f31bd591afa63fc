"""What holds for every test process: the pytest session and the ranks it starts.

tests/distributed/harness.py imports this module in its fork server, so that what is prepared
here at import is prepared in each rank too.
"""

import os

import pytest

from model.backends import install_backends


def prepare_process() -> None:
    """Make the process fit for tests, before anything of Megatron is imported."""
    # No test may need the network: asking for it fails at once instead of after a time-out.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    os.environ["WANDB_MODE"] = "offline"
    # Tokenizers' threads do not survive a fork and say so on each one.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Whichever test imports Megatron first must find the stand-ins: Megatron settles for
    # mocks of what is missing when it is imported.
    install_backends("host")


prepare_process()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes minutes; left out by `make test`")
    config.addinivalue_line("markers", "cluster: jobs on a real Slurm; `make test-cluster`")
