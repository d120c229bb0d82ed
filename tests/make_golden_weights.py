"""Makes tests/data/weights: small nets of other frameworks, and their logits.

Needs torch, torchvision, timm, monai and keras, and none of this project:

    KERAS_BACKEND=torch python tests/make_golden_weights.py

Weights and statistics are random; the logits are those of the frameworks'
own modules for the images in logits.npz, which names their versions.
"""

import argparse
import collections
import copy
import datetime
import re
from pathlib import Path
from unittest import mock

import keras
import keras.src.applications.densenet as keras_densenet
import monai
import numpy as np
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn

OUT = Path(__file__).parent / "data" / "weights"
IMAGES = np.random.default_rng(0).normal(size=(2, 32, 40, 3))
IMAGES = IMAGES.astype(np.float32)
TORCHVISION = {
    "growth_rate": 4,
    "block_config": (2, 1),
    "num_init_features": 8,
    "bn_size": 2,
    "num_classes": 3,
}


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


def legacy(state_dict: dict) -> dict:
    """The names in the files that torchvision publishes."""
    return {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", name): value
        for name, value in state_dict.items()
        if not name.endswith("num_batches_tracked")
    }


class CifarLayer(nn.Module):
    def __init__(self, inputs, width, growth_rate):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, growth_rate, 3, padding=1, bias=False)

    def forward(self, x):
        y = self.conv1(self.bn1(x).relu())
        return torch.cat([x, self.conv2(self.bn2(y).relu())], 1)


class CifarBlock(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.block = nn.Sequential(*layers)

    def forward(self, x):
        return self.block(x)


class CifarTransition(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.bn = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x):
        return nn.functional.avg_pool2d(self.conv(self.bn(x).relu()), 2)


class CifarNet(nn.Module):
    """The names of the third-party CIFAR nets with conv0, bn and fc."""

    def __init__(self):
        super().__init__()
        self.conv0 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.features = nn.Sequential(
            collections.OrderedDict(
                denseblock1=CifarBlock(
                    CifarLayer(8, 16, 4), CifarLayer(12, 16, 4)
                ),
                transition1=CifarTransition(16, 8),
                denseblock2=CifarBlock(CifarLayer(8, 16, 4)),
            )
        )
        self.bn = nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 3)

    def forward(self, x):
        x = self.bn(self.features(self.conv0(x))).relu()
        return self.fc(x.mean((2, 3)))


class NewestFirstLayer(CifarLayer):
    def forward(self, x):
        y = self.conv1(self.bn1(x).relu())
        return torch.cat([self.conv2(self.bn2(y).relu()), x], 1)


class NewestFirst(nn.Module):
    """The names and the order of pytorch-cifar's DenseNet."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.dense1 = nn.Sequential(
            NewestFirstLayer(8, 16, 4),
            NewestFirstLayer(12, 16, 4),
            NewestFirstLayer(16, 16, 4),
        )
        self.trans1 = CifarTransition(20, 10)
        self.dense2 = nn.Sequential(
            NewestFirstLayer(10, 16, 4), NewestFirstLayer(14, 16, 4)
        )
        self.bn = nn.BatchNorm2d(18)
        self.linear = nn.Linear(18, 3)

    def forward(self, x):
        x = self.dense2(self.trans1(self.dense1(self.conv1(x))))
        return self.linear(self.bn(x).relu().mean((2, 3)))


class UnknownNames(CifarNet):
    """The same net in names that no table has, in the order of use."""

    def renamed(self):
        return {
            "net_" + re.sub(r"[.](?=.*[.])", "_", name): value
            for name, value in self.state_dict().items()
        }


def make_torch() -> dict[str, np.ndarray]:
    torch.manual_seed(0)
    logits = {}

    net = randomise(torchvision.models.DenseNet(**TORCHVISION))
    torch.save(net.state_dict(), OUT / "torchvision.pth")
    logits["torchvision.pth"] = logits_of(net)

    torch.save(legacy(net.state_dict()), OUT / "torchvision_legacy.pth")
    logits["torchvision_legacy.pth"] = logits_of(net)

    final = {
        name.replace("norm5", "norm_final"): value
        for name, value in net.state_dict().items()
    }
    torch.save({"epoch": 1, "model": final}, OUT / "gpleiss.pth")
    logits["gpleiss.pth"] = logits_of(net)

    chexnet = {
        "module.densenet121." + name.replace("classifier", "classifier.0"): v
        for name, v in legacy(net.state_dict()).items()
    }
    checkpoint = {"epoch": 3, "state_dict": chexnet, "best_loss": 0.5}
    torch.save(checkpoint, OUT / "chexnet.pth")
    logits["chexnet.pth"] = logits_of(net)

    net = timm.models.densenet.DenseNet(
        growth_rate=4, block_config=(2, 1), num_classes=3, bn_size=2
    )
    net = randomise(net)
    safetensors.torch.save_file(net.state_dict(), OUT / "timm.safetensors")
    logits["timm.safetensors"] = logits_of(net)

    net = monai.networks.nets.DenseNet(
        2, 3, 3, 8, growth_rate=4, block_config=(2, 1), bn_size=2
    )
    net = randomise(net)
    torch.save({"model_state_dict": net.state_dict()}, OUT / "monai.pth")
    logits["monai.pth"] = logits_of(net)

    net = randomise(CifarNet())
    torch.save(net.state_dict(), OUT / "cifar.pth")
    logits["cifar.pth"] = logits_of(net)

    net = randomise(NewestFirst())
    checkpoint = {"net": nn.DataParallel(net).state_dict(), "acc": 0.5}
    torch.save(checkpoint, OUT / "newest_first.pth")
    logits["newest_first.pth"] = logits_of(net)

    net = randomise(UnknownNames())
    torch.save(net.renamed(), OUT / "unknown_names.pth")
    logits["unknown_names.pth"] = logits_of(net)
    return logits


class BearpawTransition(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x):
        return nn.functional.avg_pool2d(self.conv1(self.bn1(x).relu()), 2)


class Bearpaw(nn.Module):
    """The names of pytorch-classification's DenseNet, oldest first."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.dense1 = nn.Sequential(CifarLayer(8, 16, 4), CifarLayer(12, 16, 4))
        self.trans1 = BearpawTransition(16, 8)
        self.dense2 = nn.Sequential(CifarLayer(8, 16, 4))
        self.bn = nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 3)

    def forward(self, x):
        x = self.dense2(self.trans1(self.dense1(self.conv1(x))))
        return self.fc(self.bn(x).relu().mean((2, 3)))


def make_training() -> dict[str, np.ndarray]:
    """Files as training scripts leave them."""
    torch.manual_seed(1)
    old = {"_use_new_zipfile_serialization": False}
    logits = {}

    net = torchvision.models.DenseNet(**TORCHVISION)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    net(torch.from_numpy(IMAGES.transpose(0, 3, 1, 2))).sum().backward()
    optimizer.step()
    net = randomise(net)
    weights = net.state_dict()
    names = ["ant", "bee", "cat"]
    checkpoint = {
        "model": weights,
        "model_ema": {f"module.{k}": 0 * v for k, v in weights.items()},
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": torch.optim.lr_scheduler.MultiStepLR(
            optimizer, [30, 60]
        ).state_dict(),
        "args": argparse.Namespace(lr=0.1, output=Path("runs")),
        "best": np.float64(0.5),
        "history": np.arange(3.0),
        "seed": 2**62 + 1,
        "date": datetime.date(2020, 1, 1),
        "confusion": {(0, 1): 3},
        "git": b"abc",
        "class_to_idx": {name: i for i, name in enumerate(names)},
    }
    torch.save(checkpoint, OUT / "training.pth")
    logits["training.pth"] = logits_of(net)
    wrapped = {f"module.{name}": value for name, value in weights.items()}
    torch.save({"state_dict": wrapped}, OUT / "old_format.pth", **old)
    logits["old_format.pth"] = logits_of(net)
    torch.save(net, OUT / "module.pth")
    logits["module.pth"] = logits_of(net)

    # An eps that is not the one of nets with these names.
    net = copy.deepcopy(net)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.1
    # Without the source of the classes, which the old format keeps.
    with mock.patch.object(
        torch.serialization, "get_source_lines_and_file", side_effect=OSError
    ):
        torch.save({"epoch": 1, "net": net}, OUT / "old_module.pth", **old)
    logits["old_module.pth"] = logits_of(net)

    layers = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    net = nn.Sequential(net.features, *layers, net.classifier)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-5
    safetensors.torch.save_file(
        net.state_dict(), OUT / "sequential.safetensors"
    )
    logits["sequential.safetensors"] = logits_of(net)

    net = randomise(Bearpaw())
    torch.save({"state_dict": net.state_dict()}, OUT / "bearpaw.pth")
    logits["bearpaw.pth"] = logits_of(net)
    return logits


def make_keras() -> dict[str, np.ndarray]:
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(1)
    conv_block = keras_densenet.conv_block
    # The growth rate is written into keras.applications; 32 would make
    # megabytes.
    keras_densenet.conv_block = lambda x, _, name: conv_block(x, 4, name)
    model = keras_densenet.DenseNet(
        [2, 1, 1, 1],
        weights=None,
        input_shape=(32, 40, 3),
        classes=3,
        classifier_activation=None,
    )
    for layer in model.layers:
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
    model.save(OUT / "keras.h5")
    model.save_weights(OUT / "keras.weights.h5")
    logits = keras.ops.convert_to_numpy(model(IMAGES, training=False))
    return dict.fromkeys(["keras.h5", "keras.weights.h5"], logits)


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    logits = make_torch() | make_training() | make_keras()
    versions = [
        f"{module.__name__} {module.__version__}"
        for module in (torch, torchvision, timm, monai, keras)
    ]
    np.savez_compressed(
        OUT / "logits.npz", images=IMAGES, versions=versions, **logits
    )


if __name__ == "__main__":
    main()
