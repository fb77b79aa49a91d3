"""fastattn in Hugging Face transformers (4.57 and later), as ``attn_implementation="fastattn"``.

::

    import fastattn.integrations.transformers as door

    door.register()  # offers it; importing this module does not
    model.set_attn_implementation("fastattn")
    fastattn.accelerate(model)  # its norms and feed-forward networks too

or, for a block, ``with door.use(model): ...``. Attention weights are never in memory, so that
``output_attentions`` is refused. With transformers 4.57 BERT and T5 compute their attention
themselves: `use` refuses them, a BERT made with ``attn_implementation="fastattn"`` raises
transformers' KeyError, and such a T5 runs transformers' own attention.
"""

from fastattn.integrations.transformers.attention import NAME, attention_forward
from fastattn.integrations.transformers.door import register, unregister, use

__all__ = ["NAME", "attention_forward", "register", "unregister", "use"]
