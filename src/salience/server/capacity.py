"""How many replies are made at once, when nobody says.

Each slot of the cache may come to hold a whole context:

    bytes = 2 * layers * kv_heads * head_dim * context * bytes of an element

More slots share the reading of the weights, so there are more tokens a second in all and fewer for
each reply. Steps are made for 1, 4, 16 or 64 rows, so the number is one of these.
"""

from typing import Any

from salience.machine import free_bytes
from salience.placement import input_device

_CHOICES = (64, 16, 4)
_PART = 0.5  # of the free memory: the rest is for what steps need


def slot_bytes(model: Any, context: int) -> int:
    """The most that keys and values of one reply take."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    size = next(p.element_size() for p in model.parameters() if p.is_floating_point())
    return 2 * config.num_hidden_layers * int(kv_heads) * int(dim) * context * size


def default_batch(model: Any, context: int) -> int:
    """The most slots of 1, 4, 16 and 64 that half of the free memory holds."""
    room = _PART * free_bytes(input_device(model))
    return next((n for n in _CHOICES if n * slot_bytes(model, context) <= room), 1)
