"""`python -m parallel.all_reduce 16`: sum 16 MB over all ranks once, before a run trusts them.

Started as the ranks of the run are (srun, one task a rank); on GPUs through NCCL, else gloo.
"""

import os
import sys
import time


def main() -> None:
    """Reduce, compare with the sum that must come out, say how long it took.

    Raises:
        RuntimeError: a rank cannot be reached, or the sum is wrong.
    """
    import torch
    import torch.distributed as dist

    env = os.environ
    rank, ranks = int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"])
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(env["SLURM_LOCALID"])) if cuda else torch.device("cpu")
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        # Not the run's own port, which the next step needs.
        init_method=f"tcp://{env['MASTER_ADDR']}:{int(env['MASTER_PORT']) + 1}",
        rank=rank,
        world_size=ranks,
        device_id=device if cuda else None,
    )
    numbers = torch.full((int(float(sys.argv[1]) * 1e6 / 4),), rank + 1.0, device=device)
    started = time.perf_counter()
    dist.all_reduce(numbers)
    wrong = int((numbers != ranks * (ranks + 1) / 2).sum().item())
    seconds = time.perf_counter() - started
    dist.destroy_process_group()
    if wrong:
        raise RuntimeError(f"rank {rank}: {wrong} of {len(numbers)} sums are wrong")
    print(f"rank {rank} of {ranks}: {numbers.nbytes / 1e6:g} MB in {seconds:.3f} s")


if __name__ == "__main__":
    main()
