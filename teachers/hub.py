"""Which commit of a hub repository is meant. Loads nothing heavy before it is asked."""

from functools import lru_cache

from .errors import TeacherError
from .names import is_hub_id

TIMEOUT = 10  # seconds


class HubError(Exception):
    """A repository that cannot be looked up. The message is the end of a line that begins with its name."""


@lru_cache
def hub_commit(name: str, revision: str | None = None, kind: str = "model") -> str:
    """The commit that a branch, tag or commit (None: the default branch) of OWNER/NAME stands for now.

    The hub says so; where it cannot be reached, its cache on this machine. In a process it is asked once: what runs for
    days goes on with the commit it began with. kind: model or dataset.

    Raises HubError: it is not there, not open to us, has no such revision, or neither hub nor cache can say.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    class Api(HfApi):
        def repo_info(self, *args, **kwargs):  # `resolve_revision` itself would wait for ever
            return super().repo_info(*args, timeout=TIMEOUT, **kwargs)

    api = Api(library_name="transpoint")
    access = "`hf auth login` or HF_TOKEN gives access"
    try:
        return api.resolve_revision(name, repo_type=kind, revision=revision).resolved
    except RevisionNotFoundError as error:
        raise HubError(f"has no revision '{revision}' on the hub: name a branch, a tag or a commit") from error
    except GatedRepoError as error:
        place = f"{api.endpoint}/{'' if kind == 'model' else f'{kind}s/'}{name}"
        raise HubError(f"is gated: ask for access at {place}; then {access}") from error
    except RepositoryNotFoundError as error:
        raise HubError(f"is not on the hub, or private: check the name; if it is private, {access}") from error
    except Exception as error:  # of the network, of the hub: the client raises many kinds
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if status in (401, 403):
            raise HubError(f"is not open to us ({status}): {access}") from error
        reason = error.__cause__ or error  # what the network said, where it was asked in vain
        line = next((line.strip() for line in str(reason).splitlines() if line.strip()), "")
        raise HubError(
            f"cannot be looked up ({type(reason).__name__}: {line}) and is not in the hub's cache here: check the "
            "network, or name a local copy"
        ) from error


def teacher_commit(source: str, revision: str | None = None) -> str | None:
    """The commit of a teacher from the hub, see `hub_commit`; None for any other.

    Raises TeacherError: it cannot be found out, or a revision is given of a teacher that has none.
    """
    if not is_hub_id(source):
        if revision is not None:
            raise TeacherError(f"teacher '{source}' is not from the hub: leave out its revision, '{revision}'")
        return None
    try:
        return hub_commit(source, revision)
    except HubError as error:
        raise TeacherError(f"teacher '{source}' {error}") from error
