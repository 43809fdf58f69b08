"""8-bit Adam-mini on the CPU under ZeRO-Offload: ``torchrun --nproc-per-node 2 examples/deepspeed_offload.py``."""

import deepspeed
import torch
import torch.distributed as dist
from text import arguments, batch, leave, tiny_llama

from optimizer.wrappers.deepspeed.launch import initialize


def main() -> None:
    """Train, then print and save the losses, the weights, and the bytes of optimizer state per parameter."""
    options = arguments(moment=("int8", "int4"))
    deepspeed.init_distributed("gloo")
    adam_mini = {"lr": 5e-3, "betas": [0.9, 0.95], "weight_decay": 0.1, "exp_avg_dtype": options.moment}
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "optimizer": {"type": "AdamMini", "params": adam_mini},
        "steps_per_print": 1_000_000,
    }
    model = tiny_llama()
    engine, optimizer, _, _ = initialize(model=model, config=config)
    losses = []
    for step in range(options.steps):
        tokens = batch(step, dist.get_rank(), dist.get_world_size())
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        dist.all_reduce(loss := loss.detach())
        losses.append(float(loss) / dist.get_world_size())
    held = torch.tensor(float(sum(optimizer.optimizer.state_bytes().values())))  # of this rank's share
    dist.all_reduce(held)
    held /= sum(p.numel() for p in model.parameters())
    if dist.get_rank() == 0:
        leave(options.out, losses, engine.module.state_dict(), held=float(held))
        print(f"optimizer state on the CPU: {held:.3f} bytes per parameter")
    engine.destroy()


if __name__ == "__main__":
    main()
    dist.destroy_process_group()  # main() has freed everything that communicates.
