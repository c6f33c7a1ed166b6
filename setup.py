"""Which packages the wheel holds; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

# What the Hub receives lives at the top of the repository; the wheel carries it inside the package.
PUBLISHED = ("pipelines", "schedulers_ext")

published = [name for top in PUBLISHED for name in find_packages(include=[top, f"{top}.*"])]
ours = find_packages(include=["diffusers_repr", "diffusers_repr.*"])
setup(
    packages=[*ours, *(f"diffusers_repr.{name}" for name in published)],
    package_dir={f"diffusers_repr.{top}": top for top in PUBLISHED},
    package_data={"diffusers_repr": ["py.typed"], **{f"diffusers_repr.{name}": ["README.md"] for name in published}},
)
