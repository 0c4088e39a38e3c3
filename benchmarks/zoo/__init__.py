"""Every network of timm and torchvision: what ``benchmarks/zoo.py`` runs."""
