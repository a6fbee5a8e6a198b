"""What is said of depth: each question decides rightly, and its pieces are right."""

import dataclasses

import numpy as np
import pytest

from normlab.experiments.questions import last_gradient, stream_variance
from tests.experiments.test_questions_exact import decisions, measured, seeds

TINY = {"width": 16, "length": 8, "batch_size": 2, "seeds": 2}


def test_the_stream_of_a_random_net_is_measured_beside_its_derivation():
    some = {"schemes": ("pre", "post", "peri"), "depth": 3}
    config = dataclasses.replace(stream_variance.QUICK, **some, **TINY)
    records = stream_variance.Records(measured(stream_variance, config))
    here = records.where(kind="branch")
    first = config.first_seed
    assert len(here) == 3 * 2 * 7  # schemes, seeds, places
    post = [r["square"] for r in here.where(scheme="post") if r["branch"] > 0]
    np.testing.assert_allclose(post, 1, rtol=1e-4)
    pre = here.where(scheme="pre", seed=first)
    np.testing.assert_allclose([r["square"] - r["derived"] for r in pre[:3]], 0, atol=1e-6)
    peri = [r["derived"] for r in here.where(scheme="peri", seed=first)]
    np.testing.assert_allclose(np.diff(peri), 1, rtol=1e-6)


@pytest.mark.parametrize(("right", "expected"), [(True, "holds"), (False, "fails")])
def test_stream_variance_decides_by_growth_and_ratio(right, expected):
    values = {"exponent": 1.02, "added": 1.0, "largest": 1.0, "smallest": 1.0, "ratio": 1.02}
    wrong = {"exponent": 0.8, "added": 2.0, "largest": 2.0, "smallest": 0.5, "ratio": 0.7}
    lns = {"exponent": 0.3 if right else 1.2}
    records = [
        {"kind": "stream", "scheme": scheme, "seed": seed}
        | {key: v * (1 + 1e-4 * seed) for key, v in own.items()}
        for scheme in stream_variance.SCHEMES
        for own in [(values if right else wrong) | (lns if scheme == "lns" else {})]
        for seed in range(3)
    ]
    assert set(decisions(stream_variance, records)) == {expected}


def test_the_gradient_of_the_last_block_is_that_of_its_kernel():
    config = dataclasses.replace(last_gradient.QUICK, depths=(1, 2, 4), **TINY)
    records = last_gradient.Records(measured(last_gradient, config, scheme="pre"))
    norms = records.where(kind="gradient", depth=1, seed=config.first_seed)
    first, last = (norms.where(block=block)[0]["gradient"] for block in ("first", "last"))
    assert first == last > 0  # of one block both are the same
    slopes = records.where(kind="slope", block="last").by_seed("slope")
    last = records.where(kind="gradient", block="last", seed=config.first_seed + 1)
    by_depth = [last.where(depth=d)[0]["gradient"] for d in (1, 2, 4)]
    expected = np.polyfit(np.log([1, 2, 4]), np.log(by_depth), 1)[0]
    assert slopes[1] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("off", "expected"), [(0.0, "holds"), (0.3, "fails")])
def test_last_gradient_decides_by_the_slope(off, expected):
    records = [
        {"kind": "slope", "block": "last", "scheme": scheme, "seed": seed, "slope": slope + off + v}
        for scheme, slope in last_gradient.SLOPES.items()
        for seed, v in enumerate(seeds(0.01))
    ]
    assert set(decisions(last_gradient, records)) == {expected}
