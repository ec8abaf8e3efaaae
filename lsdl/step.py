"""The step: `(TrainState, Batch) -> (TrainState, Metrics)`, pure, in two halves.

    grads   forward and backward over the batch, in microbatches: sums, not means
    update  sums -> means -> optax -> the next state and the step's metrics; an optimiser that wants
            the loss or the gradient at other parameters is given functions of them

A step is one optimiser update, whatever the number of microbatches.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from lsdl import guard, measures
from lsdl.metrics import means
from lsdl.models.layers import example_rows
from lsdl.optim import wrappers
from lsdl.state import Batch, TrainState, stream

SUMMED = ("grads", "loss", "weight", "metrics")
TEACHER = "teacher"  # of distillation: its place in `model_state`, and its outputs in `extra`
Sums = dict[str, Any]  # the SUMMED trees, over the rows of a batch, and the new `model_state`
Metrics = dict[str, jax.Array]


def make_prepare(task) -> Callable[[Batch, TrainState], Batch]:
    """The task's device transforms, and each example's row in the global batch."""

    def prepare(batch: Batch, state: TrainState) -> Batch:
        return task.prepare(batch, stream(state.key, "prepare", state.step)) | _rows(batch)

    return prepare


def _rows(batch: Batch) -> Batch:
    return {"row": jnp.arange(len(batch["weight"]))}


def make_loss(apply: Callable, task, *, teacher: Callable | None = None) -> Callable:
    """`loss(params, model_state, batch, key) -> (loss sum, aux)` of one microbatch, in training.

    `apply(variables, *inputs, train=, rngs=, mutable=)` is a Linen module's; so is `teacher`, whose
    outputs the loss gets as `extra` and whose variables are the state's `model_state[TEACHER]`.
    """

    def loss(params, model_state, batch: Batch, key):
        model_state = dict(model_state)
        taught = {name: model_state.pop(name) for name in [TEACHER] if teacher}
        inputs = task.inputs(batch)
        with example_rows(batch["row"]):
            outputs, model_state = apply(
                {"params": params, **model_state},
                *inputs,
                train=True,
                rngs={"dropout": key},
                mutable=list(model_state),
            )
        extra = {TEACHER: teacher(taught[TEACHER], *inputs, train=False)} if teacher else None
        loss_sum, weight, metric_sums = task.loss(outputs, batch, extra=extra)
        model_state = {**model_state, **taught}
        return loss_sum, {"weight": weight, "metrics": metric_sums, "model_state": model_state}

    return loss


def make_residuals(loss: Callable, prepare: Callable, *, accum: int) -> Callable:
    """`residuals(state, batch) -> arrays`: what a microbatch's `loss` keeps for its backward pass.

    Among them arrays of `state` and `batch` themselves, which are there anyway.
    """

    def residuals(state: TrainState, batch: Batch) -> list[jax.Array]:
        first = jax.tree.map(lambda x: x[::accum], prepare(batch, state))
        key = stream(state.key, "dropout", state.step)
        of_params = lambda params: loss(params, state.model_state, first, key)[0]  # noqa: E731
        return jax.tree.leaves(jax.vjp(of_params, state.params)[1])

    return residuals


def make_grads(
    loss: Callable, *, accum: int, measured: Sequence[str] = ()
) -> Callable[[TrainState, Batch], Sums]:
    """`grads(state, batch) -> Sums` over all rows of `batch`, in `accum` microbatches of `loss`.

    Microbatches are strided (row r goes to microbatch r mod accum), so that each one is spread
    over all devices. `measured` are the words of `measures` that look at each microbatch; what
    they add up is in the sums as "measured".
    """
    of_microbatch = functools.partial(measures.of_microbatch, words=measured)

    def one(state: TrainState, model_state, batch: Batch) -> Sums:
        key = stream(state.key, "dropout", state.step)
        value_and_grad = jax.value_and_grad(loss, has_aux=True)
        (loss_sum, aux), gradient = value_and_grad(state.params, model_state, batch, key)
        return {"grads": gradient, "loss": loss_sum, **aux}

    def grads(state: TrainState, batch: Batch) -> Sums:
        if accum == 1:
            return one(state, state.model_state, batch)
        strided = lambda x: x.reshape(-1, accum, *x.shape[1:]).swapaxes(0, 1)  # noqa: E731
        microbatches = jax.tree.map(strided, batch)

        def add(sums: Sums, microbatch: Batch):
            new = one(state, sums["model_state"], microbatch)
            if measured:
                new["measured"] = of_microbatch(means(new["grads"], new["weight"]))
            total = {name: jax.tree.map(jnp.add, sums[name], new[name]) for name in names}
            return total | {"model_state": new["model_state"]}, None

        first = jax.tree.map(lambda x: x[0], microbatches)
        shapes = jax.eval_shape(one, state, state.model_state, first)
        # Under manual axes the sums differ from device to device, so their zeros have to be of
        # that type too: params and rows are.
        zero = 0 * first["weight"][0]
        zeros = {
            name: jax.tree.map(lambda s: jnp.full(s.shape, zero, s.dtype), shapes[name])
            for name in SUMMED
        }
        zeros["grads"] = jax.tree.map(jnp.zeros_like, state.params)
        names = SUMMED
        if measured:
            names += ("measured",)
            found = jax.eval_shape(of_microbatch, state.params)
            zeros["measured"] = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), found)
        return lax.scan(add, zeros | {"model_state": state.model_state}, microbatches)[0]

    return grads


def make_update(
    tx: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    *,
    rule: guard.Rule,
    gauss_newton: Callable | None = None,
    measure: Callable | None = None,
) -> Callable[[TrainState, Batch, Callable], tuple[TrainState, Metrics]]:
    """`update(state, batch, sums) -> (state, metrics)`: one optimiser step on the mean gradient.

    A step that does not keep to the guard's `rule` changes nothing but the count of steps.
    `sums(state, batch) -> Sums` is the gradients' half, over all devices; `gauss_newton` is for the
    optimisers that want its products, `measure` what `measures.make` returns.
    """

    def update(state: TrainState, batch: Batch, sums: Callable) -> tuple[TrainState, Metrics]:
        found = sums(state, batch)
        weight = found["weight"]
        loss, gradient = means((found["loss"], found["grads"]), weight)
        grad_norm = optax.tree.norm(gradient)
        verdict = guard.judge(
            state.guard, loss, grad_norm, model_state=found["model_state"], rule=rule
        )

        def move(gradient, params, opt_state):
            updates, opt_state = tx.update(
                gradient,
                opt_state,
                params,
                value=loss,
                grad=gradient,
                **_functions(state, batch, sums),
                **({"gauss_newton_fn": gauss_newton(state, batch)} if gauss_newton else {}),
            )
            params = optax.apply_updates(params, updates)
            told = {"update_norm": optax.tree.norm(updates)}
            if measure:
                rows = len(batch["weight"])
                told |= measure(state.params, gradient, updates, found, batch_size=rows)
            return (params, opt_state), told

        (params, opt_state), moved = guard.unless_bad(
            verdict.good, move, gradient, state.params, state.opt_state, rule=rule
        )
        model_state = guard.chosen(verdict.good, found["model_state"], state.model_state)
        taken = state.step - state.guard.skipped  # the updates that the optimiser has counted
        metrics = {
            "loss": loss,
            **means(found["metrics"], weight),
            "grad_norm": grad_norm,
            "update_norm": moved.pop("update_norm"),
            "param_norm": optax.tree.norm(params),
            "learning_rate": wrappers.rate(opt_state, jnp.asarray(schedule(taken), jnp.float32)),
        }
        state = state.replace(
            step=state.step + 1,
            params=params,
            model_state=model_state,
            opt_state=opt_state,
            guard=verdict.guard,
        )
        return state, metrics | moved | guard.told(verdict, metrics["update_norm"])

    return update


def _functions(state: TrainState, batch: Batch, sums: Callable) -> dict[str, Callable]:
    """`value_fn(params)` and `grad_fn(params[, i])`: the step's loss and gradient elsewhere.

    On the step's batch, with its dropout masks, from its model state, which they leave alone. The
    derivative of `value_fn` is the gradients' half itself: autodiff sees no collective.
    """

    def at(params):
        found = sums(state.replace(params=params), batch)
        return means((found["loss"], found["grads"]), found["weight"])

    @jax.custom_vjp
    def value_fn(params):
        return at(params)[0]

    def backward(gradient, slope):
        return (jax.tree.map(lambda g: slope * g, gradient),)

    value_fn.defvjp(at, backward)
    return {"value_fn": value_fn, "grad_fn": lambda params, i=0: at(params)[1]}


def make_run(
    prepare: Callable,
    grads: Callable,
    make_tx: Callable[[optax.Schedule], optax.GradientTransformationExtraArgs],
    make_state: Callable[[optax.GradientTransformation, jax.Array], TrainState],
    **of_update: Any,
) -> Callable[[jax.Array, jax.Array, Batch], tuple[TrainState, Metrics]]:
    """`run(key, rates_T, batches_T) -> (state, metrics_T)`: a whole training as one program.

    The very steps that a partitioner runs one by one, for one device. The learning rates are
    arguments, so that runs that differ in seed and schedule alone share a compilation.
    `of_update`: what else `make_update` takes.
    """

    def run(key: jax.Array, rates_T: jax.Array, batches_T: Batch) -> tuple[TrainState, Metrics]:
        schedule = lambda step: rates_T[step]  # noqa: E731
        tx = make_tx(schedule)
        update = make_update(tx, schedule, **of_update)

        def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
            return update(state, prepare(batch, state), grads)

        return lax.scan(step, make_state(tx, key), batches_T)

    return run


def make_gauss_newton(apply: Callable, task) -> Callable[[TrainState, Batch], Callable]:
    """`gauss_newton(state, batch)(params, v)`: J^T H J v, on one device.

    J is of the model's outputs at `params`, and H the Hessian of the mean loss in the outputs.
    Source: Schraudolph 2002, equation 8.
    """

    def gauss_newton(state: TrainState, batch: Batch) -> Callable:
        def outputs_of(params):
            with example_rows(batch["row"]):
                return apply(
                    {"params": params, **state.model_state},
                    *task.inputs(batch),
                    train=True,
                    rngs={"dropout": stream(state.key, "dropout", state.step)},
                    mutable=list(state.model_state),
                )[0]

        def loss(outputs):
            loss_sum, weight, _ = task.loss(outputs, batch)
            return loss_sum / weight

        def product(params, vector):
            outputs, forward = jax.linearize(outputs_of, params)
            curved = jax.jvp(jax.grad(loss), (outputs,), (forward(vector),))[1]
            return jax.linear_transpose(forward, params)(curved)[0]

        return product

    return gauss_newton


def make_eval_step(apply: Callable, task) -> Callable[[TrainState, Batch], Mapping]:
    """`eval_step(state, batch) -> {"loss", "weight", metrics...}`, summed over the batch."""

    def eval_step(state: TrainState, batch: Batch) -> Mapping:
        outputs = apply(evaluated(state), *task.inputs(batch), train=False)
        loss_sum, weight, metric_sums = task.loss(outputs, batch | _rows(batch))
        return {"loss": loss_sum, "weight": weight, **metric_sums}

    return eval_step


def variables_of(state: TrainState) -> dict[str, Any]:
    """What the model is trained with."""
    rest = {name: value for name, value in state.model_state.items() if name != TEACHER}
    return {"params": state.params, **rest}


def evaluated(state: TrainState) -> dict[str, Any]:
    """What the model is evaluated with: its parameters, or the averages that `opt_state` has."""
    return variables_of(state.replace(params=wrappers.evaluated(state.opt_state, state.params)))


def as_weights(variables: Mapping[str, Any]) -> dict[str, Any]:
    """`variables` as a checkpoint has them: the parameters, and the other collections."""
    rest = {name: value for name, value in variables.items() if name != "params"}
    return {"params": variables["params"], "model_state": rest}


def make_init(
    module,
    task,
    tx: optax.GradientTransformation,
    *,
    batch_size: int,
    rule: guard.Rule,
    teacher=None,
) -> Callable:
    """`init(key) -> TrainState` whose parameters still carry their logical axes (Flax boxes).

    A `teacher`'s variables are there to be loaded into.
    """

    def init(key: jax.Array) -> TrainState:
        zeros = {n: jnp.zeros(s.shape, s.dtype) for n, s in task.spec(batch_size).items()}
        inputs = task.inputs(zeros)
        variables = module.init(stream(key, "params"), *inputs, train=False)
        params = variables.pop("params")
        if teacher is not None:
            variables[TEACHER] = teacher.init(stream(key, TEACHER), *inputs, train=False)
        step = jnp.zeros((), jnp.int32)
        return TrainState(step, params, variables, tx.init(params), key, guard.init(rule))

    return init
