"""Converts weights between PyTorch files, Keras files and checkpoints.

python -m densenet_jax.tools.convert SRC DST

SRC: a PyTorch file (.pth, .pt), .safetensors, a Keras .h5 or .weights.h5, or
the directory of a training run.
DST: .safetensors; .pth or .pt, which needs PyTorch installed; or a directory,
for an Orbax checkpoint that SRC can be. Files have torchvision's names.
"""

import argparse
import collections
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from densenet_jax.files import replacing
from densenet_jax.models.densenet import DenseNet
from densenet_jax.models.geometry import min_image_size
from densenet_jax.runs.description import to_config
from densenet_jax.tools import command
from densenet_jax.weights import config_json, export, load, state_dicts
from densenet_jax.weights.unshown import guesses

# Attributes that a file in torchvision's names may lack.
_SAID = (
    "norm_epsilon",
    "stem_stride",
    "stem_pool",
    "stem_padding",
    "blur_pool",
)

# Logits may differ by so much, in parts of the largest.
_TOLERANCE = 1e-4


def convert(arguments: argparse.Namespace) -> None:
    """Converts SRC to DST, and prints what was recognised."""
    source, target = arguments.src, arguments.dst
    if target.exists():
        raise ValueError(f"{target} exists: choose another name.")
    if target.suffix not in (*export.TORCH_SUFFIXES, ".safetensors", ""):
        raise ValueError(
            f"{target.name} ends in {target.suffix}: give .safetensors, .pth, "
            ".pt, .bin, or a directory without an ending."
        )
    model, variables, description = command.load(source, arguments)
    print(f"Architecture: {load.describe(model)}")
    count = sum(x.size for x in jax.tree.leaves(variables["params"]))
    print(f"Parameters: {count:,}")
    lost = export.unsaid(model) if target.suffix else []
    values = {name: getattr(model, name) for name in lost}
    if refused := [n for n in lost if n not in _SAID]:
        raise ValueError(
            f"The net has {_join(values, refused)}, which files with "
            "torchvision's names cannot say: give a directory."
        )
    if arguments.verify:
        _verify(source, model, variables)

    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == "":
        from densenet_jax.runs import checkpoints as manager

        with replacing(target) as temporary:
            manager.save_variables(
                temporary,
                variables,
                {
                    "model": config_json.attributes(model),
                    **to_config(description),
                },
            )
    else:
        export.save_torch(variables, target)
        if description.preprocessing or description.class_names:
            print(
                f"{target.name} does not hold what {source} says of "
                "preprocessing and classes; a directory would."
            )
        if lost:
            print(
                f"{target.name} does not hold {_join(values, lost)}: who loads "
                "it has to give that again, as --override."
            )
    print(f"Wrote {target}")


def _join(values, names):
    return ", ".join(f"{name}={values[name]!r}" for name in names)


def _import(name, purpose):
    try:
        return __import__(name)
    except ImportError as error:
        raise ValueError(
            f"{purpose}, or install {name} (pip install {name})."
        ) from error


def _verify(source: str, model: DenseNet, variables) -> None:
    """Compares logits for random images with torchvision's module."""
    torch = _import("torch", "--verify compares with PyTorch: leave it out")
    net = _torchvision_net(model, variables["params"]["conv0"]["kernel"])
    try:
        net.load_state_dict(_read_with_torch(torch, Path(source).expanduser()))
        checked = "which loaded the file by itself"
    except RuntimeError:
        net.load_state_dict(export.as_torch(export.to_torch(variables)))
        checked = (
            "which was given the weights as they were read here: the file's "
            "names are not torchvision's, so their places are not verified"
        )
    size = 2 * min_image_size(model)
    channels = variables["params"]["conv0"]["kernel"].shape[2]
    images = np.random.default_rng(0).normal(size=(4, size, size, channels))
    images = images.astype(np.float32)
    with torch.no_grad():
        theirs = net(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    ours = jax.jit(model.apply)(variables, jnp.asarray(images))
    difference = np.abs(theirs - ours).max()
    # What no tensor tells torchvision's module was told here.
    verdict = "Compared" if guesses(model, {}) else "Verified"
    print(
        f"{verdict} for 4 random images: logits are within {difference:.1e} "
        f"(the largest is {np.abs(theirs).max():.1e}) of torchvision's module, "
        f"{checked}."
        + (
            " What is said above to be assumed is not verified."
            if verdict == "Compared"
            else ""
        )
    )
    if not difference <= _TOLERANCE * np.abs(theirs).max():
        raise ValueError("The logits differ: nothing was written.")


def _read_with_torch(torch, source: Path) -> dict:
    """The file's state dict in torchvision's names, as PyTorch reads it.

    It may hold anything where the file is none of torchvision's.
    """
    if source.suffix == ".safetensors":
        from safetensors.torch import load_file

        state_dict = load_file(source)
    elif source.suffix in export.TORCH_SUFFIXES:
        state_dict = torch.load(source, weights_only=True)
    else:
        return {}
    for key in state_dicts.WRAPPERS:
        state_dict = state_dict.get(key, state_dict)
    names = {
        name: re.sub(r"^.*?(?=features\.|classifier\.)", "", name)
        for name in state_dict
    }
    return {
        re.sub(r"\.(norm|conv)\.([12])\.", r".\1\2.", new): state_dict[name]
        for name, new in names.items()
    }


def _torchvision_net(model: DenseNet, kernel: jax.Array):
    """torchvision's module of the same architecture."""
    torchvision = _import(
        "torchvision", "--verify compares with torchvision: leave it out"
    )
    from torch import nn

    if model.compression != 0.5 or not model.bottleneck_width:
        raise ValueError(
            "--verify cannot compare: torchvision's DenseNet has bottlenecks "
            "and a compression of 0.5."
        )
    lost = export.unsaid(model.clone(norm_epsilon=DenseNet.norm_epsilon))
    lost += ["stem"] if model.stem == "deep" else []
    if lost:
        raise ValueError(
            "--verify cannot compare: torchvision's DenseNet has another "
            f"{' and '.join(lost)}."
        )
    size, _, channels, features = kernel.shape
    net = torchvision.models.DenseNet(
        growth_rate=model.growth_rate,
        block_config=model.block_layers,
        num_init_features=features,
        bn_size=model.bottleneck_width,
        num_classes=model.num_classes,
    )
    modules = collections.OrderedDict(net.features.named_children())
    if model.stem == "cifar":
        stem = nn.Conv2d(channels, features, size, padding=1, bias=False)
        del modules["pool0"]
    else:
        stem = nn.Conv2d(channels, features, size, 2, padding=3, bias=False)
    modules["conv0"] = stem
    if not model.stem_norm:
        del modules["norm0"], modules["relu0"]
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = model.norm_epsilon
    net.features = nn.Sequential(modules)
    return net.eval()


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit status, 1 after an error."""
    parser = command.parser("convert", __doc__)
    parser.add_argument("src")
    parser.add_argument("dst", type=command.path)
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare logits with torchvision's module, where installed",
    )
    command.add_reading(parser)
    return command.run(parser, convert, argv)


if __name__ == "__main__":
    sys.exit(main())
