"""Four ways to use AdamMini in Hugging Face's Trainer: ``python examples/hf_trainer.py --door mixin``.

Sharded: ``torchrun --nproc-per-node 2 examples/hf_trainer.py --fsdp 2``.
ZeRO: ``DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 examples/hf_trainer.py --zero 3``.
Resume a stopped run: ``--folder F --resume F/checkpoint-5``.
"""

from __future__ import annotations

import tempfile

import torch
from text import Windows, arguments, leave, tiny_llama, whole_weights
from transformers import Trainer, TrainingArguments

from optimizer import AdamMini, tag
from optimizer.wrappers.huggingface import AdamMiniMixin, adam_mini

OPTIONS = {"lr": 5e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}


class AdamMiniTrainer(AdamMiniMixin, Trainer):
    """A Trainer whose optimizer is AdamMini, with the hyper-parameters of TrainingArguments."""


def trainer_of(door: str, model: torch.nn.Module, args: TrainingArguments, data: Windows) -> Trainer:
    """Build a Trainer that gets its AdamMini in one of four ways; the training is the same."""
    if door == "mixin":
        return AdamMiniTrainer(model, args, train_dataset=data)
    if door == "factory":
        return Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=(adam_mini, OPTIONS))
    if door == "class":  # Trainer passes parameters without names, so tag() stores each one's role in it.
        return Trainer(tag(model), args, train_dataset=data, optimizer_cls_and_kwargs=(AdamMini, OPTIONS))
    return Trainer(model, args, train_dataset=data, optimizers=(AdamMini(model, **OPTIONS), None))


def main() -> None:
    """Train, then print and save the losses and the weights."""
    options = arguments(
        door=("mixin", "factory", "class", "optimizers"),
        fsdp=("no", "1", "1-flat", "2"),
        zero=("no", "1", "2", "3"),
        folder=None,
        resume=None,
    )
    fsdp = (
        {
            "version": int(options.fsdp[0]),
            "use_orig_params": options.fsdp != "1-flat",
            "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
            "state_dict_type": "SHARDED_STATE_DICT",
            "sync_module_states": False,  # All ranks build the same weights.
        }
        if options.fsdp != "no"
        else None
    )
    zero = (
        {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_clipping": "auto",
            "gradient_accumulation_steps": "auto",
            "zero_optimization": {"stage": int(options.zero)},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        if options.zero != "no"
        else None
    )
    args = TrainingArguments(
        options.folder or tempfile.mkdtemp(),
        max_steps=options.steps,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.1,
        max_grad_norm=1.0,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        train_sampling_strategy="sequential",
        fsdp=fsdp is not None,
        fsdp_config=fsdp,
        logging_steps=1,
        save_steps=5,
        report_to="none",
        disable_tqdm=True,
        use_cpu=zero is None,
        deepspeed=zero,
        save_strategy="steps" if options.folder else "no",
    )
    trainer = trainer_of(options.door, tiny_llama(), args, Windows(1000))
    trainer.train(resume_from_checkpoint=options.resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = whole_weights(trainer.model_wrapped)
    leave(options.out, losses, weights)


if __name__ == "__main__":
    main()
