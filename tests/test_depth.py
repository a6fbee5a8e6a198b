"""Instruments for depth: against their definitions in NumPy float64, and their laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from flax import linen, nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from normlab import instruments
from tests.helpers import array, draw, gap, mesh

L, N, T, C, H = 3, 2, 6, 5, 4

streams = jax.jit(instruments.stream_statistics, static_argnames="ranks")
composite = jax.jit(instruments.rank_residual)
frobenius = jax.jit(functools.partial(instruments.rank_residual, length="frobenius"))
attend = jax.jit(instruments.attention_statistics, static_argnames="is_causal")
entropy = jax.jit(instruments.attention_entropy, static_argnames=("of", "normalized"))


def spectrum(x):
    return np.linalg.svd(x, compute_uv=False)


def effective(x):
    p = spectrum(x) / spectrum(x).sum(-1, keepdims=True)
    return np.exp(scipy.special.entr(p).sum(-1))


def cosines(x):
    u = x / np.linalg.norm(x, axis=-1, keepdims=True)
    each = u @ u.swapaxes(-1, -2)
    tokens = x.shape[-2]
    return (each.sum((-2, -1)) - tokens) / (tokens * (tokens - 1))


def composite_length(x):
    return np.sqrt(np.linalg.norm(x, 1, axis=(-2, -1)) * np.linalg.norm(x, np.inf, axis=(-2, -1)))


# Streams


def test_stream_statistics_are_their_definitions():
    x = draw(0, L, N, T, C) + 2
    found = streams(array(x))
    assert found.variance.shape == (L, N)
    assert gap(found.variance, x.var(-1).mean(-1)) < 1e-6
    assert gap(found.mean_square, (x**2).mean((-2, -1))) < 1e-6
    assert gap(found.cosine, cosines(x)) < 1e-5
    d = x - x.mean(-2, keepdims=True)
    assert gap(found.residual, composite_length(d) / composite_length(x)) < 1e-6
    ratio = np.linalg.norm(d, axis=(-2, -1)) / np.linalg.norm(x, axis=(-2, -1))
    assert gap(frobenius(array(x)), ratio) < 1e-6
    assert gap(found.effective_rank, effective(x)) < 1e-5
    assert gap(found.stable_rank, (spectrum(x) ** 2).sum(-1) / spectrum(x)[..., 0] ** 2) < 1e-5
    size = np.abs(x).reshape(L, N, -1)
    assert gap(found.massive.median, np.median(size, -1)) < 1e-6
    assert gap(found.massive.largest, size.max(-1)) < 1e-6
    at = np.unravel_index(size.argmax(-1), (T, C))
    assert gap([found.massive.token, found.massive.channel], [*at]) == 0


def test_ranks_know_the_rank_and_neither_scale_nor_rotation():
    x = draw(1, N, T, C)
    left, right = (np.linalg.qr(draw(seed, n, n))[0] for seed, n in ((2, T), (3, C)))
    low = draw(4, N, T, 2) @ draw(5, N, 2, C)
    equal = np.broadcast_to(np.linalg.qr(draw(6, T, C))[0], (N, T, C))
    found = streams(array(np.stack([x, left @ x @ right, x * 1e25, x * 1e-25, low, equal])))
    for rank in (found.effective_rank, found.stable_rank):
        for same in rank[1:4]:
            assert gap(same, rank[0]) < 1e-5
        assert (rank[4] < 2 + 1e-4).all()
        assert (rank[4] > 1).all()
        assert gap(rank[5], np.full(N, C)) < 1e-5
    # Σ p² ≤ max p, so Σ σ²/σ_1² ≤ 1/Σ p², and entropies fall with their order.
    assert (found.stable_rank <= found.effective_rank + 1e-5).all()
    assert gap(found.cosine[2], found.cosine[0]) < 1e-6
    assert gap(found.residual[3], found.residual[0]) < 1e-6
    turned = array(np.stack([x, left @ x @ right, x @ right]))
    assert gap(frobenius(turned)[2], frobenius(turned)[0]) < 1e-6
    assert (frobenius(turned) <= 1).all()


def test_collapsed_tokens_have_rank_one_no_residual_and_cosine_one():
    collapsed = jnp.broadcast_to(array(draw(7, N, 1, C)), (N, T, C))
    found = streams(collapsed)
    assert found.residual.tolist() == [0, 0]
    assert gap(found.cosine, np.ones(N)) < 1e-6
    assert gap(found.stable_rank, np.ones(N)) < 1e-6
    assert gap(found.effective_rank, np.ones(N)) < 1e-4


def test_nothing_has_no_rank_no_direction_and_no_mass():
    found = streams(jnp.zeros((N, T, C)))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(found))
    assert found.massive.ratio.tolist() == [0, 0]
    sparse = instruments.massive_activations(jnp.zeros((T, C)).at[1, 2].set(3))
    assert sparse.ratio == jnp.inf


def test_no_sequences_and_no_keys_are_measured():
    assert all(leaf.shape == (0,) for leaf in jax.tree.leaves(streams(jnp.zeros((0, T, C)))))
    for q, k in ((0, 0), (3, 0), (0, 3)):
        found = attend(jnp.ones((q, H, C)), jnp.ones((k, H, C)))
        assert all(leaf.shape == (H,) and (leaf == 0).all() for leaf in found)


def test_a_massive_activation_is_large_and_far_from_the_median():
    x = np.sign(draw(8, 4, T, C))  # the median of |x| is 1
    x[0, 3, 2] = -1000  # at the threshold of the second condition
    x[1, 3, 2] = 999
    x[2] /= 100
    x[2, 3, 2] = 99  # 9900 medians, and below 100
    x[3, 0, :3] = 2000, -3000, 1500
    found = jax.jit(instruments.massive_activations)(array(x))
    assert found.massive.tolist() == [1, 0, 0, 3]
    assert found.token.tolist() == [3, 3, 3, 0]
    assert found.channel.tolist() == [2, 2, 2, 1]
    assert gap(found.ratio, np.array([1000, 999, 9900, 3000.0])) < 1e-6
    small = instruments.massive_activations(array(x), least=98, times=900)
    assert small.massive.tolist() == [1, 1, 1, 3]


# Attention


def heads(keys=H, dtype=jnp.float32):
    return array(draw(10, N, T, H, C), dtype), array(draw(11, N, T, keys, C), dtype)


def probabilities(z, mask):
    z = np.where(mask, z, -np.inf)
    return scipy.special.softmax(z, -1)


def test_attention_is_measured_as_defined():
    q, k = heads(keys=2)
    z = np.einsum("nthd,nshd->nhts", q, np.repeat(k, 2, 2)) * C**-0.5
    assert gap(instruments.attention_logits(q, k), z) < 1e-6
    causal = np.tril(np.ones((T, T), bool))
    each = scipy.special.entr(probabilities(z, causal)).sum(-1)
    found = attend(q, k, is_causal=True)
    assert gap(found.entropy, each.mean(-1)) < 1e-5
    share = each[..., 1:] / np.log(np.arange(2, T + 1))
    assert gap(found.normalized_entropy, share.mean(-1)) < 1e-5
    assert gap(found.largest, np.abs(np.where(causal, z, 0)).max((-2, -1))) < 1e-6
    assert gap(found.rms, np.sqrt((z[..., causal] ** 2).mean(-1))) < 1e-6
    assert gap(attend(q, k, mask=causal), found) < 1e-6
    # Masked with −∞, or as probabilities, it is the same.
    assert gap(entropy(jnp.where(causal, array(z), -jnp.inf)), each) < 1e-5
    assert gap(entropy(array(probabilities(z, causal)), of="probabilities"), each) < 1e-5
    shares = entropy(
        array(probabilities(z, causal)), mask=causal, of="probabilities", normalized=True
    )
    assert gap(shares[..., 1:], share) < 1e-5


def test_the_heads_are_those_of_jax():
    q, k = heads(keys=2)
    v = jnp.broadcast_to(jnp.eye(T, dtype=q.dtype)[:, None], (N, T, 2, T))  # gives probabilities
    p = jax.nn.dot_product_attention(
        jnp.pad(q, [(0, 0)] * 3 + [(0, 1)]),
        jnp.pad(k, [(0, 0)] * 3 + [(0, 1)]),
        v,
        scale=C**-0.5,
        is_causal=True,
    )
    each = scipy.special.entr(np.asarray(p, np.float64)).sum(-1)
    assert gap(attend(q, k, is_causal=True).entropy, each.mean(1)) < 1e-5


def test_the_entropy_lies_between_one_key_and_all_alike():
    causal = jnp.tril(jnp.ones((T, T), bool))
    alike = entropy(jnp.full((T, T), 7.0), mask=causal)
    assert alike[0] == 0
    assert gap(alike, np.log(np.arange(1, T + 1))) < 1e-6
    shares = entropy(jnp.full((T, T), 7.0), mask=causal, normalized=True)
    assert gap(shares, np.array([0.0] + [1] * (T - 1))) < 1e-6
    z = array(draw(12, 9, T, T) * np.logspace(-3, 38, 9)[:, None, None])
    found = entropy(z)
    assert (found >= 0).all()
    assert (found <= np.log(T) + 1e-6).all()
    assert gap(found[-1], np.zeros(T)) < 1e-6
    assert gap(entropy(z[0] + 100), found[0]) < 1e-4
    # Who sees nothing has entropy 0, and counts neither in the mean nor in the size.
    blind = jnp.ones((T, T), bool).at[2].set(False)
    assert entropy(z[0], mask=blind)[2] == 0
    q, k = heads()
    some = attend(q, k, mask=blind)
    kept = jnp.delete(q, 2, axis=1)
    assert gap(some, instruments.attention_statistics(kept, k)) < 1e-5
    none = attend(q, k, mask=jnp.zeros((T, T), bool))
    assert all((leaf == 0).all() for leaf in none)


def test_half_precision_does_not_overflow():
    q, k = heads(dtype=jnp.float16)
    found = attend(q * 200, k * 200)
    assert found.largest.dtype == jnp.float32
    assert (found.largest > 65504).any()
    exact = attend(jnp.float32(200) * q.astype(float), jnp.float32(200) * k.astype(float))
    assert gap(found, exact) < 1e-3
    x = array(draw(13, N, T, C), jnp.bfloat16)
    for leaf, same in zip(
        *(jax.tree.leaves(streams(v)) for v in (x, x.astype(float))), strict=True
    ):
        assert leaf.dtype in (jnp.float32, jnp.int32)
        assert gap(leaf, same) < 1e-6


# Blocks


def written(depth=12):
    """Parameters with the blocks written out, `block10` before `block2` as jax sorts them."""
    return {
        "embed": {"kernel": array(draw(99, 7, C))},
        **{
            f"block{i}": {
                "up": {"kernel": array(draw(i, C, 4)), "bias": array(draw(i + 50, 4))},
                "down": {"kernel": array(draw(i + 100, 4, C))},
            }
            for i in range(depth)
        },
    }


def scanned(tree):
    blocks = [tree[f"block{i}"] for i in range(len(tree) - 1)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    return {"embed": tree["embed"], "blocks": stack}


def spellings(tree):
    """One net under the names that people and libraries give to blocks."""
    blocks = [tree[f"block{i}"] for i in range(len(tree) - 1)]
    yield {"encoder": {f"TransformerBlock_{i}": block for i, block in enumerate(blocks)}}
    yield {"params": {"h": blocks}}
    yield {"layers": {str(i): block for i, block in enumerate(blocks)}, "layer_norm": {"g": 1.0}}
    yield {f"block{i}_{k}": v for i, block in enumerate(blocks) for k, v in block.items()}
    yield nnx.State(jax.tree.map(nnx.Param, {"blocks": dict(enumerate(blocks))}))
    yield {"decoder": {"layers": scanned(tree)["blocks"]}}
    whole = scanned(tree)["blocks"]
    runs = {0: slice(0, 1), 1: slice(1, None)}
    yield {f"blocks_from{i}": jax.tree.map(lambda v, s=s: v[s], whole) for i, s in runs.items()}
    yield nnx.State(jax.tree.map(nnx.Param, scanned(tree)))


@jax.jit
def measured(params, updates):
    return {
        "norms": instruments.block_norms(params),
        "ratio": instruments.update_ratio(params, updates),
        "lr": instruments.block_lr(params, 0.3),
    }


def test_blocks_are_measured_alike_written_out_and_scanned():
    params, updates = written(), jax.tree.map(lambda w: 0.01 * w**2, written())
    found = measured(params, updates)
    assert gap(measured(scanned(params), scanned(updates)), found) < 1e-6
    kernels = ("down/kernel", "up/kernel")
    for i in range(12):
        block, step = params[f"block{i}"], updates[f"block{i}"]
        leaves = {f"{k}/{n}": np.float64(v) for k, vs in block.items() for n, v in vs.items()}
        steps = {f"{k}/{n}": np.float64(v) for k, vs in step.items() for n, v in vs.items()}
        for path, w in leaves.items():
            assert gap(found["norms"].leaves[path][i], np.linalg.norm(w)) < 1e-6
        together, also = (np.concatenate([v[k].ravel() for k in kernels]) for v in (leaves, steps))
        everything = np.concatenate([w.ravel() for w in leaves.values()])
        assert gap(found["norms"].block[i], np.linalg.norm(everything)) < 1e-6
        rms = np.sqrt((also**2).mean()) / np.sqrt((together**2).mean())
        assert gap(found["ratio"].block[i], rms) < 1e-5
        assert gap(found["lr"].block[i], 0.3 / (together**2).sum()) < 1e-5
        for path in kernels:
            w, u = leaves[path], steps[path]
            assert gap(found["ratio"].leaves[path][i], np.linalg.norm(u) / np.linalg.norm(w)) < 1e-5
            assert gap(found["lr"].leaves[path][i], 0.3 / (w**2).sum()) < 1e-5
    assert set(found["ratio"].leaves) == set(kernels)


def test_blocks_have_many_names():
    tree = written(3)
    expected = instruments.block_norms(tree)
    for other in spellings(tree):
        found = instruments.block_norms(other)
        assert gap(found, expected) == 0
        assert set(found.leaves) == set(expected.leaves)
    for inside in ("attention_layer", "layers_0", "block"):
        wrapped = {f"block{i}": {inside: tree[f"block{i}"]} for i in range(3)}
        for other in (wrapped, {"params": wrapped}, {"blocks": {inside: scanned(tree)["blocks"]}}):
            assert gap(instruments.block_norms(other).block, expected.block) == 0
    flat = {f"model.layers.{i}.{k}": v for i in range(3) for k, v in tree[f"block{i}"].items()}
    assert gap(instruments.block_norms(flat), expected) == 0
    named = {f"stage_{i}": {"cell": tree[f"block{i}"]} for i in range(3)}
    found = instruments.block_norms(named, rule=r"stage_(\d+)/cell/")
    assert gap(found, expected) == 0
    whole = instruments.by_block(tree)
    assert gap(whole["up/kernel"], scanned(tree)["blocks"]["up"]["kernel"]) == 0


def test_blocks_that_differ_are_measured_by_what_they_have():
    tree = written(3)
    del tree["block0"]["up"]["bias"]  # as where the first block has no norm
    tree["block2"]["down"]["kernel"] = jnp.ones((9, 2))
    found = jax.jit(instruments.block_norms)(tree)
    assert jnp.isnan(found.leaves["up/bias"]).tolist() == [True, False, False]
    assert jnp.isfinite(found.block).all()
    assert gap(found.leaves["down/kernel"][2], np.sqrt(18)) < 1e-6
    with pytest.raises(ValueError, match="the same shapes of every block"):
        instruments.by_block(tree)
    runs = {"blocks_from0": {"w": jnp.ones((2, 3))}, "blocks_from2": {"v": jnp.ones((1, 3), int)}}
    whole = instruments.by_block(runs)
    assert jnp.isnan(whole["w"]).sum(-1).tolist() == [0, 0, 3]
    assert jnp.isnan(whole["v"]).sum(-1).tolist() == [3, 3, 0]


def test_zero_weights_and_zero_steps():
    params = {"blocks": {"w": jnp.array([0.0, 0, 1])[:, None, None]}}
    updates = {"blocks": {"w": jnp.array([0.0, 1, 0])[:, None, None]}}
    assert instruments.update_ratio(params, updates).block.tolist() == [0, jnp.inf, 0]
    assert instruments.block_lr(params, 1.0).block.tolist() == [jnp.inf, jnp.inf, 1]
    huge = jax.tree.map(lambda w: w * 1e30, params)
    assert instruments.update_ratio(huge, huge).block.tolist() == [0, 0, 1]


# Depth


def test_the_slope_is_that_of_scipy_with_its_error():
    depths = np.array([2.0, 4, 8, 12, 48])
    values = 3 * depths**-0.5 * np.exp(0.1 * draw(14, 5))
    found = instruments.depth_slope(array(values), array(depths))
    expected = scipy.stats.linregress(np.log(depths), np.log(values))
    assert gap(found, (expected.slope, expected.intercept, expected.stderr)) < 1e-4
    both = jax.jit(instruments.depth_slope)(array(np.stack([values, values[::-1]], 1)), depths)
    assert gap([v[0] for v in both], [*found]) < 1e-5
    power = instruments.depth_slope(jnp.arange(1.0, 31) ** -0.5)
    assert gap(power.slope, -0.5) < 1e-6
    assert power.error < 1e-6
    assert jnp.isnan(instruments.depth_slope(jnp.array([1.0, 0.0, 1.0])).slope)
    assert jnp.isnan(instruments.depth_slope(jnp.ones(3), jnp.ones(3)).slope)


# All of them


def everything(x):
    """All that is measured of a stream and an attention, of one block."""
    q = x.reshape(*x.shape[:-1], 1, C)
    return instruments.stream_statistics(x), instruments.attention_statistics(q, q, is_causal=True)


def test_scans_and_checkpoints_return_what_a_loop_does():
    w = array(draw(15, L, C, C) / 2)
    x = array(draw(16, N, T, C))

    def block(x, w):
        x = x + jnp.tanh(x @ w)
        return x, everything(x)

    @jax.jit
    def scan(w):
        def loss(w):
            out, found = lax.scan(jax.checkpoint(block), x, w)
            return jnp.square(out).sum(), found

        return jax.grad(loss, has_aux=True)(w)

    @jax.jit
    def loop(w):
        def loss(w):
            out, found = x, []
            for i in range(L):
                out, more = block(out, w[i])
                found.append(more)
            return jnp.square(out).sum(), jax.tree.map(lambda *rows: jnp.stack(rows), *found)

        return jax.grad(loss, has_aux=True)(w)

    (scanned_grads, in_scan), (grads, in_loop) = scan(w), loop(w)
    assert in_scan[0].variance.shape == (L, N)
    assert gap(in_scan, in_loop) < 1e-4
    assert gap(scanned_grads, grads) < 1e-5
    # Stacked streams give the same at once.
    xs = lax.scan(lambda x, w: (block(x, w)[0],) * 2, x, w)[1]
    assert gap(everything(xs), in_scan) < 1e-4


class Block(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        x = x + linen.Dense(C, name="up")(jnp.tanh(x))
        self.sow("seen", "stream", everything(x))
        return x, None


class Net(linen.Module):
    scan: bool

    @linen.compact
    def __call__(self, x):
        if self.scan:
            every = linen.scan(
                linen.remat(Block),
                variable_axes={"params": 0, "seen": 0},
                split_rngs={"params": True},
                length=L,
            )
            return every(name="blocks")(x, None)[0]
        for i in range(L):
            x, _ = linen.remat(Block)(name=f"block{i}")(x, None)
        return x


def test_what_scanned_and_rematerialized_blocks_sow_is_found_by_block():
    x = array(draw(17, N, T, C))

    @functools.partial(jax.jit, static_argnums=0)
    def measure(net, params):
        def loss(params):
            out, sown = net.apply({"params": params}, x, mutable="seen")
            return jnp.square(out).sum(), sown["seen"]

        grads, seen = jax.grad(loss, has_aux=True)(params)
        return instruments.by_block(seen), instruments.block_norms(grads)

    params = Net(scan=True).init(jax.random.key(0), x)["params"]
    written = {f"block{i}": jax.tree.map(lambda v, i=i: v[i], params["blocks"]) for i in range(L)}
    found, norms = measure(Net(scan=True), params)
    expected, expected_norms = measure(Net(scan=False), written)
    assert found["stream/0/0/variance"].shape == (L, N)
    assert found.keys() == expected.keys()
    assert gap(found, expected) < 1e-4
    assert gap(norms, expected_norms) < 1e-5


def test_seeds_side_by_side_keep_their_nan_to_themselves():
    x = array(draw(18, 2, N, T, C)).at[1, 0, 0, 0].set(jnp.nan)
    found = jax.jit(jax.vmap(everything))(x)
    for leaf in jax.tree.leaves(found):
        assert jnp.isfinite(leaf[0]).all()
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            assert jnp.isnan(leaf[1, 0]).all()
            assert jnp.isfinite(leaf[1, 1]).all()
    assert gap(jax.tree.map(lambda v: v[0], found), jax.jit(everything)(x[0])) < 1e-5
    spoiled = {"blocks": {"w": jnp.ones((2, 2, 2)).at[1, 0, 0].set(jnp.nan)}}
    for instrument in (
        instruments.block_norms,
        lambda v: instruments.update_ratio(v, v),
        lambda v: instruments.block_lr(v, 0.1),
    ):
        assert jnp.isnan(instrument(spoiled).block).tolist() == [False, True]


def test_derivatives_are_finite_where_nothing_varies():
    def total(x):
        leaves = jax.tree.leaves((everything(x), instruments.rank_residual(x, length="frobenius")))
        slopes = instruments.depth_slope(jnp.exp(x[0]))
        return sum(v.sum() for v in (*leaves, *slopes) if jnp.issubdtype(v.dtype, jnp.floating))

    zero, constant = jnp.zeros((N, T, C)), jnp.ones((N, T, C))
    for grad in jax.jit(jax.vmap(jax.grad(total)))(jnp.stack([zero, constant])):
        assert jnp.isfinite(grad).all()


def test_an_explicit_mesh_measures_the_same():
    grid = mesh(AxisType.Explicit, d=2)
    x = array(draw(19, N, T, C))
    expected = jax.jit(everything)(x)
    with jax.set_mesh(grid):
        placed = jax.device_put(x, NamedSharding(grid, P("d")))
        found = jax.jit(everything)(placed)
        assert gap(found, expected) < 1e-5
        w = jax.device_put(jnp.ones((L, 2, C)), NamedSharding(grid, P(None, "d")))
        norms = jax.jit(instruments.block_norms)({"blocks": {"w": w}})
        assert gap(norms.block, np.full(L, np.sqrt(2 * C))) < 1e-6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: instruments.effective_rank(jnp.ones(3)), r"effective rank: .*\[\.\.\., T, C\]"),
        (lambda: instruments.rank_residual(jnp.eye(3), length="l1"), "Known: composite"),
        (lambda: instruments.massive_activations(jnp.eye(3), least=-1), "least=-1"),
        (lambda: instruments.attention_entropy(jnp.eye(3), mask=jnp.eye(3)), "booleans"),
        (lambda: instruments.attention_entropy(jnp.eye(3), mask=jnp.ones(4, bool)), "broadcasts"),
        (lambda: instruments.attention_logits(jnp.ones((3, 4, 2)), jnp.ones((3, 3, 2))), "K div"),
        (lambda: instruments.attention_logits(jnp.ones((3, 4, 2)), jnp.ones((3, 4, 3))), "K div"),
        (lambda: instruments.depth_slope(jnp.ones(2)), "three or more"),
        (lambda: instruments.depth_slope(jnp.ones(3), jnp.ones(4)), "L depths"),
        (lambda: instruments.block_norms({"mlp": jnp.ones(2)}), "for paths like mlp"),
        (lambda: instruments.block_norms({"block0": {"w": 1.0}, "block2": {"w": 1.0}}), r"\[0, 2]"),
        (lambda: instruments.block_norms(written(1), rule="("), "a regular expression"),
        (lambda: instruments.block_norms(written(1), rule=r"(block)\d/"), "in its first group"),
        (
            lambda: instruments.block_norms({"encoder": written(1), "decoder": written(1)}),
            "one stack of blocks",
        ),
        (
            lambda: instruments.block_norms({"blocks": {"v": jnp.ones(2), "w": jnp.ones(3)}}),
            "one number of blocks",
        ),
        (lambda: instruments.block_norms({"blocks": {"v": jnp.ones(2, int)}}), "floating leaves"),
        (lambda: instruments.block_lr({"blocks": {"v": jnp.ones(2)}}, 0.1), "without kernels"),
        (lambda: instruments.update_ratio(written(1), written(2)), "the same structure"),
    ],
)
def test_a_wrong_call_says_what_to_change(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "To fix it, " in str(error.value)
