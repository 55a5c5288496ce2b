"""Prints the oldest version of everything that pyproject.toml allows, as constraints for pip.

torch is left out: it stays at the version that constraints.txt pins; and triton, where that torch names its own.
"""

import re
import tomllib
from importlib.metadata import requires
from pathlib import Path

chosen = {"torch"} | {"triton" for requirement in requires("torch") or () if requirement.startswith("triton")}
project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
for requirement in [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]:
    if (found := re.match(r"([\w.-]+)>=([\w.]+)", requirement)) and found[1] not in chosen:
        print(f"{found[1]}=={found[2]}")
