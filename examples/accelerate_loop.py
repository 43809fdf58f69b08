"""Accelerate: a loop of one's own, with gradient accumulation: ``accelerate launch examples/accelerate_loop.py``.

``--fsdp 1`` and ``--fsdp 2`` shard; ``--folder F`` saves in the middle; ``--folder F --resume yes`` goes on from there.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from text import Windows, arguments, leave, tiny_llama, whole_weights
from transformers import get_scheduler

from optimizer import AdamMini

ACCUMULATE = 2


def main() -> None:
    """Train, and leave losses and weights."""
    options = arguments(fsdp=("no", "1", "2"), precision=("no", "bf16"), folder=None, resume=None)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=int(options.fsdp), auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"], state_dict_type="SHARDED_STATE_DICT",
        use_orig_params=True if options.fsdp == "1" else None, cpu_ram_efficient_loading=False,
    ) if options.fsdp != "no" else None  # fmt: skip
    accelerator = Accelerator(
        gradient_accumulation_steps=ACCUMULATE, fsdp_plugin=plugin, mixed_precision=options.precision
    )
    model = tiny_llama()
    if options.fsdp == "1":  # FSDP1 makes new parameters: prepare the model first
        model = accelerator.prepare(model)
    optimizer = AdamMini(model, lr=5e-3, betas=(0.9, 0.95), weight_decay=0.1)
    if options.fsdp == "1":  # load_state fills what is there, and a new optimizer, AdamW too, has no state yet
        optimizer.init_state()
    world = accelerator.num_processes  # Accelerate steps a schedule once per process
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
    weights = whole_weights(model)
    if accelerator.is_main_process:
        leave(options.out, losses, weights)
    accelerator.end_training()


if __name__ == "__main__":
    main()
