"""Makes tests/data/stems: nets with other stems and pools, and their logits.

Needs torch, torchvision, timm and keras, and none of this project:

    KERAS_BACKEND=torch python tests/make_golden_stems.py

Weights and statistics are random; the logits are those of the frameworks' own
modules for the images in logits.npz, which names their versions. One file
serves all nets with the same tensors.
"""

from pathlib import Path

import keras
import numpy as np
import safetensors.torch
import timm
import torch
import torchvision
from timm.layers import BlurPool2d
from torch import nn

OUT = Path(__file__).parent / "data" / "stems"
IMAGES = np.random.default_rng(0).normal(size=(2, 32, 40, 3))
IMAGES = IMAGES.astype(np.float32)
EPSILON = 1.001e-5


def randomise(model: nn.Module) -> nn.Module:
    """Random weights and statistics that keep the signal's size."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.2)
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
        elif isinstance(module, nn.Linear):
            module.weight.data.normal_(0, 0.3)
            module.bias.data.normal_(0, 1)
    return model.eval()


def logits_of(model: nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(IMAGES.transpose(0, 3, 1, 2))).numpy()


def make_timm() -> dict[str, np.ndarray]:
    """Deep stems; blur pooling has no tensors."""
    logits = {}
    pools = {
        "none": {},
        "stem": {"aa_layer": BlurPool2d},
        "all": {"aa_layer": BlurPool2d, "aa_stem_only": False},
    }
    for stem in ("deep", "deep_tiered"):
        tensors = None
        for blur, options in pools.items():
            net = timm.models.densenet.DenseNet(
                growth_rate=4,
                block_config=(2, 1),
                num_classes=3,
                bn_size=2,
                stem_type=stem,
                **options,
            )
            tensors = tensors or randomise(net).state_dict()
            net.load_state_dict(tensors)
            logits[f"{stem}.safetensors {blur}"] = logits_of(net.eval())
        safetensors.torch.save_file(tensors, OUT / f"{stem}.safetensors")
    return logits


def make_torchvision() -> dict[str, np.ndarray]:
    """A 3x3 stem in torchvision's names, with each stride and pool."""
    net = torchvision.models.DenseNet(4, (2, 1), 8, bn_size=2, num_classes=3)
    net.features.conv0 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
    randomise(net)
    name = "small.safetensors"
    safetensors.torch.save_file(net.state_dict(), OUT / name)
    logits = {}
    for pool in (net.features.pool0, nn.Identity()):
        net.features.pool0 = pool
        for stride in (1, 2):
            net.features.conv0.stride = (stride, stride)
            kept = not isinstance(pool, nn.Identity)
            logits[f"{name} {stride} {kept}"] = logits_of(net)
    return logits


def keras_net(layer: str, first: int, norm: int, pool: str, padding: str):
    """A net with the names and the padding of a library.

    Args:
      layer: names a dense layer, of a block and layer number from `first` on.
      norm: the number of a layer's first norm.
      pool: what a transition's name begins with.
      padding: of the stem, 'same' or 'explicit'.
    """
    layers = keras.layers

    def norm_relu(x, name):
        x = layers.BatchNormalization(epsilon=EPSILON, name=name)(x)
        return layers.ReLU(name=name.replace("bn", "relu"))(x)

    def conv(x, features, size, name, **options):
        options = {"use_bias": False, "name": name, **options}
        return layers.Conv2D(features, size, **options)(x)

    inputs = x = layers.Input(IMAGES.shape[1:])
    if padding == "same":
        x = conv(x, 8, 7, "conv1_conv", strides=2, padding="same")
        x = norm_relu(x, "conv1_bn")
        x = layers.MaxPooling2D(3, 2, padding="same", name="pool1")(x)
    else:
        x = layers.ZeroPadding2D(3)(x)
        x = conv(x, 8, 7, "conv1_conv", strides=2)
        x = norm_relu(x, "conv1_bn")
        x = layers.ZeroPadding2D(1)(x)
        x = layers.MaxPooling2D(3, 2, name="pool1")(x)
    first_block = 2 if layer.startswith("conv") else 1
    for block, depth in enumerate((2, 1), first_block):
        for number in range(first, first + depth):
            name = layer.format(block, number)
            y = norm_relu(x, f"{name}_{norm}_bn")
            y = conv(y, 16, 1, f"{name}_1_conv")
            y = norm_relu(y, f"{name}_{norm + 1}_bn")
            y = conv(y, 4, 3, f"{name}_2_conv", padding="same")
            x = layers.Concatenate(name=f"{name}_concat")([x, y])
        if block == first_block:
            x = norm_relu(x, f"{pool}{block}_bn")
            x = conv(x, 8, 1, f"{pool}{block}_conv")
            x = layers.AveragePooling2D(2, name=f"{pool}{block}_pool")(x)
    x = layers.GlobalAveragePooling2D(name="pooler")(norm_relu(x, "bn"))
    return keras.Model(inputs, layers.Dense(3, name="predictions")(x))


def make_keras() -> dict[str, np.ndarray]:
    """Nets of KerasHub's and KerasCV's names, which pad the stem as 'same'."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(1)
    hub = ("stack{}_block{}", 1, 1, "transition")
    cv = ("conv{}_block_{}", 0, 0, "pool")
    logits = {}
    for name, net in {
        "keras_hub.h5": keras_net(*hub, "same"),
        "keras_hub_explicit.weights.h5": keras_net(*hub, "explicit"),
        "keras_cv.weights.h5": keras_net(*cv, "same"),
    }.items():
        for layer in net.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                size = layer.get_weights()[0].shape
                layer.set_weights(
                    [
                        rng.uniform(0.5, 1.5, size),
                        rng.normal(0, 0.2, size),
                        rng.normal(0, 0.2, size),
                        # Small, so that the epsilon counts.
                        rng.uniform(1e-3, 1.5, size),
                    ]
                )
        whole = not name.endswith(".weights.h5")
        (net.save if whole else net.save_weights)(OUT / name)
        logits[name] = keras.ops.convert_to_numpy(net(IMAGES, training=False))
    return logits


def main():
    torch.manual_seed(0)
    OUT.mkdir(parents=True, exist_ok=True)
    logits = make_timm() | make_torchvision() | make_keras()
    versions = [
        f"{module.__name__} {module.__version__}"
        for module in (torch, torchvision, timm, keras)
    ]
    np.savez_compressed(
        OUT / "logits.npz", images=IMAGES, versions=versions, **logits
    )


if __name__ == "__main__":
    main()
