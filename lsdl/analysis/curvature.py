"""The curvature of a mean loss: matrix products, and what Lanczos' iteration learns from them.

A loss is `loss(params, batch) -> (sum, weight)`; what is meant is the sum over all batches divided
by the weight of all. Vectors are trees like the parameters and lie where these do, on any mesh. So
does Lanczos' basis, of as many vectors as there are steps; that is why the iteration is written
here: matfree (0.6.3) makes one long vector of a tree, which leaves its basis whole on each device,
and traces the product, with all batches in one program.

Shape letters: K steps of Lanczos, R starts, T places of a density.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lsdl.errors import UserError

Loss = Callable[[Any, Any], tuple[jax.Array, jax.Array]]  # (params, batch) -> (sum, weight)
Product = Callable[[Any], Any]  # vector -> vector
# (params, batch, vector) -> (a batch's sum of products, weight)
BatchProduct = Callable[[Any, Any, Any], tuple[Any, jax.Array]]
map_ = jax.tree.map


def hessian(loss: Loss) -> BatchProduct:
    """Of the Hessian, forward through the gradient. Source: Pearlmutter 1994."""

    def product(params, batch, vector):
        gradient = jax.grad(lambda params: loss(params, batch), has_aux=True)
        _, image, weight = jax.jvp(gradient, (params,), (vector,), has_aux=True)
        return image, weight

    return product


def gauss_newton(outputs: Callable[[Any, Any], Any], loss_of: Loss) -> BatchProduct:
    """Of J^T H J: J of `outputs(params, batch)`, H the Hessian of `loss_of(outputs, batch)` there.

    With a softmax cross-entropy this is also Fisher's matrix, with labels drawn from the model.
    Source: Schraudolph 2002, equation 8; Martens 2020, section 8.
    """

    def product(params, batch, vector):
        found, forward = jax.linearize(lambda params: outputs(params, batch), params)
        gradient = jax.grad(lambda found: loss_of(found, batch), has_aux=True)
        _, curved, weight = jax.jvp(gradient, (found,), (forward(vector),), has_aux=True)
        return jax.linear_transpose(forward, params)(curved)[0], weight

    return product


def empirical_fisher(loss: Loss) -> BatchProduct:
    """Of the mean of g g^T over examples, g being the gradient of one example's loss.

    The loss has to be linear in `batch["weight"]`, the examples' weights: its derivative there is
    each example's own loss, so that no gradient of a single example is ever formed.
    """

    def product(params, batch, vector):
        def weighted(params, weight_B):
            return loss(params, batch | {"weight": weight_B})

        def gradient(weight_B):
            return jax.grad(weighted, has_aux=True)(params, weight_B)

        _, back, weight = jax.vjp(gradient, batch["weight"], has_aux=True)
        (along_B,) = back(vector)  # g . vector of each example
        return gradient(batch["weight"] * along_B)[0], weight

    return product


def mean(
    product: BatchProduct,
    params: Any,
    batches: Iterable,
    *,
    program: Callable = jax.jit,
    tick: Callable[[], None] = lambda: None,
) -> Product:
    """`vector -> ` the mean product over all of `batches`, which are gone through at each call.

    `program` compiles, as `jax.jit` does; `tick` is called after each batch.
    """

    def add(params, batch, vector, total):
        image, weight = product(params, batch, vector)
        return map_(jnp.add, total, image), weight

    shardings = map_(lambda x: x.sharding, params)
    step = program(add, donate_argnums=3, out_shardings=(shardings, None))

    def whole(vector):
        total, whole_weight = zeros_like(vector), 0.0
        for batch in batches:
            # Virtual devices of one CPU starve with several programs in flight.
            total, weight = jax.block_until_ready(step(params, batch, vector, total))
            whole_weight += float(weight)
            tick()
        return scaled(total, 1 / whole_weight)

    return whole


def zeros_like(tree: Any) -> Any:
    """Zeros that lie as the leaves of `tree`."""
    return map_(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), tree)


def random_like(tree: Any, key: jax.Array, draw: Callable = jax.random.normal) -> Any:
    """`draw(key, shape, dtype)` for each leaf: the same numbers on every mesh."""
    leaves, structure = jax.tree.flatten(tree)
    program = _draws(tuple((x.shape, x.dtype, x.sharding) for x in leaves), draw)
    return jax.tree.unflatten(structure, program(key))


@functools.lru_cache(maxsize=16)
def _draws(leaves: tuple, draw: Callable) -> Callable:
    def draws(key):
        return [draw(jax.random.fold_in(key, i), *leaf[:2]) for i, leaf in enumerate(leaves)]

    return jax.jit(draws, out_shardings=[sharding for *_, sharding in leaves])


@jax.jit
def dot(a: Any, b: Any) -> jax.Array:
    """The inner product of two trees."""
    return sum(jax.tree.leaves(map_(lambda x, y: jnp.sum(x * y), a, b)))


@jax.jit
def scaled(tree: Any, factor: Any) -> Any:
    return map_(lambda x: (factor * x).astype(x.dtype), tree)


def unit(tree: Any) -> Any:
    """`tree` at length 1."""
    return scaled(tree, 1 / jnp.sqrt(dot(tree, tree)))


def size(tree: Any) -> int:
    """How many numbers a tree has."""
    return sum(x.size for x in jax.tree.leaves(tree))


def stacked(tree: Any, count: int) -> Any:
    """Zeros for `count` trees, their number the first dim of each leaf; each lies as in `tree`."""

    def make(x):
        where = x.sharding
        if isinstance(where, NamedSharding):
            where = NamedSharding(where.mesh, P(None, *where.spec))
        return jnp.zeros((count, *x.shape), x.dtype, device=where)

    return map_(make, tree)


@functools.partial(jax.jit, donate_argnums=0)
def put(stack: Any, i: int, tree: Any) -> Any:
    """`stack` with `tree` as its `i`-th."""
    return map_(lambda s, x: s.at[i].set(x), stack, tree)


@jax.jit
def combined(stack: Any, factors_K: jax.Array) -> Any:
    """The sum of the stack's trees, each times its factor."""
    wide = lambda s: factors_K.astype(s.dtype).reshape(-1, *[1] * (s.ndim - 1))  # noqa: E731
    return map_(lambda s: jnp.sum(wide(s) * s, axis=0), stack)


@jax.jit
def coefficients(stack: Any, tree: Any) -> jax.Array:
    """The inner products of the stack's trees with `tree`, `(K,)`."""
    each = map_(lambda s, x: jnp.sum(s * x[None], axis=range(1, s.ndim)), stack, tree)
    return sum(jax.tree.leaves(each))


@jax.jit
def _orthogonalised(basis: Any, vector: Any) -> tuple[Any, jax.Array]:
    """(`vector` without its part in the span of `basis`, what is left of its length)."""
    for _ in range(2):  # twice is enough: Giraud et al. 2005
        part = combined(basis, coefficients(basis, vector))
        vector = map_(jnp.subtract, vector, part)
    return vector, jnp.sqrt(dot(vector, vector))


class Lanczos(NamedTuple):
    """A = V T V^T on the span of V, but for `off_K[-1]` in a direction outside of it."""

    diagonal_K: np.ndarray
    off_K: np.ndarray  # beside the diagonal; the last one leads out of the span
    basis: Any  # V: `stacked` trees, orthonormal
    size: int  # of A

    @property
    def inner(self) -> np.ndarray:
        """T, `(K, K)`."""
        off = self.off_K[:-1]
        return np.diag(self.diagonal_K) + np.diag(off, 1) + np.diag(off, -1)

    def ritz(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """T's eigenvalues, rising, their eigenvectors in columns, and the residuals in A.

        An eigenvalue of A lies within each one's residual.
        """
        values_K, vectors_KK = np.linalg.eigh(self.inner)
        return values_K, vectors_KK, np.abs(self.off_K[-1] * vectors_KK[-1])

    def condition(self) -> float:
        """The largest |eigenvalue| over the smallest of A, at least; exact once K is the size of A.

        |A v| >= min |eigenvalue| for every unit vector v, also for the best one in the span.
        """
        outer = np.vstack([self.inner, np.eye(len(self.inner))[-1] * self.off_K[-1]])
        largest = np.abs(np.linalg.eigvalsh(self.inner)).max()
        with np.errstate(divide="ignore"):
            return float(largest / np.linalg.svd(outer, compute_uv=False).min())


def lanczos(
    product: Product,
    start: Any,
    steps: int,
    *,
    key: jax.Array,
    enough: Callable[[Lanczos], bool] = lambda found: False,
) -> Lanczos:
    """At most `steps` steps for a symmetric product, with full reorthogonalisation.

    Where the iteration closes on itself it goes on from a new direction, drawn with `key`, so that
    equal eigenvalues are found as often as there are. `enough` may end it before its last step.
    Source: Lanczos 1950; Golub and Van Loan 2013, section 10.3.
    """
    number = size(start)
    steps = min(steps, number)
    vector, basis = unit(start), stacked(start, steps)
    diagonal, off = [], []
    for i in range(steps):
        basis = put(basis, i, vector)
        image = product(vector)
        diagonal.append(float(dot(vector, image)))
        vector, rest = _orthogonalised(basis, image)
        off.append(float(rest))
        scale = max(map(abs, (*diagonal, *off)))
        if not np.isfinite(scale):
            raise UserError("The curvature is not finite: the loss is not, at these parameters.")
        if off[-1] <= 1e-6 * scale:  # what is left is rounding
            off[-1] = 0.0
            fresh = random_like(start, jax.random.fold_in(key, i))
            vector, rest = _orthogonalised(basis, fresh)
        vector = scaled(vector, 1 / rest)
        found = Lanczos(np.array(diagonal), np.array(off), basis, number)
        if i + 1 < steps and enough(found):
            break
    return found


class Eigenpairs(NamedTuple):
    """The largest eigenvalues, falling, with unit eigenvectors, and the smallest of all."""

    values: np.ndarray
    vectors: list[Any]
    residuals: np.ndarray  # |A v - value v|
    smallest: float
    smallest_residual: float
    lanczos: Lanczos


def eigenpairs(
    product: Product,
    like: Any,
    *,
    top: int,
    key: jax.Array,
    steps: int = 100,
    tolerance: float = 1e-3,
) -> Eigenpairs:
    """The `top` largest eigenvalues of a symmetric product, by at most `steps` products.

    Ends when each residual is below `tolerance` times the largest |eigenvalue|; an eigenvalue's
    error is then of the order of the residual's square. `like` is a tree of the vectors' shapes.
    """

    def pick(found: Lanczos):
        values_K, vectors_KK, residuals_K = found.ritz()
        return values_K[::-1], vectors_KK[:, ::-1], residuals_K[::-1]

    def enough(found: Lanczos) -> bool:
        values_K, _, residuals_K = pick(found)
        limit = tolerance * abs(values_K).max()
        return len(values_K) >= top and bool((residuals_K[:top] <= limit).all())

    started, restarted = jax.random.split(key)
    start = random_like(like, started)
    found = lanczos(product, start, steps, key=restarted, enough=enough)
    values_K, vectors_KK, residuals_K = pick(found)
    unused = jax.tree.leaves(found.basis)[0].shape[0] - len(values_K)  # the iteration ended early
    factors = np.pad(vectors_KK.T[:top], ((0, 0), (0, unused)))
    vectors = [combined(found.basis, jnp.asarray(f_K, jnp.float32)) for f_K in factors]
    last = float(values_K[-1]), float(residuals_K[-1])
    return Eigenpairs(values_K[:top], vectors, residuals_K[:top], *last, found)


def trace(product: Product, like: Any, *, samples: int, key: jax.Array) -> tuple[float, float]:
    """(the trace, its standard error) from `samples` random vectors of signs.

    Source: Hutchinson 1990.
    """
    if samples < 2:
        raise UserError(f"{samples} samples of the trace have no standard error: take 2 or more.")
    values = []
    for i in range(samples):
        vector = random_like(like, jax.random.fold_in(key, i), jax.random.rademacher)
        values.append(float(dot(vector, product(vector))))
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(samples))


class Spectrum(NamedTuple):
    """Eigenvalues' distribution as points with weights, for each of R random starts."""

    values_RK: list[np.ndarray]
    weights_RK: list[np.ndarray]  # of each start 1 together
    size: int

    def density(self, at_T: np.ndarray, width: float) -> np.ndarray:
        """The share of the eigenvalues per unit at each place, each point a normal of `width`."""
        total_T = np.zeros(len(at_T))
        for values_K, weights_K in zip(self.values_RK, self.weights_RK, strict=True):
            away_TK = (at_T[:, None] - values_K[None]) / width
            total_T += np.exp(-(away_TK**2) / 2) @ weights_K
        return total_T / (len(self.values_RK) * width * np.sqrt(2 * np.pi))

    def trace(self) -> tuple[float, float]:
        """(trace, its standard error): each start's quadrature is exact for it."""
        pairs = zip(self.values_RK, self.weights_RK, strict=True)
        found = [self.size * float(values_K @ weights_K) for values_K, weights_K in pairs]
        error = np.std(found, ddof=1) / np.sqrt(len(found)) if len(found) > 1 else np.nan
        return float(np.mean(found)), float(error)


def random_starts(
    product: Product, like: Any, *, starts: int, steps: int, key: jax.Array
) -> Iterator[Lanczos]:
    """Runs of Lanczos from random signs: `starts` x `steps` products."""
    for i in range(starts):
        drawn, restarted = jax.random.split(jax.random.fold_in(key, i))
        start = random_like(like, drawn, jax.random.rademacher)
        yield lanczos(product, start, steps, key=restarted)


def spectrum(product: Product, like: Any, *, starts: int, steps: int, key: jax.Array) -> Spectrum:
    """The spectral density by stochastic Lanczos quadrature: `starts` x `steps` products.

    Source: Ubaru et al. 2017, algorithm 1; Ghorbani et al. 2019, section 3.
    """
    return quadrature(random_starts(product, like, starts=starts, steps=steps, key=key))


def quadrature(found: Iterable[Lanczos]) -> Spectrum:
    """The spectrum that runs of Lanczos from random starts tell."""
    values, weights, number = [], [], 0
    for run in found:
        values_K, vectors_KK, _ = run.ritz()
        values.append(values_K)
        weights.append(vectors_KK[0] ** 2)
        number = run.size
    return Spectrum(values, weights, number)
