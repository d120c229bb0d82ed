"""Writes .caffemodel files with Google's protobuf.

The messages and their numbers are those of BVLC/caffe's caffe.proto; the nets
are those of shicai/DenseNet-Caffe and of liuzhuang13/DenseNetCaffe.
"""

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

# Of each message, name -> (number, kind). '*' is repeated, '+' repeated and
# packed.
_PROTO = {
    "BlobShape": {"dim": (1, "+int64")},
    "BlobProto": {
        "num": (1, "int32"),
        "channels": (2, "int32"),
        "height": (3, "int32"),
        "width": (4, "int32"),
        "data": (5, "+float"),
        "diff": (6, "+float"),
        "shape": (7, "BlobShape"),
        "double_data": (8, "+double"),
    },
    "BatchNormParameter": {
        "use_global_stats": (1, "bool"),
        "eps": (3, "float"),
    },
    "ScaleParameter": {"bias_term": (4, "bool")},
    "ConcatParameter": {"axis": (2, "int32")},
    "ConvolutionParameter": {
        "num_output": (1, "uint32"),
        "bias_term": (2, "bool"),
        "pad": (3, "*uint32"),
        "kernel_size": (4, "*uint32"),
        "group": (5, "uint32"),
        "stride": (6, "*uint32"),
        "pad_h": (9, "uint32"),
        "pad_w": (10, "uint32"),
        "dilation": (18, "*uint32"),
    },
    "InnerProductParameter": {
        "num_output": (1, "uint32"),
        "transpose": (6, "bool"),
    },
    "PoolingParameter": {
        "pool": (1, "int32"),
        "kernel_size": (2, "uint32"),
        "stride": (3, "uint32"),
        "pad": (4, "uint32"),
        "global_pooling": (12, "bool"),
        "ceil_mode": (13, "bool"),
    },
    "ReLUParameter": {"negative_slope": (1, "float")},
    "TransformationParameter": {
        "scale": (1, "float"),
        "crop_size": (3, "uint32"),
        "mean_file": (4, "string"),
        "mean_value": (5, "*float"),
    },
    "LayerParameter": {
        "name": (1, "string"),
        "type": (2, "string"),
        "bottom": (3, "*string"),
        "top": (4, "*string"),
        "loss_weight": (5, "*float"),
        "blobs": (7, "*BlobProto"),
        "phase": (10, "int32"),
        "transform_param": (100, "TransformationParameter"),
        "concat_param": (104, "ConcatParameter"),
        "convolution_param": (106, "ConvolutionParameter"),
        "inner_product_param": (117, "InnerProductParameter"),
        "pooling_param": (121, "PoolingParameter"),
        "relu_param": (123, "ReLUParameter"),
        "batch_norm_param": (139, "BatchNormParameter"),
        "scale_param": (142, "ScaleParameter"),
    },
    "V1LayerParameter": {"name": (4, "string")},
    "NetParameter": {
        "name": (1, "string"),
        "layers": (2, "*V1LayerParameter"),
        "input": (3, "*string"),
        "input_dim": (4, "*int32"),
        "layer": (100, "*LayerParameter"),
    },
}


def _make_net_parameter():
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="caffe_for_tests.proto", package="caffe_for_tests", syntax="proto2"
    )
    for name, fields in _PROTO.items():
        message = file.message_type.add(name=name)
        for field_name, (number, kind) in fields.items():
            bare = kind.lstrip("*+")
            repeated = bare != kind
            added = message.field.add(name=field_name, number=number)
            added.label = (
                field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            )
            if bare in _PROTO:
                added.type = field.TYPE_MESSAGE
                added.type_name = f".caffe_for_tests.{bare}"
            else:
                added.type = getattr(field, f"TYPE_{bare.upper()}")
            if kind.startswith("+"):
                added.options.packed = True
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = pool.FindMessageTypeByName("caffe_for_tests.NetParameter")
    return message_factory.GetMessageClass(found)


NetParameter = _make_net_parameter()


def write(path, net):
    """Writes a NetParameter."""
    path.write_bytes(net.SerializeToString())
    return path


def add_blob(layer, array, *, shape=True, double=False):
    """Adds a tensor, with the four axes of Caffe's first versions if asked."""
    blob = layer.blobs.add()
    if shape:
        blob.shape.dim.extend(array.shape)
    else:
        four = (1,) * (4 - array.ndim) + array.shape
        blob.num, blob.channels, blob.height, blob.width = four
    values = np.asarray(array).ravel().tolist()
    (blob.double_data if double else blob.data).extend(values)


class _Builder:
    """Adds layers, each of which reads what the one before made."""

    def __init__(self, state, factor, blob):
        self.net = NetParameter(name="DENSENET")
        self.top = "data"
        self._state = state
        self._factor = np.float32(factor)
        self._blob = blob

    def layer(self, name, kind, bottoms=None, top=None, **parameters):
        layer = self.net.layer.add(name=name, type=kind, **parameters)
        layer.bottom.extend(bottoms or [self.top])
        self.top = top or name
        layer.top.append(self.top)
        return layer

    def norm_relu(self, name, ours, relu):
        leaves = ("running_mean", "running_var", "weight", "bias")
        mean, var, gamma, beta = (self._state[f"{ours}.{x}"] for x in leaves)
        batch_norm = self.layer(
            f"{name}/bn", "BatchNorm", batch_norm_param={"eps": 1e-5}
        )
        for blob in (mean * self._factor, var * self._factor):
            add_blob(batch_norm, blob, **self._blob)
        add_blob(batch_norm, np.array([self._factor]), **self._blob)
        scale = self.layer(
            f"{name}/scale",
            "Scale",
            top=self.top,
            scale_param={"bias_term": True},
        )
        add_blob(scale, gamma, **self._blob)
        add_blob(scale, beta, **self._blob)
        self.layer(relu, "ReLU", top=self.top)

    def conv(self, name, ours, **window):
        weight = self._state[f"{ours}.weight"]
        parameters = {k: [v] for k, v in window.items()}
        layer = self.layer(
            name,
            "Convolution",
            convolution_param={
                "num_output": weight.shape[0],
                "bias_term": False,
                **parameters,
            },
        )
        add_blob(layer, weight, **self._blob)
        return layer

    def pool(self, name, **parameters):
        self.layer(name, "Pooling", pooling_param=parameters)


def net(state, block_layers, *, factor=1.0, linear=False, **blob):
    """A net with the weights of a state dict in torchvision's names.

    Named as shicai's; with a 3x3 stem, windows are those of the CIFAR nets.

    Args:
      state: the stem's kernel reads red first.
      factor: of the statistics.
      linear: end in an InnerProduct, where shicai's have a convolution.
      **blob: for `add_blob`.
    """
    state = {k.removeprefix("features."): v for k, v in state.items()}
    imagenet = state["conv0.weight"].shape[-1] == 7
    if imagenet:
        state["conv0.weight"] = state["conv0.weight"][:, ::-1]
    build = _Builder(state, factor, blob)
    build.net.input.append("data")
    build.net.input_dim.extend([1, 3, 224, 224])
    if imagenet:
        build.conv("conv1", "conv0", pad=3, kernel_size=7, stride=2)
        build.norm_relu("conv1", "norm0", "relu1")
        build.pool("pool1", kernel_size=3, stride=2, pad=1, ceil_mode=False)
    else:
        build.conv("conv1", "conv0", pad=1, kernel_size=3)
    for i, num_layers in enumerate(block_layers):
        stage = i + 2
        for j in range(1, num_layers + 1):
            ours, name = f"denseblock{i + 1}.denselayer{j}", f"conv{stage}_{j}"
            features = build.top
            build.norm_relu(
                f"{name}/x1", f"{ours}.norm1", f"relu{stage}_{j}/x1"
            )
            if f"{ours}.conv2.weight" in state:
                build.conv(f"{name}/x1", f"{ours}.conv1", kernel_size=1)
                build.norm_relu(
                    f"{name}/x2", f"{ours}.norm2", f"relu{stage}_{j}/x2"
                )
                last = f"{ours}.conv2"
            else:
                last = f"{ours}.conv1"
            build.conv(f"{name}/x2", last, pad=1, kernel_size=3)
            build.layer(f"concat_{stage}_{j}", "Concat", [features, build.top])
        end = i == len(block_layers) - 1
        ours = "norm5" if end else f"transition{i + 1}.norm"
        build.norm_relu(f"conv{stage}_blk", ours, f"relu{stage}_blk")
        if not end:
            ours = f"transition{i + 1}.conv"
            build.conv(f"conv{stage}_blk", ours, kernel_size=1)
            build.pool(f"pool{stage}", pool=1, kernel_size=2, stride=2)
    build.pool(f"pool{stage}", pool=1, global_pooling=True)
    weight, bias = state["classifier.weight"], state["classifier.bias"]
    if linear:
        parameters = {"num_output": len(bias)}
        head = build.layer(
            "fc6", "InnerProduct", inner_product_param=parameters
        )
        add_blob(head, weight, **blob)
    else:
        parameters = {"num_output": len(bias), "kernel_size": [1]}
        head = build.layer("fc6", "Convolution", convolution_param=parameters)
        add_blob(head, weight[:, :, None, None], **blob)
    add_blob(head, bias, **blob)
    return build.net
