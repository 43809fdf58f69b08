"""Run ``torchtitan.train`` with its usual arguments, on CPUs if there is no accelerator."""

import torch

from .cpu import use_processors

if __name__ == "__main__":
    if not torch.accelerator.is_available():
        use_processors()
    from torchtitan.train import main

    main()
