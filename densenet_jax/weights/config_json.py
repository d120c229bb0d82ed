"""config.json beside weights, as the Hugging Face hub has it.

timm reads and writes it; a key of our own holds what timm has no key for. Files
of others may have some of timm's keys, or transformers' id2label.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from densenet_jax.models import geometry
from densenet_jax.models.densenet import DenseNet
from densenet_jax.models.layers import ACTIVATIONS
from densenet_jax.models.options import unseen_differences
from densenet_jax.models.variants import VARIANTS
from densenet_jax.runs.config import make_model
from densenet_jax.runs.description import Description

CONFIG = "config.json"
# Beside it, the first that is there.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")

_OURS = "densenet_jax"
_TASKS = {
    "single_label_classification": "classification",
    "multi_label_classification": "multilabel",
}

# timm's functions, by the stem and the blur pooling that they give any net.
_TIMM = {
    ("imagenet", "none"): (
        "densenet121",
        "densenet161",
        "densenet169",
        "densenet201",
    ),
    ("deep", "none"): ("densenet264d",),
    ("deep", "stem"): ("densenetblur121d",),
    ("deep", "all"): ("densenetblur121d",),
    ("imagenet", "stem"): ("densenetblur121d",),
    ("imagenet", "all"): ("densenetblur121d",),
}


class Stated(NamedTuple):
    """What a config.json says.

    Attributes:
      network: for `make_model`, where this project wrote the file.
      attributes: of the model, those that tensors do not show and timm states.
      description: of the net.
      remarks: one sentence on each thing to know.
    """

    network: dict[str, Any] | None
    attributes: dict[str, Any]
    description: Description
    remarks: tuple[str, ...]


def read(path: str | Path) -> Stated:
    """Reads a config.json.

    Raises:
      ValueError: it is damaged, or states what this project does not have.
    """
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"it holds a {type(config).__name__}")
        if _OURS in config:
            return _read_ours(config)
        return _read_timm(config)
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise ValueError(
            f"{path} is no description of a DenseNet as timm or this project "
            f"writes it: {error}"
        ) from error


def _read_ours(config) -> Stated:
    ours = config[_OURS]
    make_model(ours["model"])
    stated = ours["description"] | {"class_names": config.get("label_names")}
    if preprocessing := stated.get("preprocessing"):
        stated["preprocessing"] = {
            key: _as_tuple(value) for key, value in preprocessing.items()
        }
    known = {field.name for field in dataclasses.fields(Description)}
    description = Description(
        **{key: _as_tuple(v) for key, v in stated.items() if key in known}
    )
    return Stated(ours["model"], {}, description, ())


def _as_tuple(value: Any) -> Any:
    """JSON has lists alone."""
    return tuple(value) if isinstance(value, list) else value


def _read_timm(config) -> Stated:
    # Older files have the keys of pretrained_cfg at the top.
    cfg = config.get("pretrained_cfg") or config
    remarks = []
    description = Description(
        preprocessing=_read_preprocessing(cfg, remarks),
        class_names=_read_class_names({**cfg, **config}, remarks),
        task=_TASKS.get(config.get("problem_type")),
    )
    return Stated(None, _read_attributes(config), description, tuple(remarks))


def _read_preprocessing(cfg, remarks) -> dict[str, Any] | None:
    if not cfg.get("mean") or not cfg.get("std"):
        return None
    found = {
        key: tuple(255 * float(value) for value in cfg[key])
        for key in ("mean", "std")
    }
    # timm evaluates its own weights at the sizes for tests, where it has them.
    shape = cfg.get("test_input_size") or cfg.get("input_size")
    share = cfg.get("test_crop_pct") or cfg.get("crop_pct") or 0.875
    mode = cfg.get("crop_mode") or "center"
    if shape:
        _, height, width = map(int, shape)
        resized = math.floor(height / share)
        if height != width or mode != "center" or resized < height:
            remarks.append(
                f"Its crop ({height} x {width}, {mode}, {share}) is none of "
                "this project: only its mean and std are taken."
            )
        else:
            found |= {"image_size": height, "resize_size": resized}
    interpolation = cfg.get("interpolation") or "bilinear"
    if interpolation != "bilinear":
        remarks.append(
            f"It asks for {interpolation} resizing of images: here it is "
            "bilinear."
        )
    return found


def _read_class_names(config, remarks) -> tuple[str, ...] | None:
    for key in ("label_names", "labels", "id2label"):
        names = config.get(key)
        if isinstance(names, dict):
            by_number = {int(number): name for number, name in names.items()}
            if sorted(by_number) != list(range(len(by_number))):
                remarks.append(f"Its {key} leave numbers out: not taken.")
                continue
            names = [by_number[number] for number in sorted(by_number)]
        if names:
            return tuple(map(str, names))
    return None


def _read_attributes(config) -> dict[str, Any]:
    """What a timm net computes beside what its tensors show."""
    net = str(config.get("architecture")).removeprefix("tv_")
    if not any(net in names for names in _TIMM.values()):
        return {}
    arguments = config.get("model_args") or {}
    activation = arguments.get("act_layer") or "relu"
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"its act_layer is {activation!r}, known are "
            f"{', '.join(ACTIVATIONS)}"
        )
    blur_pool = VARIANTS[net].get("blur_pool", "none")
    if blur_pool == "stem" and not arguments.get("aa_stem_only", True):
        blur_pool = "all"
    return {"activation": activation, "blur_pool": blur_pool}


def write(
    model: DenseNet, in_channels: int, description: Description
) -> dict[str, Any]:
    """The config.json of a net, as values for JSON.

    Where timm has no such net its architecture is 'densenet_jax', which timm
    refuses.
    """
    architecture, arguments = _timm_net(model) or ("densenet_jax", {})
    stated = {
        key: value
        for key, value in dataclasses.asdict(description).items()
        if value is not None
    }
    names = stated.pop("class_names", None)
    tasks = {ours: theirs for theirs, ours in _TASKS.items()}
    return {
        "architecture": architecture,
        "num_classes": model.num_classes,
        **({"model_args": arguments} if arguments else {}),
        **({"label_names": list(names)} if names else {}),
        **(
            {"problem_type": tasks[description.task]}
            if description.task
            else {}
        ),
        "pretrained_cfg": _pretrained_cfg(model, in_channels, description),
        _OURS: {"model": attributes(model), "description": stated},
    }


def attributes(model: DenseNet) -> dict[str, Any]:
    """The attributes that say which net a model is, as a config has them."""
    return {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if field.name
        not in ("parent", "name", "dtype", "folded", "dense_layer")
    }


def _timm_net(model: DenseNet) -> tuple[str, dict[str, Any]] | None:
    """The name and arguments of timm's function that makes a net, if any."""
    rates = geometry.growth_rates(model.block_layers, model.growth_rate)
    names = _TIMM.get((model.stem, model.blur_pool))
    same_rates = len({rate for block in rates for rate in block}) == 1
    if names is None or not same_rates or not model.bottleneck_width:
        return None
    net = dict(block_layers=tuple(model.block_layers), growth_rate=rates[0][0])
    theirs = DenseNet(
        **net,
        bottleneck_width=model.bottleneck_width,
        stem=model.stem,
        blur_pool=model.blur_pool,
        num_classes=model.num_classes,
        activation=model.activation,
    )
    shapes = [geometry.tensor_shapes(m, 3) for m in (model, theirs)]
    if shapes[0] != shapes[1] or unseen_differences(model, theirs):
        return None
    arguments = {}
    name = next((n for n in names if net.items() <= VARIANTS[n].items()), None)
    if name is None:
        name = names[0]
        arguments["block_config"] = list(model.block_layers)
        arguments["growth_rate"] = net["growth_rate"]
    if model.bottleneck_width != DenseNet.bottleneck_width:
        arguments["bn_size"] = model.bottleneck_width
    if model.activation != DenseNet.activation:
        arguments["act_layer"] = model.activation
    if model.stem != VARIANTS[name].get("stem", DenseNet.stem):
        arguments["stem_type"] = ""
    if model.blur_pool == "all":
        arguments["aa_stem_only"] = False
    return name, arguments


def _pretrained_cfg(model, in_channels, description) -> dict[str, Any]:
    preprocessing = description.preprocessing or {}
    size = description.input_size
    cfg = {
        "input_size": [in_channels, size or 224, size or 224],
        "num_classes": model.num_classes,
        "first_conv": "features.conv0",
        "classifier": "classifier",
    }
    for key in ("mean", "std"):
        if key in preprocessing:
            values = [value / 255 for value in preprocessing[key]]
            cfg[key] = values * (in_channels // len(values))
    if size:
        resized = preprocessing.get("resize_size") or size
        share = size / resized
        if math.floor(size / share) != resized:  # binary fractions
            share = math.nextafter(share, 0)
        cfg |= {"crop_pct": share, "interpolation": "bilinear"}
    return cfg
