"""Converts weights between PyTorch files, Keras files and checkpoints.

python -m densenet_jax.tools.convert SRC DST

SRC: a PyTorch file (.pth, .pt), .safetensors, a Keras .h5 or .weights.h5, or
the directory of a training run.
DST: .safetensors; .pth or .pt, which needs PyTorch installed; or a directory,
for an Orbax checkpoint that SRC can be. Files have torchvision's names.
"""

import argparse
import collections
import dataclasses
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from densenet_jax.files import replacing
from densenet_jax.models.densenet import DenseNet
from densenet_jax.models.geometry import min_image_size
from densenet_jax.tools import command
from densenet_jax.weights import containers, export, layouts, load

_TORCH = (".pth", ".pt")

# Logits may differ by so much, in parts of the largest.
_TOLERANCE = 1e-4


def convert(arguments: argparse.Namespace) -> None:
    """Converts SRC to DST, and prints what was recognised."""
    source, target = arguments.src, arguments.dst
    if target.exists():
        raise ValueError(f"{target} exists: choose another name.")
    if target.suffix not in (*_TORCH, ".safetensors", ""):
        raise ValueError(
            f"{target.name} ends in {target.suffix}: give .safetensors, .pth, "
            ".pt, or a directory without an ending."
        )
    model, variables, remarks, changes, _ = load.load_weights(
        source, mapping=arguments.mapping
    )
    for line in remarks + changes:
        print(line)
    print(f"Architecture: {load.describe(model)}")
    count = sum(x.size for x in jax.tree.leaves(variables["params"]))
    print(f"Parameters: {count:,}")
    if target.suffix and model.activation != "relu":
        raise ValueError(
            f"The net has activation={model.activation!r}, which files with "
            "torchvision's names cannot say: give a directory."
        )
    if arguments.verify:
        _verify(source, model, variables)

    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == "":
        from densenet_jax.runs import checkpoints as manager

        with replacing(target) as temporary:
            manager.save_variables(
                temporary, variables, {"model": _attributes(model)}
            )
    else:
        if target.suffix in _TORCH:
            _save_pth(variables, target)
        else:
            export.save_torch(variables, target)
        if model.norm_epsilon != DenseNet.norm_epsilon:
            print(
                f"The norms' epsilon is {model.norm_epsilon}, which PyTorch "
                f"files do not hold: torchvision's is {DenseNet.norm_epsilon}."
            )
    print(f"Wrote {target}")


def _attributes(model):
    return {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if field.name
        not in ("parent", "name", "dtype", "folded", "dense_layer")
    }


def _save_pth(variables, path):
    torch = _import("torch", "Writing .pth: give a .safetensors name instead")
    with replacing(path) as temporary:
        torch.save(_torch_state_dict(torch, variables), temporary)


def _torch_state_dict(torch, variables):
    return {
        name: torch.from_numpy(value.copy())
        for name, value in export.to_torch(variables).items()
    }


def _import(name, purpose):
    try:
        return __import__(name)
    except ImportError as error:
        raise ValueError(
            f"{purpose}, or install {name} (pip install {name})."
        ) from error


def _verify(source: Path, model: DenseNet, variables) -> None:
    """Compares logits for random images with torchvision's module."""
    torch = _import("torch", "--verify compares with PyTorch: leave it out")
    net = _torchvision_net(model, variables["params"]["conv0"]["kernel"])
    try:
        net.load_state_dict(_read_with_torch(torch, source))
        checked = "which loaded the file by itself"
    except RuntimeError:
        net.load_state_dict(_torch_state_dict(torch, variables))
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
    print(
        f"Verified for 4 random images: logits are within {difference:.1e} "
        f"(the largest is {np.abs(theirs).max():.1e}) of torchvision's module, "
        f"{checked}."
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
    elif source.suffix in _TORCH:
        state_dict = torch.load(source, weights_only=True)
    else:
        return {}
    for key in containers.WRAPPERS:
        state_dict = state_dict.get(key, state_dict)
    names = {name: layouts.PREFIXES.sub("", name) for name in state_dict}
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
    parser.add_argument("src", type=Path)
    parser.add_argument("dst", type=Path)
    parser.add_argument(
        "--mapping",
        type=Path,
        metavar="FILE",
        help="names of a net that follows no known layout: see "
        "densenet_jax.weights.layouts.read_mapping",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare logits with torchvision's module, where installed",
    )
    return command.run(parser, convert, argv)


if __name__ == "__main__":
    sys.exit(main())
