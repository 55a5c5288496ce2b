"""What a result depends on, as JSON that is compared: what changes no result is no part of it."""

import dataclasses
import hashlib
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from ...students.config import StudentConfig
from ...teachers.errors import TeacherError
from ...teachers.hub import teacher_commit
from ...teachers.names import is_hub_id
from ..config import Recipe
from ..data.sources import DataError, source_identity
from ..settings import resultless
from .files import read_json, sha256

# Of a folder, the files that loading a model reads.
_MODEL_FILE = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|processor_config"
    r"|preprocessor_config|tekken)\.json|(merges|vocab)\.txt|chat_template\.(jinja|json)"
    r"|.*\.(safetensors|safetensors\.index\.json|gguf|model|model\.v\d+|tiktoken|py)"
)


def identity(depends_on: dict) -> str:
    """A short hash of what a stage depends on."""
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]


def file_identity(source: str, revision: str | None = None) -> Any:
    """Stands for a teacher's files in an identity: names and contents of what loading it reads; of one from the hub,
    its commit. For anything else, the name itself.

    Raises TeacherError where the commit cannot be found out.
    """
    if commit := teacher_commit(source, revision):
        return {"hub": source, "commit": commit}
    path = Path(source).expanduser()
    if not path.exists():
        return source
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    return [[p.name, _content(p)] for p in files if _MODEL_FILE.fullmatch(p.name)]


def model_files(files: Any) -> Any:
    """Of a `file_identity`, what counts: those of earlier versions have all files of a folder, and of a hub teacher no
    commit, which is taken for the present one."""
    if isinstance(files, str) and is_hub_id(files):
        return _present(files)
    if not isinstance(files, list):
        return files
    return [[name, content] for name, content in files if _MODEL_FILE.fullmatch(name)]


def without_resultless(needs: dict) -> dict:
    """What a stage depends on without the settings that change no result."""
    needs = dict(needs)
    if "teacher" in needs and "files" in needs["teacher"]:
        files = model_files(needs["teacher"]["files"])
        needs["teacher"] = {**needs["teacher"], "files": files}
        if isinstance(files, list):  # wherever they lie
            needs["teacher"].pop("source", None)
    if "student" in needs:
        needs["student"] = StudentConfig(**needs["student"]).facts()
    sections: dict[str, Any] = {entry.name: entry.type for entry in dataclasses.fields(Recipe.schema())}
    for section, kind in sections.items():
        if section in needs and section != "student":
            left_out = resultless(kind, needs[section])
            needs[section] = {name: value for name, value in needs[section].items() if name not in left_out}
    return needs


def started(run: Path, stage: str) -> dict | None:
    """What the stage.json of a run's stage holds, as today's version writes it; None where there is none.

    Earlier versions kept what changes no result, too, began no text, and knew no commits.
    """
    found = read_json(run / stage / "stage.json")
    if not isinstance(found, dict):
        return None
    try:
        today = _with_commits(without_resultless(found))
    except (AttributeError, KeyError, TypeError, ValueError):  # not of this form: it will differ, and says so
        return found
    if "data" in today and "bos" not in today["data"]:
        today["data"] = {**today["data"], "bos": _begins_nothing(run / "transfer" / "student")}
    if not isinstance(today.get("after", {}), dict):  # damaged
        today["after"] = {}
    for before, recorded in today.get("after", {}).items():
        own = read_json(run / before / "stage.json")
        if isinstance(own, dict) and identity(own) == recorded:
            today["after"] = {before: identity(cast(dict, started(run, before)))}
    return today


def _with_commits(needs: Any) -> Any:
    """What a stage depends on with the commits of its text from the hub; where there are none, the present ones."""
    if isinstance(needs, dict):
        return {name: _with_commits(value) for name, value in needs.items()}
    if isinstance(needs, list):
        old = len(needs) == 1 and isinstance(needs[0], str) and needs[0].startswith("hub:")
        return _present(needs[0]) if old else [_with_commits(value) for value in needs]
    return needs


@lru_cache
def _present(source: str) -> Any:
    """The identity of a teacher or text from the hub now; what earlier versions had in its place where that cannot be
    found out."""
    try:
        return source_identity(source) if source.startswith("hub:") else file_identity(source)
    except (DataError, TeacherError):
        return [source] if source.startswith("hub:") else source


@lru_cache(maxsize=8)
def _begins_nothing(student: Path) -> bool:
    """Whether the tokenizer of a run puts nothing before a text: then it does not matter whether it is asked to."""
    from transformers import AutoTokenizer

    from ..tokenizers import beginning

    try:
        return not beginning(AutoTokenizer.from_pretrained(student))
    except Exception:  # there is none yet, or it is damaged: then nothing is known
        return False


def _content(path: Path) -> str:
    """A hash of a file; of very large ones the size and the time it was written, which is quicker to read."""
    facts = path.stat()
    if facts.st_size > 2**30:
        return f"{facts.st_size} bytes of {facts.st_mtime_ns}"
    return sha256(path)[:16]
