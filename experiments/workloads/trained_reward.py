"""The trained reward model, for workloads that train a policy by its rewards.

Its weights are too large to be kept with the results. It is trained once, by a fixed config, and kept in the cache
folder under the hashes of the config and of the pairs.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from experiments.data import ratings
from experiments.data.registry import cache_folder

from .bases import load_base
from .libraries import library
from .reward import REWARD, SCORED, chat, rewards

if TYPE_CHECKING:
    from experiments.configs import TrainConfig
    from experiments.tasks import Casting

logger = logging.getLogger("experiments")
RATE = 3e-5
"""Learning rate: the middle one of the grid. After the study it should be AdamW's best one."""
WEIGHTS, DIGEST = "model.safetensors", "model.sha256"


@dataclass(frozen=True)
class Judge:
    """A trained reward model.

    Attributes:
        model: language model with a scalar head, in eval mode, without gradients.
        tokenizer: its tokenizer.
        fingerprint: sha256 of its weights.
        length: tokens of a request and an answer; longer answers are cut.
    """

    model: nn.Module
    tokenizer: Any
    fingerprint: str
    length: int

    def score(self, answers: Sequence[str], casting: Casting = nullcontext) -> Tensor:
        """Return how positive people would find each sentence, fp32 [n]; only differences mean something.

        Args:
            answers: the sentences, without tokens that end them.
            casting: returns the context of a forward pass.

        Raises:
            RuntimeError: a reward is not finite.
        """
        room = self.length - len(chat(self.tokenizer, ""))
        cut = []
        for answer in answers:
            tokens = self.tokenizer(answer.strip(), add_special_tokens=False)["input_ids"]
            cut.append(self.tokenizer.decode(tokens[:room]) if len(tokens) > room else answer.strip())
        found = rewards(self.model, [chat(self.tokenizer, answer) for answer in cut], SCORED, casting)
        if not bool(torch.isfinite(found).all()):
            raise RuntimeError(f"{int((~torch.isfinite(found)).sum())} of {len(cut)} rewards are not finite")
        return found


def judge_config() -> TrainConfig:
    """Return the config that the reward model is trained by: AdamW, seed 0."""
    from experiments.configs import TrainConfig

    return TrainConfig("trained_reward", **REWARD.run, arm="elementwise", lr=RATE, seed=0).with_rules_hash()


@functools.cache
def trained_reward_model(config: TrainConfig | None = None) -> Judge:
    """Return the reward model of a config. It is trained if the cache folder lacks it, which takes some minutes.

    Args:
        config: a run of a ``RewardModel``; by default ``judge_config()``.

    Raises:
        RuntimeError: a library or package is missing, the training diverged, or the weights were changed.
        SystemExit: another process trains it, or a signal stopped the training, which the next call resumes.
    """
    config = config or judge_config()
    folder = cache_folder() / "trained-reward" / f"{config.hash}-{ratings.fingerprint(config.data)[:8]}"
    if not (folder / DIGEST).is_file():
        _train(config, folder)
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    if digest != (folder / DIGEST).read_text():
        raise RuntimeError(
            f"{folder / WEIGHTS} has sha256 {digest}, not that of {DIGEST}; delete {folder} and run again"
        )
    kind: Any = config.model
    # The head and a reduced model start from the run's seed; everything is overwritten.
    base = load_base(kind.base, kind.width, seed=config.seed, scalar=True)
    base.model.load_state_dict(
        library("safetensors.torch", "the reward model").load_file(folder / WEIGHTS), strict=True
    )
    model = base.model.requires_grad_(False).eval()
    return Judge(model, base.tokenizer, digest, config.seq_len)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread, as runs of studies do, so that the weights do not depend on who trains them first."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train(config: TrainConfig, folder: Path) -> None:
    """Train a config and keep its weights; the digest is written last."""
    from experiments.interruption import Interruption, exit_code
    from experiments.storage import locked, write_atomic, write_json
    from experiments.train import DEFAULTS

    kind: Any = config.model
    with locked(folder), Interruption() as interruption, torch.random.fork_rng(devices=[]), one_thread():
        write_json(folder / "config.json", config.to_dict())
        run = kind.loop(config, folder, DEFAULTS, interruption)
        ending = run.go()
        write_json(folder / "status.json", ending)
        if ending["state"] == "interrupted":
            logger.warning("the reward model's training was stopped; the same command resumes it")
            raise SystemExit(exit_code(ending["signal"]))
        if ending["state"] != "finished":
            raise RuntimeError(f"the reward model's training is {ending['state']}, see {folder}; run it again")
        weights = {name: tensor.detach().contiguous() for name, tensor in run.model.state_dict().items()}
        library("safetensors.torch", "the reward model").save_file(weights, folder / WEIGHTS)
        digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
        write_atomic(folder / DIGEST, digest.encode())
        run.clear()
