"""Train all weights or LoRA adapters with TRL's SFTTrainer: ``python examples/trl_sft.py --lora yes``."""

from __future__ import annotations

import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from text import LENGTH, arguments, leave, tiny_llama, window
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from optimizer.wrappers.huggingface import AdamMiniMixin


class AdamMiniSFTTrainer(AdamMiniMixin, SFTTrainer):
    """An SFTTrainer whose optimizer is AdamMini."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer whose tokens are bytes, each with its value as its id."""
    # Byte-level tokenizers write these bytes as themselves and every other byte as a character from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + k) for k, byte in enumerate(b for b in range(256) if b not in letters)}
    tokenizer = Tokenizer(models.BPE({letter: byte for byte, letter in letters.items()}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=letters[2], pad_token=letters[0])


def model_of(lora: bool) -> torch.nn.Module:
    """Build the model, with LoRA adapters if ``lora`` is set."""
    if not lora:
        return tiny_llama()
    return get_peft_model(tiny_llama(), LoraConfig(r=8, lora_alpha=32, target_modules="all-linear"))


def main() -> None:
    """Train, then print and save the losses and the weights."""
    options = arguments(lora=("no", "yes"))
    data = Dataset.from_dict({"text": [bytes(window(i).tolist()).decode("ascii", "replace") for i in range(400)]})
    args = SFTConfig(
        tempfile.mkdtemp(),
        max_steps=options.steps,
        per_device_train_batch_size=4,
        max_length=LENGTH,
        learning_rate=5e-3,
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.1,
        max_grad_norm=1.0,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    model = model_of(options.lora == "yes")
    trainer = AdamMiniSFTTrainer(model, args, train_dataset=data, processing_class=byte_tokenizer())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    leave(options.out, losses, trainer.model.state_dict())


if __name__ == "__main__":
    main()
