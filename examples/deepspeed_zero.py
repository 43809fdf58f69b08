"""DeepSpeed's ZeRO: ``torchrun --nproc-per-node 2 examples/deepspeed_zero.py --stage 3``."""

import deepspeed
import torch.distributed as dist
from text import arguments, batch, leave, tiny_llama

from optimizer.wrappers.deepspeed.launch import initialize


def main() -> None:
    """Train, then print and save the losses and the weights."""
    options = arguments(stage=("2", "0", "1", "3"))
    deepspeed.init_distributed("gloo")
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": int(options.stage)},
        "optimizer": {"type": "AdamMini", "params": {"lr": 5e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}},
        "steps_per_print": 1_000_000,
    }
    engine, optimizer, _, _ = initialize(model=tiny_llama(), config=config)
    losses = []
    for step in range(options.steps):
        tokens = batch(step, dist.get_rank(), dist.get_world_size())
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        dist.all_reduce(loss := loss.detach())
        losses.append(float(loss) / dist.get_world_size())
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=options.stage == "3"):
        if dist.get_rank() == 0:
            leave(options.out, losses, engine.module.state_dict(), lr=optimizer.param_groups[0]["lr"])
    engine.destroy()


if __name__ == "__main__":
    main()
    dist.destroy_process_group()  # main() has freed everything that communicates.
