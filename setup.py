"""The packages: those under `mimo_jax/`, `kernels/` as `mimo_jax.kernels`, and the templates of `launch/` inside.

Everything else is in pyproject.toml.

`kernels` must never be installed as a top-level module: an existing package has that name and other libraries probe for
it.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["mimo_jax", "mimo_jax.*"]),
        "mimo_jax.kernels",
        *(f"mimo_jax.kernels.{name}" for name in find_packages("kernels")),
        "mimo_jax.launch",
    ],
    package_dir={"mimo_jax.kernels": "kernels", "mimo_jax.launch": "launch"},
)
