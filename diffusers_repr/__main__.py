"""`python -m diffusers_repr`, and `accelerate launch -m diffusers_repr`, are the command `diffusers-repr`."""

import sys

from diffusers_repr.cli import main

if __name__ == "__main__":
    sys.exit(main())
