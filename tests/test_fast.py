"""What makes a step fast and can be seen without a clock: in its program."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from lsdl.experiment import build

# Products with float32 among what they multiply, in bfloat16: by the last of their named scopes.
ALLOWED = {
    "BTNH,BSNH->BNTS": "the scores of plain attention, which stay in float32 for their softmax",
}


def products(jaxpr):
    """(the scopes, the types) of all products of matrices and convolutions."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            scopes = [scope.name for scope in eqn.source_info.name_stack.stack]
            yield scopes, {var.aval.dtype for var in eqn.invars}
        for inner in jaxprs_in_params(eqn.params):
            yield from products(inner)


LANGUAGE = ("lm_gpt2:124m,smoke", "lm_llama:110m,smoke", "lm_bert:base,smoke")


IMAGES = ("imagenet_vit:s16,smoke", "imagenet_resnet50:smoke")
CASES = [*itertools.product(LANGUAGE, (0, 128)), *((name, None) for name in IMAGES)]


@pytest.mark.parametrize(("name", "chunk"), CASES)
def test_in_bfloat16_no_product_is_of_float32(load, name, chunk):
    more = () if chunk is None else (f"loss.chunk={chunk}",)
    of = build(load(name, "precision=bfloat16", *more), devices=1)
    program = of.train_step.trace(of.abstract_state, of.abstract_batch)
    wide = [
        scopes
        for scopes, types in products(program)
        if jnp.dtype("float32") in types and not any(scope in ALLOWED for scope in scopes)
    ]
    assert wide == []


def test_a_scanned_stack_is_one_layer_of_program(load):
    """48 layers make a program at most 5% longer than 12."""

    def lines(layers):
        more = (f"model.num_layers={layers}", "model.width=48", "model.mlp_dim=64")
        of = build(load("lm_gpt2:124m,smoke", *more, "remat=full"), devices=jax.devices()[:1])
        return len(of.train_step.lower(of.abstract_state, of.abstract_batch).as_text().splitlines())

    few, many = lines(12), lines(48)
    assert few <= many <= 1.05 * few
