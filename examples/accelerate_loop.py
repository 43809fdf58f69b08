"""A hand-written Accelerate loop with gradient accumulation: ``accelerate launch examples/accelerate_loop.py``.

``--fsdp 1`` and ``--fsdp 2`` shard the model. ``--folder F`` saves the state after half of the steps, and
``--folder F --resume yes`` resumes from there.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from text import Windows, arguments, leave, tiny_llama, whole_weights
from transformers import get_scheduler

from optimizer import AdamMini

ACCUMULATE = 2


def sharding(version: str) -> FullyShardedDataParallelPlugin | None:
    """Return the plugin for a version of FSDP, or None for no sharding."""
    if version == "no":
        return None
    return FullyShardedDataParallelPlugin(
        fsdp_version=int(version),
        auto_wrap_policy="transformer_based_wrap",
        state_dict_type="SHARDED_STATE_DICT",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        use_orig_params=True if version == "1" else None,
        cpu_ram_efficient_loading=False,
    )


def train(accelerator: Accelerator, options: argparse.Namespace) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train; return the losses of all batches and the final weights."""
    model = tiny_llama()
    if (
        options.fsdp == "1"
    ):  # FSDP1 replaces the parameters, so the optimizer has to be built after the model is prepared.
        model = accelerator.prepare(model)
    optimizer = AdamMini(model, lr=5e-3, betas=(0.9, 0.95), weight_decay=0.1)
    if options.fsdp == "1":  # load_state needs existing state to load into, and a new optimizer has none.
        optimizer.init_state()
    world = accelerator.num_processes  # Accelerate steps a schedule once for every process.
    schedule = get_scheduler("cosine", optimizer, 2 * world, options.steps * world)
    loader = torch.utils.data.DataLoader(Windows(ACCUMULATE * options.steps * 4 * world), batch_size=4)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    half, first = ACCUMULATE * (options.steps // 2), 0
    if options.resume:
        accelerator.load_state(options.folder)
        loader, first = accelerator.skip_first_batches(loader, half), half
    losses: list[float] = []
    for k, tokens in enumerate(loader, first):
        if k == half and options.folder and not options.resume:
            accelerator.save_state(options.folder)
        with accelerator.accumulate(model):
            loss = model(**tokens).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
    return losses, whole_weights(model)


def main() -> None:
    """Train, then print and save the losses and the weights."""
    options = arguments(fsdp=("no", "1", "2"), precision=("no", "bf16"), folder=None, resume=None)
    accelerator = Accelerator(
        gradient_accumulation_steps=ACCUMULATE, fsdp_plugin=sharding(options.fsdp), mixed_precision=options.precision
    )
    losses, weights = train(accelerator, options)
    accelerator.free_memory()  # A DDP module can hang in its destructor if it is freed after the process group.
    leave(options.out, losses, weights)
    accelerator.end_training()


if __name__ == "__main__":
    main()
