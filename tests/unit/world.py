"""A world of one rank for tests that run Megatron models of several shapes in one process."""

from collections.abc import Iterator
from contextlib import contextmanager

from model.backends import install_backends


@contextmanager
def fresh_world(seed: int = 0) -> Iterator[None]:
    """Process groups up inside and down after, and Megatron's process-wide metrics forgotten:
    they keep the number of layers and MTP depths of the first model that reported to them."""
    install_backends("host")
    from parallel.groups import one_rank

    with one_rank(seed):
        _forget_metrics()
        try:
            yield
        finally:
            _forget_metrics()


def _forget_metrics() -> None:
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    destroy_moe_metrics_tracker()
    MTPLossLoggingHelper.tracker.clear()
