"""What a trained model can do: its text, its scores on benchmarks, its bits per byte."""
