"""mlx_lm's Nemotron-H, which shares no code with Megatron or transformers, in a process of its own.

    python -m tests.unit.mlx_reference FOLDER

FOLDER/mlx.json has the folders of the unpacked wheels mlx, mlx-cpu and mlx-lm, and `jobs`: each a
Hugging Face folder and the tokens whose logits go to `mlx.npy` in it.
"""

import ctypes
import json
import sys
from pathlib import Path

import numpy as np


def main(folder: Path) -> None:
    """Do the jobs of a folder."""
    task = json.loads((folder / "mlx.json").read_text())
    mlx, backend, models = (Path(wheel) for wheel in task["wheels"])
    ctypes.CDLL(str(backend / "mlx" / "lib" / "libmlx.so"), mode=ctypes.RTLD_GLOBAL)
    sys.path[:0] = [str(mlx), str(models)]
    import mlx.core as mx
    from mlx_lm.utils import load_model

    for job in task["jobs"]:
        model, _ = load_model(Path(job["folder"]))
        # Without one entry more it fails on models that have no Mamba or no attention layer.
        caches = [None] * (len(model.layers) + 1)
        found = model(mx.array(job["tokens"]), caches).astype(mx.float32)
        np.save(Path(job["folder"]) / "mlx.npy", np.array(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
