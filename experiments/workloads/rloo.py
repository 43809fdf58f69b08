"""The same training as ``remax`` by TRL's RLOO trainer, whose loop, sampling and loss are its own.

RLOO (Ahmadian et al., arXiv 2402.14740) draws several answers to a request. The baseline of each is the mean reward of
the others. TRL subtracts beta times the log ratio of the whole answer from the reward, so that the objective is that of
ReMax. Requests, reward model, reference and held-out numbers are those of ``remax``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from experiments.parallel import Team

from . import opinions
from .bases import load_base
from .libraries import library
from .remax import RATES, RUN, SMOKE, ReMax, Rewarded, nothing_to_learn, trained_score
from .workload import Workload

if TYPE_CHECKING:
    from experiments.configs import TrainConfig
    from experiments.interruption import Interruption
    from experiments.train import Options

    from .trl_loop import TrainerLoop


@dataclass(frozen=True)
class LeaveOneOut(ReMax):
    """A policy that is trained by TRL's RLOO trainer; the fields are those of ``ReMax``."""

    def require_consistent(self) -> None:
        """Check the fields.

        Raises:
            ValueError: the base is unknown, a number is out of range, or there is no answer to leave out.
        """
        super().require_consistent()
        if self.rollouts < 2:
            raise ValueError(f"rollouts={self.rollouts} must be at least 2: the others are an answer's baseline")
        if self.one_step:
            raise ValueError("one_step=True is for ReMax; TRL's trainer counts the log ratios of whole answers")

    def fetch(self, config: TrainConfig) -> None:
        """Check that libraries, weights and the reward model are there, and make what is missing.

        Raises:
            ValueError: the data is unknown.
            RuntimeError: a library or weights are missing.
        """
        for name in ("trl", "datasets"):
            library(name, "RLOO")
        super().fetch(config)

    @staticmethod
    def loop(config: TrainConfig, folder: Path, options: Options, interruption: Interruption) -> TrainerLoop:
        """Return the loop that trains it."""
        from .trl_loop import TrainerLoop

        device = Team.here(options.parallel, options.device, config.batch).device
        return TrainerLoop(config, folder, options, interruption, LeavingOut(config, config.model, device))


class LeavingOut(Rewarded):
    """What ``Rewarded`` judges, trained by TRL.

    Args:
        config: the run.
        kind: what it trains.
        device: where the reference and held-out requests are kept.

    Raises:
        ValueError: as for ``Rewarded``.
    """

    def __init__(self, config: TrainConfig, kind: Any, device: torch.device) -> None:
        policy = load_base(kind.base, kind.width, seed=config.seed)
        super().__init__(config, kind, policy, *trained_score(), device)
        self.examples = len(opinions.TRAINING)

    def trainer(self, rows: list[int], arguments: dict[str, Any], **options: Any) -> Any:
        """Return TRL's trainer. A step takes ``rollouts`` answers to each of the config's batch of requests."""
        trl, kind = library("trl", "RLOO"), self.kind
        answers = arguments["per_device_train_batch_size"] * kind.rollouts
        args = trl.RLOOConfig(
            **{**arguments, "per_device_train_batch_size": answers},
            num_generations=kind.rollouts,
            max_completion_length=kind.new_tokens,
            beta=kind.beta,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            shuffle_dataset=False,
        )
        asked = opinions.requests(opinions.TRAINING)
        conversations = [{"prompt": [{"role": "user", "content": asked[row]}]} for row in rows]
        data = library("datasets", "RLOO").Dataset.from_list(conversations)
        with tempfile.TemporaryDirectory() as folder:
            if kind.width:  # TRL loads the reference from where the policy came from, and this one comes from nowhere
                self.model.save_pretrained(folder)
                self.model.config.name_or_path = folder
            return trl.RLOOTrainer(
                self.model, self.judged, args, train_dataset=data, processing_class=self.tokenizer, **options
            )

    def judged(self, completions: Sequence[Any], **_: Any) -> list[float]:
        """Return the rewards of TRL's answers, which are conversations of one message.

        If all are equal, ``stopped`` says so, and the run ends after the step.

        Raises:
            RuntimeError: a reward is not finite.
        """
        found = self.score([answer[0]["content"].strip() for answer in completions]).float()
        if reason := nothing_to_learn(found):
            self.stop(reason)
        return [float(reward) for reward in found]


RLOO = Workload(
    {**RUN, "model": LeaveOneOut(**vars(RUN["model"]))},
    {**SMOKE, "model": LeaveOneOut(**vars(SMOKE["model"]))},
    RATES,
    ("elementwise", "adam_mini"),
)
