"""torchvision's DenseNet, run eagerly. Needs torch and torchvision."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torchvision

from benchmarks import programs
from densenet_jax.data.pipeline import usable_cores
from densenet_jax.models.densenet import DenseNet
from densenet_jax.weights.export import to_torch


def step_function(
    model: DenseNet,
    variables: Mapping,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    train: bool,
    channels_last: bool,
) -> Callable[[], np.ndarray]:
    """A function that takes a training step, or infers, on all cores.

    Args:
      model: one of which torchvision has the architecture.
      variables: to begin with.
      images: [batch, height, width, 3].
      labels: [batch].
      train: forward, backward and SGD with momentum; else forward alone.
      channels_last: torch's memory format, of the net and of the images.

    Returns:
      A function of nothing, to the mean loss if train, else to the logits.
    """
    torch.set_num_threads(usable_cores())
    memory_format = (
        torch.channels_last if channels_last else torch.contiguous_format
    )
    net = torchvision.models.DenseNet(
        growth_rate=model.growth_rate,
        block_config=model.block_layers,
        num_init_features=model.stem_features or 2 * model.growth_rate,
        bn_size=model.bottleneck_width,
        num_classes=model.num_classes,
    )
    net.load_state_dict(
        {
            name: torch.from_numpy(value.copy())
            for name, value in to_torch(variables).items()
        }
    )
    net = net.to(memory_format=memory_format).train(train)
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    images = images.contiguous(memory_format=memory_format)
    labels = torch.from_numpy(labels).long()
    optimizer = torch.optim.SGD(
        net.parameters(), programs.LEARNING_RATE, programs.MOMENTUM
    )

    def train_step():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach().numpy()

    def infer():
        with torch.inference_mode():
            return net(images).numpy()

    return train_step if train else infer
