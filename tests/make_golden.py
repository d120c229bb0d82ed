"""Writes tests/data/torchvision_densenet.npz with the real torchvision.

The values in the repository were made on a CPU by torch 2.14.1 and torchvision
0.29.1. To make them again, where these two are installed:

    python -m tests.make_golden

The file holds a narrow DenseNet (see `narrow_net`) and what it computes:
  state/NAME           its random state_dict
  images, labels       two batches; pixels are images / 4
  eval_logits          of the first batch, in eval mode
  train_logits         of the first batch, in train mode
  updated/NAME         running statistics after that one pass in train mode
  losses               mean cross-entropy before each of 12 steps from the
                       state above, on the batches in turn: SGD with Nesterov
                       momentum 0.9, rate 1/8 (exact in float32, which holds
                       our schedules), weight decay 1e-4 on everything
  trained/NAME         running statistics and SAMPLE after those steps
The steps are taken in float64, for training so narrow a net is chaotic: in
float32 a ReLU whose input is nearly 0 soon falls on the other side, and the
losses of two correct programs differ by percents. What they trained is float64
too, the rest float32.
"""

import copy
import pathlib

import numpy as np
import torch
import torchvision

STEPS = 12
BATCHES = 2
IMAGE_SHAPE = (4, 3, 70, 76)
CLASSES = 10
SAMPLE = (
    "features.conv0.weight",
    "features.norm0.weight",
    "features.denseblock2.denselayer3.norm1.bias",
    "features.denseblock4.denselayer2.conv2.weight",
    "classifier.weight",
    "classifier.bias",
)


def randomize(net: torch.nn.Module) -> None:
    """Makes the norms of a fresh net differ from their initial 0 and 1."""
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.2)
            torch.nn.init.normal_(module.running_mean, std=0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)


def narrow_net() -> torchvision.models.DenseNet:
    """A DenseNet-BC with random weights, affine parameters and statistics."""
    net = torchvision.models.DenseNet(
        growth_rate=4,
        block_config=(2, 3, 2, 2),
        num_init_features=8,
        num_classes=CLASSES,
    )
    randomize(net)
    return net


def train(net, pixels, labels) -> list[float]:
    """Takes the steps; the losses before them."""
    optimizer = torch.optim.SGD(
        net.parameters(),
        lr=1 / 8,
        momentum=0.9,
        nesterov=True,
        weight_decay=1e-4,
    )
    losses = []
    for step in range(STEPS):
        logits = net(pixels[step % BATCHES])
        loss = torch.nn.functional.cross_entropy(logits, labels[step % BATCHES])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _named(prefix, state_dict, keep=lambda name: True):
    return {
        f"{prefix}/{name}": value.numpy().copy()
        for name, value in state_dict.items()
        if keep(name)
    }


def _is_statistic(name):
    return name.endswith(("running_mean", "running_var"))


def main() -> None:
    torch.manual_seed(0)
    net = narrow_net()
    # Coarse, so that the file is small.
    images = torch.randint(-8, 9, (BATCHES, *IMAGE_SHAPE), dtype=torch.int8)
    labels = torch.randint(CLASSES, (BATCHES, IMAGE_SHAPE[0]))
    pixels = images.float() / 4
    golden = {"images": images.numpy(), "labels": labels.numpy()}
    golden |= _named("state", net.state_dict())
    double = copy.deepcopy(net).double()

    with torch.no_grad():
        golden["eval_logits"] = net.eval()(pixels[0]).numpy()
        golden["train_logits"] = net.train()(pixels[0]).numpy()
    golden |= _named("updated", net.state_dict(), _is_statistic)

    golden["losses"] = np.array(train(double, pixels.double(), labels))
    golden |= _named(
        "trained",
        double.state_dict(),
        lambda name: _is_statistic(name) or name in SAMPLE,
    )

    path = pathlib.Path(__file__).parent / "data/torchvision_densenet.npz"
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(path, **golden)
    print("losses", *(f"{loss:.4f}" for loss in golden["losses"]))
    print(f"wrote {path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
