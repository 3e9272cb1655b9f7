"""Package metadata. `pip install -e ".[test]"` for work on the code, `pip install .` for use."""

from setuptools import find_packages, setup

setup(
    name="ibq",
    version="0.1.0",
    description="A trainer for discrete image tokenizers (index backpropagation quantization)",
    license="Apache-2.0",
    python_requires=">=3.10",
    # Saying where the packages lie makes an editable install a plain path entry. Without it setuptools installs an
    # import hook that is asked last, and any folder called `data` in the working directory would win over ours.
    package_dir={"": "."},
    packages=find_packages(
        include=["trainer", "trainer.*", "model_zoo", "model_zoo.*", "data", "data.*", "tools", "tools.*", "ds_configs"]
    ),
    package_data={
        "model_zoo": ["recipes/**/*.yaml", "published.yaml"],
        "data": ["sources.yaml"],
        "ds_configs": ["*.json"],
        "tools": ["*.sbatch"],
    },
    install_requires=[
        "torch>=2.11",
        "torchvision",
        "deepspeed>=0.19.8,<0.20",  # patch releases have broken runs before: widen only after the tests pass
        "webdataset>=1.0.2,<2",
        "fsspec[http]>=2024.6",
        "lpips>=0.1.4",
        "torch-fidelity>=0.4.0",
        "tensorboard>=2.21",  # earlier ones import pkg_resources, which setuptools 82 removed
        "omegaconf>=2.3",
        "typer>=0.19",
        "rich>=13",
        "safetensors>=0.4.3",
        "scikit-image>=0.24",
        "scipy>=1.11",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "pillow>=10.1",
        "opencv-python-headless>=4.8",  # the resize of the published ImageNet runs
        "packaging>=23",
    ],
    extras_require={
        # Attention and loss of generators. NVIDIA's apex has no wheel: PyPI's `apex` is another project.
        "gpu": ["flash-attn>=2.6", "liger-kernel>=0.8.5"],
        "s3": ["s3fs>=2024.6"],
        "gs": ["gcsfs"],
        "hub": ["huggingface_hub>=0.24"],  # models by their name on the hub, data of hf://
        "semantic": ["timm>=1.0.16"],  # the frozen encoders of loss.semantic and discriminator.kind=dino
        "test": [
            *("pytest>=8", "pytest-xdist>=3.6", "ruff>=0.12", "setuptools>=77", "s3fs>=2024.6", "moto[server]>=5"),
            "huggingface_hub>=0.24",
            "timm>=1.0.16",
            "liger-kernel>=0.8.5",  # in Triton's interpreter
        ],
        "dev": ["pre-commit>=3.5"],
    },
    entry_points={"console_scripts": ["ibq = tools.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Image Processing",
    ],
)
