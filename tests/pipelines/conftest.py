import torch

# Tiny networks: two workers with two threads each are several times slower on two cores.
torch.set_num_threads(1)
