"""What a training step keeps in memory: planning it before it runs, and computing blocks again instead of keeping them."""

from keras_lora.memory.planning import MemoryPlan, change, plan
from keras_lora.memory.rematerializing import rematerialize, rematerialized

__all__ = ["MemoryPlan", "change", "plan", "rematerialize", "rematerialized"]
