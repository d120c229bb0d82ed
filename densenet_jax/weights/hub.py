"""Names of published weights as files on disk."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from etils import epath

from densenet_jax.choices import did_you_mean
from densenet_jax.files import as_path
from densenet_jax.runs.description import Description
from densenet_jax.weights import config_json, download
from densenet_jax.weights.pretrained import PRETRAINED, SOURCES

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# A pathlib.Path makes one slash of two.
_HUB = re.compile(
    r"hf:/{1,2}(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?"
    r"(?:/(?P<file>.+))?"
)
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".h5", ".keras")
_PLAIN = re.compile(r"(?P<scheme>https?):/{1,2}(?P<rest>[^/].*)")

_TIMEOUT = 10  # seconds for the hub to answer


def resolve(weights: str | Path) -> tuple[Path, Description]:
    """Where weights lie on disk, downloaded if need be.

    Args:
      weights: what exists as a path is that path; else a name of
        `list_pretrained`; hf://ORG/REPO of the Hugging Face hub, with
        @REVISION or /FILE after it if wished; or an address http(s)://..., with
        #sha256=DIGITS after it if known; or the directory of a run in a
        bucket, gs://BUCKET/RUN. Anything else is taken as a path.

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
    if re.match("gs:/", name) and not os.path.exists(path):
        return _run_in_bucket(name), Description()
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


def _run_in_bucket(name: str) -> epath.Path:
    run = as_path(name)
    if not (run / "checkpoints").is_dir():
        raise ValueError(
            "from a bucket only the directory of a run is read, and there is "
            "no checkpoints/ in it: copy files to this machine first."
        )
    return run


def push(directory: str | Path, repo: str) -> str:
    """Uploads a directory of `save_pretrained` to the Hugging Face hub.

    Args:
      repo: ORG/NAME of the repository, made if need be. The hub asks for a
        token: of `hf auth login`, or in HF_TOKEN.

    Returns:
      The page of the repository.

    Raises:
      OSError, ValueError: it cannot be uploaded.
    """
    with _one_line(f"Cannot upload to {repo}", repo):
        api = _api()
        page = api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=directory)
    return str(page)


def _api() -> "HfApi":
    import huggingface_hub  # Takes long to import.

    return huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))


def _from_hub(repo: str, revision: str | None, file: str | None) -> Path:
    """A file of a repository; or its directory, where it has config.json."""
    with _one_line(f"Cannot download hf://{repo}", repo):
        # A revision's slashes, as in refs/pr/1, are escaped.
        where = {"repo_id": repo, "revision": revision and unquote(revision)}
        api = _api()
        files, offline = _list_files(api, where)
        names = [file] if file else _to_load(files)
        where |= {"local_files_only": offline}
        found = [Path(api.hf_hub_download(filename=n, **where)) for n in names]
        if len({path.parent for path in found}) > 1:
            raise OSError("it was changed meanwhile: run this again")
        return found[0].parent if len(found) > 1 else found[0]


def _list_files(
    api: "HfApi", where: dict[str, str | None]
) -> tuple[list[str], bool]:
    """The names in a repository, and whether only those on this disk."""
    from huggingface_hub import errors

    try:
        # It does not try for long, as a download does.
        info = api.model_info(**where, timeout=_TIMEOUT)
        return [item.rfilename for item in info.siblings], False
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise
    except (errors.HTTPError, OSError) as error:
        try:
            root = Path(api.snapshot_download(**where, local_files_only=True))
        except errors.LocalEntryNotFoundError:
            raise OSError(
                f"the hub is not reached ({_first_line(error)}): put "
                f"{config_json.CONFIG} and {config_json.WEIGHTS[0]} into a "
                "directory by hand, and give its path"
            ) from error
        paths = [path for path in root.rglob("*") if path.is_file()]
        return [path.relative_to(root).as_posix() for path in paths], True


def _to_load(files: list[str]) -> list[str]:
    """Of the names in a repository, those to download: the weights last."""
    config = [name for name in [config_json.CONFIG] if name in files]
    for name in config_json.WEIGHTS:
        if name in files:
            return [*config, name]
    return [_only_weights(files)]


def _only_weights(files: list[str]) -> str:
    found = [name for name in files if name.endswith(_SUFFIXES)]
    if len(found) != 1:
        raise ValueError(
            f"{len(found)} files of weights are in it, expected one "
            f"({', '.join(found[:9]) or 'none'}): give hf://ORG/REPO/FILE"
        )
    return found[0]


@contextlib.contextmanager
def _one_line(what: str, repo: str) -> Iterator[None]:
    """Says what failed, and what to do, in a line."""
    from huggingface_hub import errors

    remedies = {
        errors.GatedRepoError: "its owner wants to be asked: open "
        f"https://huggingface.co/{repo}, then log in by `hf auth login`",
        errors.RepositoryNotFoundError: "there is no such repository, or it is "
        "private: log in by `hf auth login`",
        errors.RevisionNotFoundError: "there is no such revision",
        errors.RemoteEntryNotFoundError: "there is no such file in it",
        errors.LocalEntryNotFoundError: "the hub is not reached, and this file "
        "was not downloaded before",
    }
    try:
        yield
    except (errors.HTTPError, OSError, ValueError) as error:
        said = [text for k, text in remedies.items() if isinstance(error, k)]
        raise OSError(f"{what}: {[*said, _first_line(error)][0]}.") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")
