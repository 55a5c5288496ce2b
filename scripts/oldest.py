"""Prints the oldest version of everything that pyproject.toml allows, as constraints for pip.

torch is left out: it stays at the version that constraints.txt pins.
"""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
for requirement in [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]:
    if (found := re.match(r"([\w.-]+)>=([\w.]+)", requirement)) and found[1] != "torch":
        print(f"{found[1]}=={found[2]}")
