"""`python -m train` with context parallelism learns what one rank learns."""

from pathlib import Path

import pytest

from tests.end_to_end.training import records, train

COMMON = (
    "precision.params_dtype=fp32",
    "stage.micro_batch_size=1",
    "stage.train_steps=3",
    "data.inter_document_masking=true",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "context",
    [
        ("parallel.mamba_context=heads", "parallel.cp_comm_type=a2a"),
        (
            "parallel.mamba_context=state",
            "parallel.cross_entropy_loss_chunk=24",
            "parallel.recompute_granularity=selective",
            "parallel.recompute_modules=[layernorm,moe]",
        ),
    ],
)
def test_two_ranks_train_like_one(context: tuple[str, ...], data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "one", *COMMON).run()
    two = train(data, tmp_path / "two", *COMMON, *context, "parallel.context_parallel_size=2")
    two.run()
    for one, other in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        bound = 1e-5 if one["step"] == 1 else 1e-4
        for name in ("loss", "grad_norm", "load_balance_loss"):
            assert other[name] == pytest.approx(one[name], rel=bound), name
        assert other["mtp_loss"] == pytest.approx(one["mtp_loss"], rel=bound)
