"""Damaged files of weights: an error of one line, or what was whole."""

import io
import zipfile
from pathlib import Path

import pytest

from tests.mutations import try_mutations

GOLDEN = Path(__file__).parent / "data" / "weights"


def archive() -> bytes:
    """A .keras archive."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("config.json", "{}")
        file.write(GOLDEN / "keras.weights.h5", "model.weights.h5")
    return content.getvalue()


FILES = {
    "training.pth": True,
    "module.pth": True,
    "old_format.pth": False,
    "old_module.pth": False,
    "timm.safetensors": False,
    "keras.h5": False,
    "keras.weights.h5": False,
    "net.keras": True,
}


@pytest.mark.parametrize(
    "count", [40, pytest.param(1000, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", FILES)
def test_mutated_files(tmp_path, name, count):
    content = archive() if name == "net.keras" else (GOLDEN / name).read_bytes()
    path = tmp_path / name
    counts = try_mutations(path, content, count, checksums=FILES[name])
    assert counts["refused"] > count / 20, counts
