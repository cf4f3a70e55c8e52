"""What is trained: sizes, parameter and FLOP counts (no torch), and the GPT."""
