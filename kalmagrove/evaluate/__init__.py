"""What a trained model can do: generation now."""
