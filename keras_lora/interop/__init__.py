"""Load and save adapters in the formats of other libraries."""

from keras_lora.interop.enable_lora import from_enable_lora
from keras_lora.interop.lora_h5 import from_lora_h5
from keras_lora.interop.peft import from_peft, to_peft
from keras_lora.interop.serving_rules import serving_problems
from keras_lora.interop.transformers_names import module_names

__all__ = ["from_enable_lora", "from_lora_h5", "from_peft", "module_names", "serving_problems", "to_peft"]
