"""Installs the four rooms of the repository as `ssast.engine`, `ssast.kernels`, `ssast.benchmarks` and
`ssast.configs`.
"""

from setuptools import find_packages, setup

ROOMS = ("engine", "kernels", "benchmarks", "configs")

EXPORT = ["transformers>=5.23", "onnx>=1.23", "onnxscript>=0.7", "onnxruntime>=1.32"]

packages, package_dir = [], {}
for room in ROOMS:
    package_dir[f"ssast.{room}"] = room
    packages += [f"ssast.{room}"] + [f"ssast.{room}.{sub}" for sub in find_packages(room)]

setup(
    name="ssast-engine",
    version="0.1.0",
    description="A pretraining engine for self-supervised audio spectrogram transformers",
    license="BSD-3-Clause",
    python_requires=">=3.11",
    packages=packages,
    package_dir=package_dir,
    package_data={
        "ssast.configs": ["*.yaml", "*/*.yaml"],
        "ssast.engine": ["py.typed", "*/*.html.j2"],
        "ssast.kernels": ["py.typed"],
        "ssast.benchmarks": ["results/*.csv", "*/*.j2"],
    },
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "deepspeed>=0.19.8",
        "nvidia-dali-cuda130>=2.4.0; platform_system == 'Linux'",
        "nvidia-ml-py>=12.535",
        "filelock>=3.12",
        "numpy<2.5",
        "psutil>=5.9",
        "pydantic>=2.7",
        "PyYAML>=6.0",
        "tqdm>=4.66",
        "safetensors>=0.5",
        "soundfile>=0.13",
        "av>=14",
        "soxr>=1.0",
        "tensorboard>=2.18",
        "matplotlib>=3.9",
        "Pillow>=11",
        "Jinja2>=3.1",
        "scikit-learn>=1.5",
        "scipy>=1.11",
    ],
    extras_require={
        # flash-attn and NVIDIA apex are found at run time by the features they have. apex is on no package index (the
        # `apex` of PyPI is another project): README tells how to build it.
        "flash": ["flash-attn>=2.8; platform_system == 'Linux'"],
        "wandb": ["wandb>=0.19"],
        # torchcodec needs FFmpeg's shared libraries; torchaudio, where it is, lends its fbank to the official way
        "bench": ["webdataset>=1.0", "braceexpand>=0.1.7", "torchcodec>=0.13; platform_system == 'Linux'"],
        "parquet": ["pyarrow>=18"],
        "export": EXPORT,
        "test": [
            *EXPORT,
            "pyarrow>=18",
            "webdataset>=1.0",
            "braceexpand>=0.1.7",
            "pytest>=8.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.120",
            "ruff>=0.14",
            "mypy>=1.18",
            "types-PyYAML",
            "types-psutil",
            "types-tqdm",
        ],
    },
    entry_points={
        "console_scripts": ["ssast = ssast.engine.cli:command"],
        # what rooms above the engine add to its command line
        "ssast.verbs": [
            "profile = ssast.benchmarks.throughput.profile:main",
            "report = ssast.benchmarks.report:main",
            "bench = ssast.benchmarks.bench:main",
        ],
    },
)
