import torch

# Tiny forwards on several threads wait for each other: up to 70 times slower when the cores are shared.
torch.set_num_threads(1)
