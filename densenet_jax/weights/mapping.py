"""A layout that a user writes, for nets that follow no known one."""

import re
import tomllib
from pathlib import Path

from densenet_jax.models.variants import create_model
from densenet_jax.weights.layouts import Layout


def read_mapping(path: str | Path) -> Layout:
    r"""A layout from a TOML file, of places for names, beside the known ones.

    The keys are `Layout`'s without `signs`; patterns are tried on the names in
    the file as they are:

        first_layer = 0
        attributes = {norm_epsilon = 1e-3, stem_pool = false}
        [rules]
        'stem\.conv' = 'conv0'
        'auxiliary' = ''  (left out; tensors outside of modules: '' = '')
        'b(?P<block>\d+)\.l(?P<layer>\d+)\.(?P<kind>norm|conv)(?P<n>[12])' =
            'denseblock{block}/denselayer{layer}/{kind}{n}'  (in one line)

    Raises:
      ValueError: not such a file.
    """
    try:
        content = tomllib.loads(Path(path).expanduser().read_text())
        epsilon = content.pop("norm_epsilon", None)  # of earlier versions
        layout = Layout(name=str(path), **content)
        if epsilon is not None:
            layout.attributes["norm_epsilon"] = epsilon
        for key, default in vars(Layout("", {})).items():
            kind = bool | None if key == "newest_first" else type(default)
            if not isinstance(getattr(layout, key), kind):
                raise TypeError(f"{key} must be {type(default).__name__}")
        create_model("densenet121", **layout.attributes)  # checks them
        for pattern, place in layout.rules.items():
            groups = re.compile(pattern).groupindex
            place.format(**dict.fromkeys(groups, 1))
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        re.error,
    ) as error:
        raise ValueError(f"{path} is no mapping of names: {error}") from error
    return layout
