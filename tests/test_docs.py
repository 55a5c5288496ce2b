"""The pages of the site, beside what `make docs` itself refuses."""

import re

import pytest

from run_files import ROOT

STUBS = sorted(path for part in ("distill", "students", "teachers") for path in (ROOT / part).rglob("__init__.pyi"))


@pytest.mark.parametrize("stub", STUBS, ids=lambda path: path.parent.name)
def test_the_reference_has_what_a_package_offers(stub):
    folder = stub.parent.relative_to(ROOT)
    page = (ROOT / "docs" / "reference" / f"{folder.parts[0]}.md").read_text(encoding="utf-8")
    offered = {".".join(("transpoint", *folder.parts, name)) for name in re.findall(r" as (\w+)", stub.read_text())}
    assert offered <= set(re.findall(r"^::: (\S+)$", page, re.MULTILINE))
