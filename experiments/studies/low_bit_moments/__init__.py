"""Study: do first moments in eight or four bits train as well as in 32?

This protocol was written before the final runs. Only the screening, which uses other seeds, was seen before.

**Question.** Does a first moment in int8 or int4 change the validation loss that a given number of steps reaches?

**Runs.** A byte-level Llama of 902,272 parameters (dim 128, 4 layers, 4 query and 2 key-value heads, SwiGLU 416) on
enwik8, Adam-mini's default rules, 16 x 64 bytes a step, lr 3e-3, betas (0.9, 0.95), weight decay 0.1, gradient clip 1,
linear warm-up over 10 % of the steps and linear decay to zero. Nothing is tuned for any arm. Runs of one seed start
from the same weights and see the same batches in the same order. The loss is the mean over the same 65,536 held-out
bytes, in nats.

**Screening** (seeds 100, 101, 102; 300 steps): code maps, roundings, block sizes and scale dtypes; some also at three
times the learning rate. **Stability** (seconds): the same roundings on quadratics, from small steps to the largest at
which exact momentum is stable. The shipped formats are chosen by loss, stability and bytes, and by cost in a tie.

**Final** (seeds 0 to 7; 1,000 steps): ``fp32``, ``int8``, ``int4`` as shipped, and ``twin``: fp32 moments from weights
that differ from the others' in the sixth digit. ``twin`` shows by how much two equivalent runs differ.

**Rule.** For each format, over the eight seeds, the paired differences d = loss(format) - loss(fp32): their mean, its
standard error, the 95 % t-interval. The format passes when

1. abs(mean) <= 2 standard errors, and
2. the upper end of the interval is below 0.02 nats (a hundredth of a loss near 2), so that noise alone cannot pass.

All eight seeds count; a diverged run fails its format. No run is repeated or left out for its result.

    python -m experiments.studies.low_bit_moments                 # all stages; finished runs are not repeated
    python -m experiments.studies.low_bit_moments --only final    # one stage
"""
