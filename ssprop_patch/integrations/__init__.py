"""Adapters for trainers that own the loop, one module each, imported only when asked for.

``ssprop_patch.integrations.lightning`` and ``ssprop_patch.integrations.transformers``; Accelerate,
Fabric and a loop of one's own need none. ``pip install "ssprop_patch[integrations]"``.
"""
