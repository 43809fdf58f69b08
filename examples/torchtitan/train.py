"""torchtitan's own training, on processors where there is no accelerator; arguments as ``torchtitan.train``."""

import torch

from .cpu import use_processors

if __name__ == "__main__":
    if not torch.accelerator.is_available():
        use_processors()
    from torchtitan.train import main

    main()
