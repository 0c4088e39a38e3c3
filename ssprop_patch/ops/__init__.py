"""The gradient of :mod:`ssprop_patch.core.reference`, fast.

``autograd`` and ``custom_ops`` (for torch.compile) put ``backward`` into the graph. It asks
``autotune`` or ``heuristics`` for the ``algorithms`` to use on the ``channel_gradients`` of a call;
``channel_scores`` and ``channel_ops`` are the passes over memory around them, done in C
(``native``), by Triton kernels (``triton_kernels``) or by torch. ``lazy_grad`` forms the gradients
of batch norms and ReLUs for the kept channels only.
"""
