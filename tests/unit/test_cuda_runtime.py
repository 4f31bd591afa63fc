"""A host takes the calls that Megatron-Core makes to the CUDA runtime."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from model.backends import install_backends
from parallel import cuda_runtime
from tests.unit.world import fresh_world

install_backends("host")


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda"), torch.device("cuda:0")])
def test_cuda_means_the_cpu(device: str | torch.device) -> None:
    x = torch.zeros(2, 3)
    made = [
        torch.zeros(2, 3, device=device),
        torch.empty((2, 3), device=device),
        torch.tensor([1.0], device=device),
        torch.arange(4, device=device),
        torch.full((2,), 1.0, device=device),
        torch.zeros_like(x, device=device),
        torch.randn(2, device=device),
        x.new_ones(2, device=device),
        x.to(device),
        x.to(device, torch.float64),
        x.to(device=device, non_blocking=True),
        torch.nn.Linear(2, 2).to(device).weight,
        x.cuda(),
        torch.nn.Linear(2, 2).cuda().weight,
        torch.zeros(1, device=torch.cuda.current_device()),
    ]
    assert {t.device.type for t in made} == {"cpu"}
    assert made[9].dtype == torch.float64


def test_other_arguments_are_untouched() -> None:
    x = torch.ones(2)
    assert torch.empty(2, device="meta").device.type == "meta"
    assert x.to("meta").device.type == "meta"
    assert x.to(torch.int64).dtype == torch.int64
    assert x.to(torch.ones(1, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "dtype, name",
    [
        (torch.float32, "torch.cuda.FloatTensor"),
        (torch.float16, "torch.cuda.HalfTensor"),
        (torch.bfloat16, "torch.cuda.BFloat16Tensor"),
    ],
)
def test_type_names_are_those_the_optimizer_compares(dtype: torch.dtype, name: str) -> None:
    assert torch.zeros(1, dtype=dtype).type() == name
    assert torch.zeros(1).type(dtype).dtype == dtype


def test_nothing_takes_the_host_for_a_gpu() -> None:
    assert cuda_runtime.is_installed()
    assert not torch.cuda.is_available()
    assert torch.cuda.device_count() == 0
    assert not torch.zeros(1, device="cuda").is_cuda


def test_streams_and_events() -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        x = torch.ones(3) * 2
    stream.wait_stream(torch.cuda.current_stream())
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    time.sleep(0.002)
    end.record(stream)
    torch.cuda.current_stream().wait_event(end)
    torch.cuda.synchronize()
    x.record_stream(stream)
    assert stream.query() and end.query() and stream.record_event().query()
    assert start.elapsed_time(end) >= 2.0  # milliseconds
    assert not torch.cuda.is_current_stream_capturing()


def test_there_is_one_random_state() -> None:
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    first = torch.randn(4, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.randn(4), first)
    torch.manual_seed(3)
    assert torch.equal(torch.randn(4), first)


def test_megatron_tracker_forks_reproducibly() -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    def draw() -> tuple[torch.Tensor, ...]:
        with fresh_world(seed=5):
            torch.manual_seed(9)
            tracker = get_cuda_rng_tracker()
            before = torch.randn(3)
            with tracker.fork():
                a = torch.randn(3)
            between = torch.randn(3)
            saved = tracker.get_states()
            with tracker.fork():
                b = torch.randn(3)
            tracker.set_states(saved)
            with tracker.fork():
                assert torch.equal(torch.randn(3), b)
            return before, a, between, b

    first, second = draw(), draw()
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    before, a, between, b = first
    assert not torch.equal(a, b)
    torch.manual_seed(9)
    assert torch.equal(torch.randn(3), before)
    assert torch.equal(torch.randn(3), between), "a fork must leave the outer state alone"


def test_installing_twice_changes_nothing() -> None:
    watched = (torch.zeros, torch.Tensor.to, torch.Tensor.type, torch.cuda.Stream)
    cuda_runtime.install()
    assert watched == (torch.zeros, torch.Tensor.to, torch.Tensor.type, torch.cuda.Stream)


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_dynamo_can_be_imported_afterwards() -> None:
    run(
        "from parallel import cuda_runtime; cuda_runtime.install();"
        "import torch._dynamo, torch;"
        "from torch._dynamo.trace_rules import get_torch_obj_rule_map as table; table();"
        "assert torch.zeros(1, device='cuda').device.type == 'cpu'"
    )


def test_a_real_runtime_is_never_replaced() -> None:
    run(
        "import torch; from parallel import cuda_runtime;"
        "torch.cuda.is_available = lambda: True;\n"
        "stream = torch.cuda.Stream\n"
        "try: cuda_runtime.install()\n"
        "except RuntimeError as error: assert 'must not replace' in str(error)\n"
        "else: raise SystemExit('was installed')\n"
        "assert torch.cuda.Stream is stream"
    )
