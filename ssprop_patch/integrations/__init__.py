"""Adapters for trainers that own the loop, one module each, imported only when asked for.

``lightning``, ``transformers``, ``ultralytics``, ``fastai`` and ``ignite`` (MONAI's engines, too).
``ddp`` has a communication hook.
Accelerate, DeepSpeed, Fabric and a loop of one's own need none: see ``docs/guide.md``.
"""
