"""What `normlab.linen` and `normlab.nnx` share: Flax's arguments in the library's terms.

A module of either measures with a function of this library, and applies what was measured with
`affine`. Here is how Flax says it: by axes instead of by the name of a norm, with a mask instead of
weights, with the type of the result apart from that of the input. Nothing here imports flax
but `installed`, which says what to do where there is none.

A function that is given a module reads the module's arguments, which have Flax's names in both.
"""
