"""Where it runs: this machine now; torchrun over nodes and SLURM arrays in their own modules. No torch."""
