"""Names of published weights as files on disk."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from densenet_jax.choices import did_you_mean
from densenet_jax.runs.description import Description
from densenet_jax.weights import directories, download
from densenet_jax.weights.pretrained import PRETRAINED, SOURCES

# A pathlib.Path makes one slash of two.
_HUB = re.compile(
    r"hf:/{1,2}(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?"
    r"(?:/(?P<file>.+))?"
)
_PLAIN = re.compile(r"(?P<scheme>https?):/{1,2}(?P<rest>[^/].*)")


def resolve(weights: str | Path) -> tuple[Path, Description]:
    """Where weights lie on disk, downloaded if need be.

    Args:
      weights: what exists as a path is that path; else a name of
        `list_pretrained`; hf://ORG/REPO of the Hugging Face hub, with
        @REVISION or /FILE after it if wished; or an address http(s)://..., with
        #sha256=DIGITS after it if known. Anything else is taken as a path.

    Returns:
      A file or a directory for `open_tensors`, and what the name says of the
      net.

    Raises:
      FileNotFoundError: the name begins as one of `list_pretrained`, but is
        none of them.
      OSError, ValueError: it cannot be downloaded; the message says what to do.
    """
    path = os.path.expanduser(weights)
    name = str(weights)
    if os.path.exists(path):
        return Path(path), Description()
    if name in PRETRAINED:
        found, _ = resolve(PRETRAINED[name].address)
        return found, PRETRAINED[name].description
    if match := _HUB.fullmatch(name):
        return _from_hub(**match.groupdict()), Description()
    if match := _PLAIN.fullmatch(name):
        address = f"{match['scheme']}://{match['rest']}"
        return download.fetch(address), Description()
    if name.partition("/")[0] in SOURCES:
        raise FileNotFoundError(
            f"{name} is neither a file nor published weights."
            f"{did_you_mean(name, PRETRAINED)} "
            "densenet_jax.list_pretrained() lists these."
        )
    return Path(path), Description()


def push(directory: str | Path, repo: str) -> str:
    """Uploads a directory of `save_pretrained` to the Hugging Face hub.

    Args:
      repo: ORG/NAME of the repository, made if need be; needs a token, from
        `hf auth login` or in HF_TOKEN.

    Returns:
      The page of the repository.

    Raises:
      OSError, ValueError: it cannot be uploaded.
    """
    import huggingface_hub  # Takes long to import.

    with _one_line(repo, "Cannot upload"):
        huggingface_hub.create_repo(repo, exist_ok=True)
        huggingface_hub.upload_folder(repo_id=repo, folder_path=directory)
    return f"{huggingface_hub.constants.ENDPOINT}/{repo}"


def _from_hub(repo: str, revision: str | None, file: str | None) -> Path:
    """A file of a repository, or the directory of config.json and weights."""
    import huggingface_hub  # Takes long to import.
    from huggingface_hub import errors

    # In names of revisions, as refs/pr/1, slashes are escaped.
    where = dict(repo_id=repo, revision=revision and unquote(revision))

    def get(name):
        return Path(huggingface_hub.hf_hub_download(filename=name, **where))

    with _one_line(repo, "Cannot download"):
        if file:
            return get(file)
        for name in directories.WEIGHTS:
            with contextlib.suppress(errors.RemoteEntryNotFoundError):
                found = get(name)
                break
        else:
            found = get(_only_weights(huggingface_hub.list_repo_files(**where)))
            return found
        with contextlib.suppress(errors.RemoteEntryNotFoundError):
            get(directories.CONFIG)
    return found.parent
