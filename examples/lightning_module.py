"""AdamMini in a Lightning module: ``python examples/lightning_module.py``.

DDP: ``torchrun --nproc-per-node 2 examples/lightning_module.py --devices 2``.
"""

from __future__ import annotations

import logging
import tempfile
from typing import Any

import pytorch_lightning as lightning
import torch
from text import Windows, arguments, leave, tiny_llama

from optimizer import AdamMini


class Llama(lightning.LightningModule):
    """A language model as a Lightning module."""

    def __init__(self) -> None:
        super().__init__()
        self.llama, self.losses = tiny_llama(), []

    def training_step(self, tokens: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        """Return the loss of a batch, and record its mean over all ranks."""
        loss = self.llama(**tokens).loss
        self.losses.append(float(self.all_gather(loss.detach()).mean()))
        return loss

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        """Return this rank's batches from the current step on.

        Lightning's default sampler would shuffle them, and would start from the first batch after a resume.
        """
        steps, ranks = range(self.trainer.global_step, 100), self.trainer.world_size
        indices = [4 * (step * ranks + self.global_rank) + i for step in steps for i in range(4)]
        return torch.utils.data.DataLoader(torch.utils.data.Subset(Windows(1000), indices), batch_size=4)

    def configure_optimizers(self) -> Any:
        """Build AdamMini from the module, so that it can find every weight's role, and a learning-rate schedule."""
        optimizer = AdamMini(self, lr=5e-3, betas=(0.9, 0.95), weight_decay=0.1)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}


def main() -> None:
    """Train, then print and save the losses and the weights."""
    options = arguments(devices=("1", "2"), folder=None, resume=None)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    folder = options.folder or tempfile.mkdtemp()
    saved = lightning.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=5, save_top_k=-1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=int(options.devices),
        strategy="ddp" if options.devices == "2" else "auto",
        max_steps=options.steps,
        gradient_clip_val=1.0,
        logger=False,
        default_root_dir=folder,
        callbacks=[saved] if options.folder else [],
        enable_checkpointing=bool(options.folder),
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Llama().train()
    trainer.fit(module, ckpt_path=options.resume, weights_only=True)
    leave(options.out, module.losses, module.llama.state_dict())


if __name__ == "__main__":
    main()
