"""Compiling for a TPU v5e and a Hopper GPU, on a machine that has neither.

Needs the compilers: in an environment of its own each,

    pip install -r requirements.txt "jax[tpu]"     (1.3 GB), or "jax[cuda12]" (5.6 GB)
    TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu python -m pytest tests/test_compile.py --run-slow

Tests whose compiler is not there skip.
"""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import topologies

import jaxquant as jq
from benchmarks.common import collective_sizes
from jaxquant.packing.codes import packed_rows
from train import engine, experiment, program
from train.config import Config, Data, Fit, Quantize
from train.layout import Layout

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("optimized"),
    # JAX 0.12 still has it; the range of versions in pyproject.toml ends before it can go.
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated"),
]

# What the compiler asks about an H100, as `GpuTopology.target_config` of one prints it.
HOPPER = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  device_memory_size: 84929347584 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
}
platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3"
runtime_version { major: 12 minor: 8 } dnn_version_info { major: 9 minor: 7 }
"""


def absent(target, count=1):
    """Return a mesh of so many devices of the target; there is but one GPU."""
    if target == "tpu":
        if importlib.util.find_spec("libtpu") is None:
            pytest.skip('needs pip install "jax[tpu]"')
        topology = topologies.get_topology_desc("v5e:2x2", "tpu")
    else:
        if importlib.util.find_spec("jax_cuda12_plugin") is None:
            pytest.skip('needs pip install "jax[cuda12]"')
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="", topology="1x1x1", target_config=HOPPER
        )
    return jax.sharding.Mesh(np.array(topology.devices[:count]), ("data",))


@pytest.fixture(params=["tpu", "cuda"])
def mesh(request):
    """Use a mesh of one absent device."""
    mesh = absent(request.param)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield mesh


def abstract(mesh, shape, dtype):
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)


@pytest.mark.parametrize("vectors", [1, 8, 64])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("per_column", [False, True])
@pytest.mark.parametrize("k", [2, 3, 5, 16, 17, 200])
def test_the_product_compiles_and_never_holds_the_weight(mesh, k, per_column, dtype, vectors):
    if per_column and k == 200 and mesh.devices.flat[0].platform == "tpu":
        pytest.skip("no kernel, is unpacked")
    rows, columns = 4096, 4096
    packed = jq.PackedArray(
        codes=abstract(mesh, (packed_rows(rows, k), columns), jnp.uint8),
        codebook=abstract(mesh, (1, columns, k) if per_column else (k,), dtype),
        rows=(rows,),
        columns=(columns,),
    )
    x = abstract(mesh, (vectors, rows), dtype)
    compiled = jax.jit(jq.matmul).lower(x, packed).compile()
    assert "custom-call" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < rows * columns


def compiled_text(function, layout, *args):
    """Compile for arguments that lie as weights do; return the program."""
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout.of(x.shape)), args
    )
    return jax.jit(function).lower(*placed).compile().as_text()


SHAPES = {
    "dense": jax.ShapeDtypeStruct((512, 2048), "float32"),
    "conv": jax.ShapeDtypeStruct((3, 3, 64, 128), "bfloat16"),
    "stack": jax.ShapeDtypeStruct((4, 128, 128), "float32"),
    "bias": jax.ShapeDtypeStruct((2048,), "float32"),
}
RULES = [jq.LayerRule("stack", axis=0), jq.LayerRule(".*")]
PLAN = jq.mlq(SHAPES, groups=2, rules=RULES)


@pytest.mark.parametrize("target", ["tpu", "cuda"])
@pytest.mark.parametrize("job", ["quantize_round", "incremental"])
def test_rounds_compile_for_split_weights_and_never_gather_them(target, job):
    layout = Layout(absent(target, 4), fsdp=True)
    if job == "quantize_round":
        state = jax.eval_shape(lambda p: jq.init(PLAN, p), SHAPES)
        text = compiled_text(lambda p, s: jq.quantize_round(PLAN, p, s), layout, SHAPES, state)
    else:
        tx = jq.incremental(optax.adamw(1e-3), PLAN, 10)
        state = jax.eval_shape(tx.init, SHAPES)
        text = compiled_text(tx.update, layout, SHAPES, state, SHAPES)
    assert (layout.size > 1) == ("all-reduce" in text)
    assert max(collective_sizes(text, "all-gather"), default=0) < 128 * 128  # a slice of a stack


@pytest.mark.parametrize("target", ["tpu", "cuda"])
def test_one_program_compiles(target):
    layout = Layout(absent(target, 4), fsdp=True)
    config = Config(
        data=Data(name="digits"),
        quantize=Quantize(method="mlq", bits=2, groups=2, recalibrate_batches=2),
        retrain=Fit(epochs=(1,), distill_weight=0.5, feature_weight=1.0),
        batch_size=128,
    )
    job = experiment.check(config)
    parts = engine.build(config, job.dataset, job.task, layout).parts
    quant = jax.eval_shape(lambda p: jq.init(job.plan, p), job.shapes["params"])
    number = jax.ShapeDtypeStruct((), "float32")
    state = jax.eval_shape(parts.start, job.shapes, quant, number, number)
    steps = program.make_steps(
        [
            program.Epoch(r, True, True, np.zeros((11, 128), int), np.zeros(11, np.float32), key)
            for r, key in enumerate(np.zeros((4, 2), np.uint32))
        ]
    )
    data = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
        (
            job.dataset.train,
            (
                engine.Images(np.zeros((4, 100, 8, 8, 1), np.uint8), np.zeros((4, 100), np.int32)),
                np.zeros((4, 100), bool),
            ),
            np.zeros((4, 3, 2), np.uint32),
        ),
    )
    run = program.build(config, job.plan, parts)
    text = compiled_text(run, layout, state, quant, job.shapes, *data, number, number, steps)
    assert " while(" in text and " conditional(" in text
