"""Against figures worked out by hand."""

import re
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from densenet_jax.models.densenet import DenseNet
from densenet_jax.planning.compiled import (
    collective_bytes,
    layer_name,
    read_program,
)

# What XLA:TPU writes, cut down to what is read.
TPU_PROGRAM = """HloModule jit_f, is_scheduled=true, num_partitions=8

%fused_computation (p: bf16[8]) -> bf16[8] {
  %p = bf16[8]{0:T(256)} parameter(0)
  ROOT %add.9 = bf16[8]{0:T(256)} add(%p, %p), \
backend_config={"estimated_cycles":"1000"}
}

%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %fusion.7 = f32[8]{0:T(128)S(1)} fusion(%x), kind=kLoop, \
calls=%fused_computation, metadata={op_name="jit(f)/transpose(jvp(N))/while/\
body/b1/denselayer2/conv1/dot_general" stack_frame_id=7}, \
backend_config={"window_config":{"estimated_cycles":"30"}}
  ROOT %t = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) tuple(%x, %fusion.7)
}

%called (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %sort.1 = f32[8]{0} sort(%p), dimensions={0}
}

ENTRY %main.2_spmd (w: f32[8], x: f32[8]) -> f32[8] {
  %w = f32[8]{0:T(128)} parameter(0), metadata={op_name="w"}
  %copy-start = (f32[8]{0:T(128)S(1)}, f32[8]{0:T(128)}, u32[]{:S(2)}) \
copy-start(%w), backend_config={"flag_configs":[]}
  %copy-done = f32[8]{0:T(128)S(1)} copy-done(%copy-start)
  %fusion.1 = f32[8]{0:T(128)} fusion(%w, %copy-done), kind=kOutput, \
calls=%fused_computation, metadata={op_name="jit(f)/jvp(N)/N.features/b1/\
denselayer1/conv1/dot_general;jit(f)" stack_frame_id=6}, \
backend_config={"window_config":{"estimated_cycles":"200","is_mask":false}}
  %fusion.2 = f32[8]{0:T(128)} fusion(%fusion.1), kind=kOutput, \
calls=%fused_computation, metadata={op_name="jit(f)/jvp(N)/N.features/b1/\
denselayer2/conv1/dot_general"}, backend_config={"estimated_cycles":"100"}
  %copy.5 = f32[8]{0} copy(%fusion.2), backend_config={"estimated_cycles":"4"}
  %while.3 = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) while(%copy.5), \
condition=%cond.1, body=%body.1, metadata={op_name="jit(f)/while"}
  %call.1 = f32[8]{0} call(%copy.5), to_apply=%called
  %ar = (f32[8]{0:T(128)}, bf16[2,3]{1,0:T(8,128)(2,1)}) all-reduce(%a, %b), \
channel_id=2, to_apply=%add
  %ags = (f32[8]{0}, f32[64]{0}) all-gather-start(%copy.5), dimensions={0}
  %agd = f32[64]{0} all-gather-done(%ags)
  ROOT %all-reduce.1 = (pred[]{:T(256)}, s32[]{:T(128)}) all-reduce(%c, %d)
}
"""


def _read(hlo):
    memory = types.SimpleNamespace(
        argument_size_in_bytes=1000,
        output_size_in_bytes=900,
        alias_size_in_bytes=800,
        temp_size_in_bytes=70,
        generated_code_size_in_bytes=6,
    )
    return read_program(
        types.SimpleNamespace(
            as_text=lambda: hlo,
            memory_analysis=lambda: memory,
            cost_analysis=lambda: {"flops": 60.0, "bytes accessed": 20.0},
        )
    )


def test_cycles_are_those_of_what_runs_once_each():
    program = _read(TPU_PROGRAM)
    assert program.cycles == 200 + 100 + 4 + 30
    assert list(program.layer_cycles.items()) == [
        ("b1 conv1, forward", 300),
        ("b1 conv1, backward", 30),
        ("(copy)", 4),
    ]


def test_what_has_no_estimate_is_counted():
    assert _read(TPU_PROGRAM).without_estimate == {
        "all-reduce": 2,
        "copy-start": 1,
        "while": 1,
        "sort": 1,
        "all-gather-start": 1,
    }


def test_collectives_count_their_results():
    assert collective_bytes(TPU_PROGRAM) == {
        "all-reduce": 8 * 4 + 2 * 3 * 2 + 1 + 4,
        "all-gather": 64 * 4,
    }


def test_totals():
    program = _read(TPU_PROGRAM)
    assert program.total_bytes == 1000 + (900 - 800) + 70 + 6
    assert program.intensity == 3.0


def test_a_product_on_cpu():
    x = jax.ShapeDtypeStruct((4, 8), jnp.float32)
    w = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    program = read_program(jax.jit(jnp.dot).lower(x, w).compile())
    assert program.flops == 2 * 4 * 8 * 16
    assert program.argument_bytes == 4 * (4 * 8 + 8 * 16)
    assert program.output_bytes == 4 * 4 * 16
    assert program.bytes_accessed == 4 * (4 * 8 + 8 * 16 + 4 * 16)
    assert program.cycles is None
    assert program.layer_cycles == {}
    assert program.collective_bytes == {}


def test_a_donated_argument_is_an_alias():
    x = jax.ShapeDtypeStruct((64,), jnp.float32)
    double = jax.jit(lambda x: x + x, donate_argnums=0)
    program = read_program(double.lower(x).compile())
    assert program.alias_bytes == 64 * 4
    assert program.total_bytes == (
        64 * 4 + program.temp_bytes + program.code_bytes
    )


def test_collectives_of_a_sharded_program():
    mesh = jax.make_mesh((8,), ("data",))
    x = jax.ShapeDtypeStruct(
        (16, 5),
        jnp.float32,
        sharding=NamedSharding(mesh, PartitionSpec("data")),
    )
    total = jax.jit(
        lambda x: x.sum(0), out_shardings=NamedSharding(mesh, PartitionSpec())
    )
    program = read_program(total.lower(x).compile())
    assert program.collective_bytes == {"all-reduce": 5 * 4}
    assert program.argument_bytes == 16 // 8 * 5 * 4


BACKWARD = "jit(train_step)/transpose(jvp(DenseNet))/DenseNet.features"
BLOCK = f"{BACKWARD}/denseblock1/denseblock1._recomputing"


@pytest.mark.parametrize(
    ("op_name", "expected"),
    [
        (
            "jit(train_step)/jvp(DenseNet)/DenseNet.features/denseblock2/"
            "denselayer12/conv1/cond/branch_0_fun/conv_general_dilated",
            "denseblock2 conv1, forward",
        ),
        (f"{BACKWARD}/norm5/mul", "norm5, backward"),
        (f"{BACKWARD}/denseblock1/concatenate", "denseblock1, backward"),
        (
            f"{BLOCK}/transpose(jvp(conv2))/conv_general_dilated",
            "denseblock1 conv2, backward",
        ),
        (f"{BLOCK}/jvp(conv1)/mul", "denseblock1 conv1, recomputed"),
        (f"{BLOCK}/jvp()/mul", "denseblock1, recomputed"),
        (f"{BLOCK}/add", "denseblock1, backward"),
        (
            "jit(train_step)/jvp(DenseNet)/DenseNet.features/denseblock1/"
            "denselayer2/norm1/norm1._update/add",
            "denseblock1 norm1, forward",
        ),
        (
            "jit(train_step)/jvp(DenseNet)/DenseNet.features/denseblock1/"
            "denselayer1/jit(relu)/max",
            "denseblock1, forward",
        ),
        (
            "jit(train_step)/transpose(jvp(jit(log_softmax)))/reduce_sum",
            "loss, backward",
        ),
        (f"{BACKWARD}/reduce_sum", "features, backward"),
        (
            f"jit(train_step)/jvp(DenseNet)/DenseNet.features/conv0/mul;"
            f"{BACKWARD}/norm0/mul",
            "conv0, forward",
        ),
        (f"jit(f)/jit(clip)/max;{BACKWARD}/norm0/mul", "optimizer and metrics"),
        ("jit(f)/jvp(DenseNet)/DenseNet.head/reduce_sum", "head, forward"),
        ("jit(train_step)/jit(clip)/max", "optimizer and metrics"),
    ],
)
def test_layer_names(op_name, expected):
    assert layer_name(op_name) == expected


@pytest.mark.parametrize("remat", ["none", "convs"])
def test_a_real_program_names_its_layers(remat):
    model = DenseNet(
        (1,), growth_rate=4, stem="cifar", num_classes=3, remat=remat
    )
    images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)

    @jax.grad
    def gradient(params, batch_stats, images):
        logits, _ = model.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
        )
        return jnp.square(logits).sum()

    lowered = jax.jit(gradient).lower(
        variables["params"], variables["batch_stats"], images
    )
    hlo = lowered.compile().as_text()
    names = {layer_name(n) for n in re.findall(r'op_name="([^"]*/[^"]*)"', hlo)}
    for layer in ("conv0", "denseblock1 conv", "norm5", "classifier"):
        for which in ("forward", "backward"):
            assert any(
                name.startswith(layer) and name.endswith(which)
                for name in names
            ), (layer, which)
    assert ("denseblock1 norm1, recomputed" in names) == (remat == "convs")
