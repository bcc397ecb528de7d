"""An exported model taken to a model hub, for those who have one."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of the client that this version uses

from coterie.errors import ModelError, ProvenanceError
from coterie.models.split.card import promise_of
from coterie.models.split.trainings import read_trainings


def push(folder: Path, repository: str) -> str:
    """Upload an export; a repository that is not there yet is made, and is private.

    Args:
        folder: as `exporter.export` wrote it.
        repository: ``owner/name`` on the hub that the login is for.

    Returns:
        Where it is.

    Raises:
        ProvenanceError: private text was read without a budget, so the model is not to be given away.
        ModelError: the hub cannot be reached, or says no.
    """
    check_may_be_pushed(folder)
    try:
        hub = HfApi()
        hub.create_repo(repository, private=True, exist_ok=True)
        return str(hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="coterie export"))
    except (HTTPError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"The model could not be uploaded to {repository}: {reason}",
            code="hub-unreachable",
            fix=f"it is complete in {folder}; check name and login (`hf auth login`), or use another machine",
        ) from error


def check_may_be_pushed(folder: Path) -> None:
    """Refuse a model whose private text no budget protects.

    Raises:
        ProvenanceError: it is one.
    """
    if promise_of(read_trainings(folder)) == "none":
        raise ProvenanceError(
            f"The model in {folder} read private text without a privacy budget, so it is not uploaded.",
            code="hub-unprotected",
            why="a trained model gives parts of its text away to whoever may load it",
            fix="train within a budget (`privacy:`), or say of public text that it is (`data.provenance: public`)",
        )
