"""How are logits computed while a model trains? In chunks, so that those of a whole batch never exist."""
