"""An exported folder to the Hugging Face hub."""

import re
from pathlib import Path

from gidd_jax.errors import InputError, first_line


def check_repository(name: str) -> str:
    """Return owner/name of a repository; InputError for what is none."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise InputError(f"--push={name}: must be OWNER/NAME of a repository on the hub")
    return name


def push(
    folder: str | Path, name: str, *, private: bool = False, endpoint: str | None = None
) -> str:
    """Upload a folder as a new repository OWNER/NAME, and return its address.

    The token is the one that `hf auth login` keeps, or HF_TOKEN. endpoint: another hub. Raises
    InputError when the repository exists, or the hub takes nothing; the folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint)
    try:
        address = api.create_repo(check_repository(name), private=private)
    except InputError:
        raise
    except Exception as error:  # whatever the hub client raises
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = "it exists, and nothing is overwritten: name another" if status == 409 else None
        raise InputError(f"--push={name}: {reason or first_line(error)}") from error
    try:
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Add the model")
    except Exception as error:
        raise InputError(
            f"--push={name}: the repository was made, and the upload failed "
            f"({first_line(error)}): go on with hf upload {name} {folder}"
        ) from error
    return str(address)
