"""What a model is: validated configurations, no tensors."""
