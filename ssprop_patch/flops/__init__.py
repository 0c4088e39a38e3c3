"""What a sparse backward costs on paper: FLOPs of each layer and of a model."""
