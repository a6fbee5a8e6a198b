"""How a norm without state, and its function, are made of a function that returns its parts."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec

import jax
from jax import Array
from jax.typing import ArrayLike

from normlab._arguments import Kind, a_function, anything, checked
from normlab._checks import normalize_axes, one_array, promote_dtype
from normlab.equation import Parts, affine
from normlab.errors import invalid
from normlab.gains import Gain, init_gain
from normlab.sharded import OVER, where_bound
from normlab.site import SHAPES, Norm, Site, State

P = ParamSpec("P")


def applied(
    parts: Callable[Concatenate[ArrayLike, P], Parts],
) -> Callable[[Callable[[], None]], Callable[Concatenate[ArrayLike, P], Array]]:
    """Makes a norm of a function that returns its parts, with the same arguments.

        h = affine(parts(a, params, ...), a)

    It decorates an empty function, which brings the name and the documentation.
    """

    def decorate(named: Callable[[], None]) -> Callable[Concatenate[ArrayLike, P], Array]:
        def norm(a: ArrayLike, *args: P.args, **options: P.kwargs) -> Array:
            a = one_array(a)
            found = parts(a, *args, **options)
            weights, channel_axis = (options.get(k) for k in ("weights", "channel_axis"))
            axis = -1 if channel_axis is None else channel_axis
            return affine(found, a, weights=weights, channel_axis=axis)  # pyright: ignore

        vars(norm).update(vars(parts))
        vars(norm).pop("__wrapped__", None)
        functools.update_wrapper(norm, named, updated=())
        signature = inspect.signature(parts)
        vars(norm).update(__signature__=signature.replace(return_annotation="Array"))
        return norm

    return decorate


@checked("stateless", parts=a_function(), params=a_function())
def stateless(
    parts: Callable[..., Parts], params: Callable[..., Any] | None = None
) -> Callable[..., Norm]:
    """Returns the factory of the norms without state that a function returns the parts of.

    Args:
      parts: `(a, params, *, weights, channel_axis, ...) -> Parts`; or `(site, params, ...)`, of a
        norm that looks at more than `a`. The other keyword arguments are options of the norm,
        beside `use_gain` and `use_bias`.
      params: `(site, use_gain=, use_bias=) -> params`, the initial parameters; by default an
        `Affine` of gains 1 and biases 0.

    Returns:
      `(**options) -> Norm`.

    >>> import jax.numpy as jnp
    >>> from normlab import Site, example
    >>> norm = stateless(example.rms_parts)(eps=1e-6)
    >>> params, state = norm.init(Site(jnp.ones((2, 3))))
    >>> params.g.tolist(), state
    ([1.0, 1.0, 1.0], ())
    """
    known, start = inspect.signature(parts).parameters, params or initial_affine
    of_params = {n: p for n, p in inspect.signature(start).parameters.items() if n != "site"}
    if taken := {"use_gain", "use_bias", "gain"} & known.keys():
        given, change = f"parts with the argument {min(taken)}", "read it off params instead"
        raise invalid("stateless", given, "one that every norm has by itself", change)
    of_a = next(iter(known)) != "site"
    of_parts = {n: p for n, p in known.items() if p.kind is p.KEYWORD_ONLY and n not in _OF_SITE}
    every = {**of_params, **of_parts}
    name = getattr(parts, "__name__", "own").removesuffix("_parts")
    where = getattr(parts, "where", f"{name} norm")
    kinds = getattr(start, "kinds", {}) | getattr(parts, "kinds", {})

    def make(**options: Any) -> Norm:
        def measure(site: Site, given: Any, **other: Any) -> Parts:
            said = {option: v for option, v in options.items() if option in of_parts} | other
            if not of_a:
                return parts(site, given, **said)
            of_site = {"weights": site.weights, "channel_axis": site.linear.channel_axis}
            of_site |= {"segments": site.segments} if "segments" in known else {}
            told = {
                "weights": site.weights is not None,
                "channel_axis": of_site["channel_axis"] != -1,
            }
            for option in of_site.keys() - known.keys():
                if told[option]:
                    wrong = f"{option}, which {name}_parts does not take"
                    raise invalid(where, wrong, "none", f"give it an argument {option}")
                del of_site[option]
            return parts(site.a, given, **of_site, **said)

        def first(site: Site, given: Any) -> Parts:
            return measure(site, given, axis_name=where_bound(options["axis_name"]))

        begin = {option: v for option, v in options.items() if option in of_params}
        alone = kinds.get("axis_name") is OVER and options.get("axis_name") is not None
        return norm_of(where, measure, functools.partial(start, **begin), first if alone else None)

    make.__name__ = make.__qualname__ = name
    make.__doc__ = f"The norm of `{name}_parts`; its options are arguments of that."
    order = sorted(every.values(), key=lambda p: p.name not in of_parts)
    by_name = [p.replace(kind=p.KEYWORD_ONLY) for p in order]
    vars(make)["__signature__"] = inspect.Signature(by_name, return_annotation="Norm")
    return checked(where, **{n: kinds.get(n, anything) for n in every})(make)


_OF_SITE = ("weights", "channel_axis", "segments")


@checked("params", site=SHAPES)
def initial_features(
    site: Site,
    *,
    use_gain: bool = True,
    use_bias: bool = True,
    gain: Gain = "plain",
    feature_axes: Sequence[int] | None = None,
) -> Any:
    """`init_gain` along the axes of the features of a site: by default, of its channels."""
    axes = [site.linear.channel_axis] if feature_axes is None else feature_axes
    axes = normalize_axes("params", axes, site.a.ndim)
    how: Any = {"use_gain": use_gain, "use_bias": use_bias, "gain": gain}
    sizes = tuple(site.a.shape[i] for i in axes)
    return init_gain(sizes, dtype=promote_dtype(site.a), **how)


@checked("params", site=SHAPES)
def initial_affine(
    site: Site, *, use_gain: bool = True, use_bias: bool = True, gain: Gain = "plain"
) -> Any:
    """`init_gain` for the channels of a site, in the type of its statistics."""
    how: Any = {"use_gain": use_gain, "use_bias": use_bias, "gain": gain}
    return init_gain(site.channels, dtype=promote_dtype(site.a), **how)


def norm_of(
    where: str,
    measure: Callable[[Site, Any], Parts],
    params: Callable[[Site], Any],
    first: Callable[[Site, Any], Parts] | None = None,
) -> Norm:
    """Returns a norm without state; `where` is its name for errors, `params` the initial ones.

    `first` measures at `init`, where the axes may not be mapped that `measure` asks for.
    """
    tried = first or measure

    def init(site: Site) -> tuple[Any, State]:
        jax.eval_shape(lambda site: tried(site, None), site)  # say no before training starts
        return params(site), ()

    def parts(params: Any, state: State, site: Site, *, train: bool) -> tuple[Parts, State]:
        del train
        return measure(site, params), state

    return made_of(where, init, parts)


def made_of(
    where: str, init: Callable[..., Any], parts: Callable[..., Any], **special: Kind
) -> Norm:
    """Returns the norm of two functions whose arguments are checked.

    `where` names it in errors; `special` says what its params and its state are, if not the usual.
    """
    return Norm(checked(where, site=SHAPES)(init), checked(where, **special)(parts))


EXPECTED = "a factory of keyword options, or a function (a, params, ...) or (site, params, ...)"


def factory_of(made: Any) -> Callable[..., Any]:
    """A factory as it is, or that of the norms whose parts a function returns; or of a norm itself.

    Raises:
      ValueError: If it is none of these.
    """
    if not isinstance(made, Norm) and (not callable(made) or isinstance(made, type)):
        change = "pass a function that returns parts, or stateless(...) of one"
        raise invalid("norm", f"a factory that is {made!r}", EXPECTED, change)
    return _factory_of(made)


@functools.lru_cache(maxsize=1024)
def _factory_of(made: Any) -> Callable[..., Any]:
    if isinstance(made, Norm):
        return lambda: made
    parameters = inspect.signature(made).parameters.values()
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
    names = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    of_site = names[:1] in (["a"], ["site"])
    if of_site and len(names) >= 2:
        return stateless(made)
    if of_site or any(p.kind in by_place for p in parameters):
        given = f"a factory with the arguments ({', '.join(map(str, parameters))})"
        raise invalid("norm", given, EXPECTED, "name the first two arguments so")
    return made
