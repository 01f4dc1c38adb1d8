"""From what a user calls a model to a folder on this machine."""

import re
from pathlib import Path

from lvlm_prune.demo import NAMES, checkpoint
from lvlm_prune.errors import InputError, first_line

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Everything a checkpoint is made of, but no pickles and no second copy of the weights in another format.
_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py"]
_UNWANTED = ["original/*", "consolidated*", "onnx/*"]


def resolve(path: str | Path, revision: str | None = None) -> Path:
    """The checkpoint folder that `path` stands for.

    Args:
        path: A folder, the id of a model on the Hugging Face hub (`owner/name`, downloaded once and cached), or a name
            of the embedded model: `demo`, or `demo-outliers`, which is made once and cached.
        revision: Branch, tag or commit of a hub model.

    Raises:
        InputError: There is no such folder and no such model, or the hub cannot be reached.
    """
    text = str(path)
    if text in NAMES:
        try:
            return checkpoint(text)
        except OSError as error:
            raise InputError("model.path", text, f"cannot be made in the cache of HF_HOME: {error}") from None
    folder = Path(text).expanduser()
    # An empty path would stand for the current folder.
    if text and folder.exists():
        if revision is not None:
            raise InputError("model.revision", revision, f"{text} is a folder; only a model on the hub has revisions")
        return folder
    if not _HUB_ID.fullmatch(text):
        raise InputError("model.path", text, "no such folder (a model on the hub is written owner/name)")
    return _download(text, revision)


def _download(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except GatedRepoError:
        problem = "access to this model must be asked for on its hub page, and you must be logged in (`hf auth login`)"
    except RepositoryNotFoundError:
        problem = "no such folder, and no such model on the hub (or it is private and you are not logged in)"
    except RevisionNotFoundError:
        raise InputError("model.revision", revision, f"{hub_id} has no such revision") from None
    except LocalEntryNotFoundError:
        problem = "no such folder, and the hub cannot be reached to download a model of this name"
    except HFValidationError:
        problem = "no such folder (a model on the hub is written owner/name)"
    except HfHubHTTPError as error:
        problem = f"no such folder, and the hub answers: {first_line(error)}"
    except OSError as error:
        problem = f"no such folder, and downloading it from the hub failed: {error}"
    raise InputError("model.path", hub_id, problem)


def hub_name(path: str | Path, folder: str | Path = "") -> str | None:
    """What a checkpoint is called on the hub, as far as its place tells.

    Args:
        path: As a user named it.
        folder: Where it lies; one in the cache of the hub carries its name.

    Returns:
        `owner/name`; None for a folder of which nothing is known.

    Example:
        >>> hub_name("me/model"), hub_name("./mine", "/cache/models--me--model/snapshots/1f0a"), hub_name("./mine")
        ('me/model', 'me/model', None)
    """
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/", Path(folder).as_posix() + "/")
    if cached:
        return f"{cached[1]}/{cached[2]}"
    text = str(path)
    is_id = _HUB_ID.fullmatch(text) is not None and not Path(text).exists()
    return text if is_id else None
