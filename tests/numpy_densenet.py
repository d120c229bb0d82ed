"""A DenseNet in plain numpy, float64: slow, short and independent of ours."""

import math

import numpy as np

ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def conv(x, kernel, stride=1, padding=0):
    """Correlates [batch, height, width, in] with [height, width, in, out]."""
    windows = _windows(x, kernel.shape[0], stride, padding, 0.0)
    return np.einsum("bhwcij,ijco->bhwo", windows, kernel)


def max_pool(x, size, stride, padding):
    return _windows(x, size, stride, padding, -np.inf).max((-2, -1))


def average_pool(x, size):
    return _windows(x, size, size, 0, 0.0).mean((-2, -1))


def blur_pool(x):
    """timm's BlurPool2d: one window of nine weights, every second pixel."""
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    windows = _windows(x, 3, 2, 0, 0.0)
    weights = np.outer([1, 2, 1], [1, 2, 1]) / 16
    return np.einsum("bhwcij,ij->bhwc", windows, weights)


def _windows(x, size, stride, padding, fill):
    edges = [(padding, padding)] * 2
    if padding == "same":
        # https://www.tensorflow.org/api_docs/python/tf/nn#notes_on_padding_2
        totals = [max(size - (n % stride or stride), 0) for n in x.shape[1:3]]
        edges = [(n // 2, n - n // 2) for n in totals]
    x = np.pad(x, ((0, 0), *edges, (0, 0)), constant_values=fill)
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))
    return windows[:, ::stride, ::stride]


def densenet(model, variables, images, train):
    """The feature maps, the logits and, if train, the new batch_stats."""
    params, old = variables["params"], variables.get("batch_stats")
    activate = ACTIVATIONS[model.activation]
    new = {}

    def norm_relu(x, *path):
        affine = at(params, path)
        if model.norm != "batch":
            groups = x.shape[-1]
            if model.norm == "group":
                groups = math.gcd(model.norm_groups, groups)
            grouped = x.reshape(*x.shape[:3], groups, -1)
            mean = grouped.mean((1, 2, 4), keepdims=True)
            var = grouped.var((1, 2, 4), keepdims=True)
            grouped = (grouped - mean) / np.sqrt(var + model.norm_epsilon)
            x = grouped.reshape(x.shape)
            return activate(x * affine["scale"] + affine["bias"])
        running = at(old, path)
        if train:
            mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
            unbiased = x.var((0, 1, 2), ddof=1)
            kept = model.norm_momentum
            new[path] = {
                "mean": kept * running["mean"] + (1 - kept) * mean,
                "var": kept * running["var"] + (1 - kept) * unbiased,
            }
        else:
            mean, var = running["mean"], running["var"]
        x = (x - mean) / np.sqrt(var + model.norm_epsilon)
        return activate(x * affine["scale"] + affine["bias"])

    def recalibrate(x, *path):
        if not model.squeeze_excite:
            return x
        squeeze, excite = (
            at(params, (*path, "se", name)) for name in ("squeeze", "excite")
        )
        y = x.mean((1, 2)) @ squeeze["kernel"] + squeeze["bias"]
        y = activate(y) @ excite["kernel"] + excite["bias"]
        return x / (1 + np.exp(-y))[:, None, None]

    def kernel(*path):
        return at(params, path)["kernel"]

    size, stride, pools, convs = {
        "imagenet": (7, 2, True, 1),
        "deep": (3, 2, True, 3),
        "cifar": (3, 1, False, 1),
    }[model.stem]
    stride = model.stem_stride or stride
    pools = pools if model.stem_pool is None else model.stem_pool
    same = model.stem_padding == "same"
    x = images
    for i in range(convs):
        padding = "same" if same else size // 2
        x = conv(x, kernel(f"conv{i}"), 1 if i else stride, padding)
        if model.stem_norm:
            x = norm_relu(x, f"norm{i}")
    features = [x]
    if pools and model.blur_pool != "none":
        x = blur_pool(max_pool(x, 3, 1, 1))
    elif pools:
        x = max_pool(x, 3, 2, "same" if same else 1)
    for i, num_layers in enumerate(model.block_layers, 1):
        for j in range(1, num_layers + 1):
            layer = f"denseblock{i}", f"denselayer{j}"
            y = norm_relu(x, *layer, "norm1")
            if model.bottleneck_width:
                y = conv(y, kernel(*layer, "conv1"))
                y = norm_relu(y, *layer, "norm2")
                y = conv(y, kernel(*layer, "conv2"), padding=1)
            else:
                y = conv(y, kernel(*layer, "conv1"), padding=1)
            y = recalibrate(y, *layer)
            x = np.concatenate([x, y], axis=-1)
        if i < len(model.block_layers):
            features.append(x)
            x = norm_relu(x, f"transition{i}", "norm")
            x = conv(x, kernel(f"transition{i}", "conv"))
            blurs = model.blur_pool == "all"
            x = blur_pool(x) if blurs else average_pool(x, 2)
    features.append(norm_relu(x, "norm5"))
    head = params["classifier"]
    logits = features[-1].mean((1, 2)) @ head["kernel"] + head["bias"]
    return features, logits, new


def at(tree, path):
    for name in path:
        tree = tree[name]
    return tree
