"""Train LoRA adapters of PEFT and an output layer in Hugging Face's Trainer: ``python examples/peft_lora.py``.

Sharded: ``torchrun --nproc-per-node 2 examples/peft_lora.py --fsdp 2``.
"""

from __future__ import annotations

import tempfile

from peft import LoraConfig, get_peft_model
from text import Windows, arguments, leave, tiny_llama, whole_weights
from transformers import Trainer, TrainingArguments

from optimizer.wrappers.huggingface import AdamMiniMixin


class AdamMiniTrainer(AdamMiniMixin, Trainer):
    """A Trainer whose optimizer is AdamMini."""


def main() -> None:
    """Train, then print and save the losses and the weights."""
    options = arguments(fsdp=("no", "2"))
    lora = LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(tiny_llama(), lora)
    args = TrainingArguments(
        tempfile.mkdtemp(),
        max_steps=options.steps,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.1,
        max_grad_norm=1.0,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        fsdp=options.fsdp == "2",
        fsdp_config={"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"} if options.fsdp == "2" else None,
    )
    trainer = AdamMiniTrainer(model, args, train_dataset=Windows(1000))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    leave(options.out, losses, whole_weights(trainer.model_wrapped))


if __name__ == "__main__":
    main()
