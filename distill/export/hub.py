"""Uploading an exported folder. The token is huggingface_hub's own business: it is never read, kept or shown here."""

from pathlib import Path

from huggingface_hub import HfApi

from ..errors import RunError
from .formats import has_model


def push(folder: Path, repo_id: str, private: bool = False) -> str:
    """Makes the repository if it is not there and uploads the folder; returns its address.

    Raises:
        RunError: the folder is no finished export, the hub refuses, or it cannot be reached. One line.
    """
    for found, what in ((has_model(folder), "model"), ((folder / "README.md").is_file(), "README.md")):
        if not found:
            raise RunError(f"'{folder}' is no exported folder: it has no {what}")
    if repo_id.count("/") != 1 or not all(repo_id.split("/")):
        raise RunError(f"'{repo_id}' is no repository; expected OWNER/NAME")
    api = HfApi(library_name="transpoint")
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload a Transpoint export")
    except Exception as error:  # the client raises many kinds; each is one thing to a person
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(
            f"'{repo_id}' could not be uploaded: {line}; `hf auth login` or HF_TOKEN gives access"
        ) from error
    return f"{api.endpoint}/{repo_id}"
