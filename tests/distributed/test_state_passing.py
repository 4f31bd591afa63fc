"""The Mamba-2 scan over ranks that pass states, in FP64, against one rank's scan.

One rank's scan is held to the recurrence in tests/unit/test_ssd.py.
"""

from itertools import product
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model.mamba_functions import Sizes
from model.state_passing import ScanParameters, scan_segments
from parallel.context import Segments, zigzag_segments
from tests.distributed.harness import run_distributed

SIZES = Sizes(heads=6, head_dim=4, groups=2, state_dim=5)
L, B, W = 64, 2, 4
BORDERS = (3, 13, 14, 32, 33, 57)
"""Documents that end inside, at the start and at the end of segments, one of one token."""
UNEVEN = {2: ((5, 64), ((0,), (1,))), 4: ((3, 20, 59, 64), ((2,), (0,), (3,), (1,)))}
"""Ends of segments, and each rank's: any order does."""


def inputs() -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """[z|x|B|C|dt], the parameters, documents, the gradient of the output."""
    g = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    channels = SIZES.inner + 2 * SIZES.grouped
    zxbcdt = normal(B, L, 2 * SIZES.inner + 2 * SIZES.grouped + SIZES.heads)
    parameters = [
        normal(channels, W),
        normal(channels),
        normal(SIZES.heads) - 2,
        -normal(SIZES.heads).exp(),
        normal(SIZES.heads),
    ]
    ids = (torch.arange(L).unsqueeze(1) >= torch.tensor(BORDERS)).sum(1)
    return zxbcdt, parameters, ids.to(torch.int32).expand(B, -1), normal(B, L, SIZES.inner)


def world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def scan_parameters(tensors: list[Tensor]) -> ScanParameters:
    conv_weight, conv_bias, dt_bias, A, D = tensors
    return ScanParameters(conv_weight, conv_bias, dt_bias, A, D, SIZES, 16)


def one_rank(packed: bool) -> list[Tensor]:
    """Output and gradients of the whole sequence."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined

    zxbcdt, parameters, ids, up = inputs()
    leaves = [t.requires_grad_() for t in (zxbcdt, *parameters)]
    y = mamba_split_conv1d_scan_combined(
        *leaves[:4],
        leaves[4],
        leaves[5],
        16,
        seq_idx=ids if packed else None,
        headdim=SIZES.head_dim,
        ngroups=SIZES.groups,
    )
    return [y.detach(), *torch.autograd.grad(y, leaves, up)]


def check(rank: int, ranks: int) -> None:
    ends, owners = UNEVEN[ranks]
    layouts = [zigzag_segments(world(), L), Segments(world(), ends, owners)]
    for segments, packed in product(layouts, (False, True)):

        def mine(t: Tensor, segments: Segments = segments) -> Tensor:
            return torch.cat([t[:, slice(*segments.span(j))] for j in segments.own], 1)

        zxbcdt, parameters, ids, up = inputs()
        wanted_y, wanted_dx, *wanted = one_rank(packed)
        leaves = [t.detach().clone().requires_grad_() for t in (mine(zxbcdt), *parameters)]
        y = scan_segments(
            leaves[0],
            scan_parameters(leaves[1:]),
            segments,
            ids if packed else None,
        )
        dx, *found = torch.autograd.grad(y, leaves, mine(up))
        torch.testing.assert_close(y, mine(wanted_y))
        torch.testing.assert_close(dx, mine(wanted_dx))
        for gradient in found:
            dist.all_reduce(gradient)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("ranks", [2, 4])
def test_equals_one_rank(ranks: int) -> None:
    run_distributed(check, ranks)


def check_bytes(rank: int, ranks: int, length: int) -> int:
    """Elements this rank gathers, forward and backward."""
    zxbcdt, parameters, *_ = inputs()
    x = zxbcdt[:, : length // ranks].clone().requires_grad_()
    segments = zigzag_segments(world(), length)
    name = "all_gather_into_tensor"
    with mock.patch.object(dist, name, wraps=getattr(dist, name)) as gather:
        scan_segments(x, scan_parameters(parameters), segments).sum().backward()
    return sum(call.args[0].numel() for call in gather.call_args_list)


def test_communication_does_not_depend_on_the_length() -> None:
    """2 cp segments of (w - 1) c elements and of h (p n + 1) forward, h p n backward."""
    heads, head_dim, _, state_dim = SIZES
    halo = (W - 1) * (SIZES.inner + 2 * SIZES.grouped)
    expected = 4 * B * (2 * halo + heads * (2 * head_dim * state_dim + 1))
    for length in (16, 64):
        assert run_distributed(check_bytes, 2, length) == [expected, expected]
