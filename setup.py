"""Packaging of megavl: the versions that are supported. constraints.txt has the exact ones that `make install` uses.

Exact pins have their reason beside them; every other bound is the version it was tried with.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "megavl" / "__init__.py").read_text(), re.MULTILINE)[1]

# tools/construct_data.py. Pages are rendered with the machine's own Chromium: playwright drives it and brings none.
CONSTRUCT = ["playwright~=1.65", "pypdfium2~=5.15", "markdown-it-py~=4.3"]

# tools/preprocess_data.py --engine ray.
RAY = ["ray>=2.60"]

setup(
    name="megavl",
    version=VERSION,
    description="3D-parallel pretraining of DeepSeek-VL vision-language models on PyTorch and DeepSpeed",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["megavl", "megavl.*"]),
    package_data={"megavl.data.inspect": ["page.html", "page.css", "page.js"]},
    python_requires=">=3.11",
    install_requires=[
        # The suite passes on both ends of this range. It is closed because DCP's planner hooks and varlen_attn are used
        # below their stable surface; what differs between these versions is in the files named versions.py.
        "torch>=2.11,<2.14",
        # Exact: its BF16 optimizer's fragments (`_hp_mapping`) are what a checkpoint is written from.
        "deepspeed==0.19.8",
        "numpy~=2.4",
        "pyarrow>=26.0.1",
        "sentencepiece~=0.2.3",
        "protobuf>=6",  # reads the pieces of a sentencepiece model, which its own package does not tell whole
        "tokenizers~=0.23.3",
        # The fast path of both. Wheels for every platform that torch has some for; it brings awkward and typer. An
        # optional one would leave most users ten times slower than they need be.
        "gigatoken~=0.10.0",
        "safetensors~=0.8.0",
        "pydantic~=2.14",
        "pyyaml~=6.0",
        "pillow>=13.0.0",
        "lxml~=6.1",  # from 6.0 on its libxml2 reads HTML's tokens as the standard has them
        "matplotlib~=3.11",
        "tensorboard~=2.21",
        "rich>=15.0",
        "psutil~=7.2",
    ],
    extras_require={
        # Exact: exported checkpoints are proven against the classes of this version.
        "hf": ["transformers==5.23.0"],
        "construct": CONSTRUCT,
        "ray": RAY,
        "dev": [
            *CONSTRUCT,
            *RAY,
            "pytest~=9.2",
            "pytest-xdist~=3.8",
            "hypothesis~=6.170",
            "packaging",  # compares this file with constraints.txt
            # Exact: the formatter's output differs between versions.
            "ruff==0.17.5",
            # Interprets our kernels, and compiles them without a GPU. CUDA builds of torch 2.11 to 2.13 pin their own.
            "triton>=3.6,<4; platform_system == 'Linux'",
            # Exact: the reference for the bytes of an indexed dataset. It brings torch, numpy and packaging, no more.
            "megatron-core==0.16.1",
        ],
        # NVIDIA apex is not here: the package of that name on the index is another project. It is built from source, as
        # docker/Dockerfile does; every operation has a torch reference without it.
        "gpu": ["flash-attn>=2.8"],
    },
)
