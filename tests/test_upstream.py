"""What libraries do wrong today. A test that fails here means a mended library: drop our detour."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lsdl.sharding import mesh, rules


def gradients(kernel_spec):
    """Of two convolutions, the first of stride 2: (on one device, over 2 x 2 x 2 devices)."""
    grid = mesh.make_mesh(mesh.parse_mesh("data=2,fsdp=2,tensor=2", 8))
    keys = jax.random.split(jax.random.key(0), 3)
    kernels = (
        jax.random.normal(keys[0], (3, 3, 32, 64)),
        jax.random.normal(keys[1], (3, 3, 64, 64)),
    )
    image_BHWC = jax.random.normal(keys[2], (96, 4, 4, 32))

    def loss(kernels, x_BHWC):
        for kernel, stride in zip(kernels, (2, 1), strict=True):
            x_BHWC = jax.nn.relu(
                jax.lax.conv_general_dilated(
                    x_BHWC,
                    kernel,
                    (stride, stride),
                    "SAME",
                    dimension_numbers=("NHWC", "HWIO", "NHWC"),
                )
            )
        return (x_BHWC.mean((1, 2)) ** 2).sum()

    kernel = NamedSharding(grid, kernel_spec)
    batch = NamedSharding(grid, P(("data", "fsdp")))
    split = jax.jit(
        jax.grad(loss), in_shardings=((kernel, kernel), batch), out_shardings=(kernel, kernel)
    )
    return jax.grad(loss)(kernels, image_BHWC)[0], split(kernels, image_BHWC)[0]


def error(pair):
    one, many = map(np.asarray, pair)
    return np.linalg.norm(one - many) / np.linalg.norm(one)


def test_a_kernel_split_on_both_channels_gets_a_wrong_gradient():
    """Why `rules.TABLES` splits no `conv_in`. Seen on jax 0.10.2 and 0.12.0, CPU."""
    assert error(gradients(P(None, None, "fsdp", "tensor"))) > 0.1


@pytest.mark.parametrize("table", sorted(rules.TABLES))
def test_our_tables_give_such_a_kernel_the_right_gradient(table):
    grid = mesh.make_mesh(mesh.parse_mesh("data=2,fsdp=2,tensor=2", 8))
    names = (None, None, "conv_in", "conv_out")
    spec, *_ = rules.resolve(names, (3, 3, 64, 64), rules.TABLES[table], grid)
    assert error(gradients(spec)) < 1e-5
