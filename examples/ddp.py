"""DistributedDataParallel needs no changes for AdamMini: ``torchrun --nproc-per-node 2 examples/ddp.py``."""

import torch
import torch.distributed as dist
from text import arguments, batch, leave, tiny_llama, whole_weights
from torch.nn.parallel import DistributedDataParallel

from optimizer import AdamMini


def train(steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train; return the losses and the final weights."""
    model = DistributedDataParallel(tiny_llama())
    optimizer = AdamMini(model, lr=5e-3, betas=(0.9, 0.95), weight_decay=0.1)
    losses = []
    for step in range(steps):
        tokens = batch(step, dist.get_rank(), dist.get_world_size())
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        dist.all_reduce(loss := loss.detach())
        losses.append(float(loss) / dist.get_world_size())
    return losses, whole_weights(model)


def main() -> None:
    """Train, then print and save the losses and the weights."""
    options = arguments()
    dist.init_process_group("gloo")
    losses, weights = train(options.steps)
    leave(options.out, losses, weights)
    # A DDP module can hang in its destructor if it is freed after the process group, so train() has freed it before.
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
