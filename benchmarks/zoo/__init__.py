"""Every network of timm and torchvision: what ``benchmarks/run_zoo.py`` runs."""
