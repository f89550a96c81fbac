"""Backend-specific code: what Keras's operations cannot do, or do slowly. Only this folder may name a backend."""

from keras_lora.backend.differences import (
    each_example,
    fuses_base,
    has_symbolic_sizes,
    holding,
    lacks_bfloat16,
    strategy_now,
    to_numpy,
    traces,
    widens_bfloat16,
)
from keras_lora.backend.dropping import Drop, draws_bytes, dropped
from keras_lora.backend.formed import Parts, Shifts, formed_sum
from keras_lora.backend.per_example import per_example_sum, write_place
from keras_lora.backend.products import (
    as_one_kernel,
    frozen_product,
    kronecker_sum,
    look_up,
    low_rank_sum,
)
from keras_lora.backend.steps import (
    kept_bytes,
    rematerialized,
    shapes_of,
    step_memory,
    sum_of_chunks,
    tensor_of,
    traces_memory,
    value_and_gradient,
    write,
)

__all__ = [
    "as_one_kernel",
    "Drop",
    "Parts",
    "Shifts",
    "draws_bytes",
    "dropped",
    "each_example",
    "formed_sum",
    "frozen_product",
    "fuses_base",
    "has_symbolic_sizes",
    "holding",
    "kept_bytes",
    "lacks_bfloat16",
    "kronecker_sum",
    "look_up",
    "low_rank_sum",
    "per_example_sum",
    "rematerialized",
    "shapes_of",
    "step_memory",
    "strategy_now",
    "sum_of_chunks",
    "tensor_of",
    "to_numpy",
    "traces",
    "traces_memory",
    "value_and_gradient",
    "widens_bfloat16",
    "write",
    "write_place",
]
