"""Draw texts from a trained model: a checkpoint of GIDD, MDLM or the autoregressive baseline.

Examples:
  python -m gidd_jax.sample --checkpoint=outputs/quickstart --num_samples=4 --num_steps=128
  python -m gidd_jax.sample --checkpoint=RUN --prompt="It was" --top_p=0.9
  python -m gidd_jax.sample --checkpoint=TUNED --chat --prompt="Who wrote Emma?"
  python -m gidd_jax.sample --checkpoint=RUN --num_samples=4 --replay=replay.html --watch

The npz file holds `ids` (int32 [N, L]), `texts` (their bytes and, in `texts_ends`, where each ends:
gidd_jax.data.texts.read_texts reads them), `log_probs` and `drawn_at` (of each token: its
log-probability in the network call that put it there, and the number of that step),
`network_calls`, `stopped_at` (calls after which a text was done) and the fingerprint of the
tokenizer. --replay writes a page that plays how the
texts came about, call by call; --trace the file behind it (see gidd_jax.replay).
"""

from gidd_jax.cli import CommandFlags, printable, run
from gidd_jax.errors import InputError
from gidd_jax.model_flags import checkpoint_flag, code_flags, dtype_flag
from gidd_jax.parallel.distributed import distributed_flags
from gidd_jax.sampling.options import GRIDS, METHODS, NOISE_TIMES, ORDERS, SamplerOptions

flags = CommandFlags()
CHECKPOINT = checkpoint_flag(flags)
NUM_SAMPLES = flags.DEFINE_integer(
    "num_samples", None, "Sequences to draw. Default: 16, or one for each prompt.", lower_bound=1
)
PROMPT = flags.DEFINE_multi_string("prompt", [], "A text to continue")
CHAT = flags.DEFINE_bool("chat", False, "Write --prompt, a message, by the chat template.")
OUT = flags.DEFINE_string("out", None, "File to write, ending in .npz.")
TRACE = flags.DEFINE_string("trace", None, "File for every change on the way, ending in .npz.")
REPLAY = flags.DEFINE_string("replay", None, "Page that plays the changes, ending in .html.")
WATCH = flags.DEFINE_bool("watch", False, "Play the changes in the terminal.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Sequences drawn together.", lower_bound=1)
LENGTH = flags.DEFINE_integer("length", None, "Tokens per sequence. Default: the context.")
NEW_TOKENS = flags.DEFINE_integer(
    "new_tokens",
    None,
    "Tokens after each --prompt; by blocks also beyond the context. Default: up to --length.",
    lower_bound=1,
)
SEED = flags.DEFINE_integer("seed", 0, "Seed; the same seed draws the same texts.", lower_bound=0)
EMA = flags.DEFINE_bool("ema", False, "Use the moving average of the parameters.")
DTYPE = dtype_flag(flags)
CODE = code_flags(flags)
DISTRIBUTED = distributed_flags(flags)

# The rest are fields of SamplerOptions; what is not given keeps the default there.
OPTIONS = {
    "num_steps": flags.DEFINE_integer(
        "num_steps",
        None,
        f"Denoising steps, each at most one network call. Default: {SamplerOptions.num_steps}.",
    ),
    "method": flags.DEFINE_enum(
        "method", None, METHODS, f"Sampler. Default: {SamplerOptions.method}."
    ),
    "grid": flags.DEFINE_enum(
        "grid", None, GRIDS, "How steps are spaced; `reference` is the original code's grid."
    ),
    "temperature": flags.DEFINE_float(
        "temperature", None, "Temperature of x_hat; 0 takes the most probable token."
    ),
    "top_k": flags.DEFINE_integer("top_k", None, "Draw from the top_k most probable tokens."),
    "top_p": flags.DEFINE_float("top_p", None, "Draw from the most probable tokens of this sum."),
    "min_p": flags.DEFINE_float("min_p", None, "Drop tokens below this posterior probability."),
    "block_length": flags.DEFINE_integer(
        "block_length", None, "Generate blocks of so many tokens from left to right."
    ),
    "reopen": flags.DEFINE_integer(
        "reopen",
        None,
        "With blocks: noise each finished block with so many before it, and denoise them together.",
    ),
    "reopen_at": flags.DEFINE_float(
        "reopen_at", None, f"reopen: time to noise to. Default: {SamplerOptions.reopen_at}."
    ),
    "stop_at_end": flags.DEFINE_bool(
        "stop_at_end", None, "With blocks: a text ends with its end token. Default: it goes on."
    ),
    "tokens_per_step": flags.DEFINE_integer(
        "tokens_per_step", None, "method=mode_seeking: tokens redrawn in a step."
    ),
    "noise_at": flags.DEFINE_enum(
        "noise_at",
        None,
        NOISE_TIMES,
        "method=mode_seeking: how probable it is that a token is noise, at the time of the step or "
        f"as in the prior. Default: {SamplerOptions.noise_at}.",
    ),
    "order": flags.DEFINE_enum(
        "order",
        None,
        ORDERS,
        "method=confidence: lift the masks of least entropy first, or those whose drawn tokens are "
        f"most probable. Default: {SamplerOptions.order}.",
    ),
    "epsilon": flags.DEFINE_float(
        "epsilon",
        None,
        "method=entropy_bound: nats of dependence that tokens drawn together may lose. Default: "
        f"{SamplerOptions.epsilon}.",
    ),
    "edit_above": flags.DEFINE_float(
        "edit_above", None, "method=entropy_bound: draw anew what is wrong with more than this."
    ),
    "stop_after": flags.DEFINE_integer(
        "stop_after", None, "method=entropy_bound: stop a text whose guess stood so many calls."
    ),
    "stop_entropy": flags.DEFINE_float(
        "stop_entropy",
        None,
        "method=entropy_bound: and its mean entropy is below this, in nats. Default: "
        f"{SamplerOptions.stop_entropy}.",
    ),
    "sweeps": flags.DEFINE_integer(
        "sweeps", None, "method=gibbs: of each 1 + sweeps calls one is a step, the others redraw."
    ),
    "sweep_below": flags.DEFINE_float(
        "sweep_below",
        None,
        "method=gibbs: redraw only after steps that end at this time or below; 0: after the last.",
    ),
    "rho": flags.DEFINE_float("rho", None, "method=gibbs: share of the tokens that are redrawn."),
    "guidance": flags.DEFINE_float(
        "guidance", None, "Weight of --prompt; above 1 exaggerates it, at twice the network calls."
    ),
    "kappa": flags.DEFINE_float("kappa", None, "method=psi: weight of the posterior."),
    "eta": flags.DEFINE_float("eta", None, "method=remdm_*: strength of remasking."),
    "loop_from": flags.DEFINE_float("loop_from", None, "method=remdm_loop: start of the loop."),
    "loop_to": flags.DEFINE_float("loop_to", None, "method=remdm_loop: end of the loop."),
    "loop_alpha": flags.DEFINE_float("loop_alpha", None, "method=remdm_loop: alpha in the loop."),
}


def main(argv: list[str]) -> None:
    del argv
    from rich.console import Console

    from gidd_jax.inference.samples import check_apart, check_output, save_samples
    from gidd_jax.views.watch import check_terminal, watch

    out = check_output(OUT.value, ".npz") if OUT.value else None
    trace_file = check_output(TRACE.value, ".npz", "--trace") if TRACE.value else None
    page = check_output(REPLAY.value, ".html", "--replay") if REPLAY.value else None
    check_apart(out=out, trace=trace_file)
    console = Console()
    if WATCH.value:
        check_terminal(console)
    given = {name: flag.value for name, flag in OPTIONS.items() if flag.value is not None}
    options = SamplerOptions(**given)
    num_samples = NUM_SAMPLES.value
    if PROMPT.value and num_samples is not None:
        raise InputError("give --num_samples or --prompt: each prompt gets one continuation")
    if CHAT.value and not PROMPT.value:
        raise InputError("--chat needs --prompt, the message to answer")
    if not PROMPT.value and num_samples is None:
        num_samples = 16

    is_writer = DISTRIBUTED.start()

    from gidd_jax.inference.gidd import Gidd
    from gidd_jax.views.replay_page import write_files

    model = Gidd.from_pretrained(CHECKPOINT.value, ema=EMA.value, dtype=DTYPE.value, **CODE.values)
    samples = model.generate(
        num_samples,
        prompts=PROMPT.value or None,
        chat=CHAT.value,
        batch_size=BATCH_SIZE.value,
        length=LENGTH.value,
        new_tokens=NEW_TOKENS.value,
        seed=SEED.value,
        trace=bool(trace_file or page or WATCH.value),
        options=options,
    )
    if not is_writer:
        return
    # Files first: nobody should lose them by leaving the replay.
    if out is not None:
        save_samples(out, samples, model.tokenizer)
        print(f"wrote {out}")
    if samples.trace is not None:
        for path in write_files(samples.trace, trace_file, page, f"Samples of {CHECKPOINT.value}"):
            print(f"wrote {path}")
        if WATCH.value:
            watch(samples.trace, console)
    for number, text in enumerate(samples.texts):
        print(f"--- sample {number} ---\n{printable(text)}\n")
    print(f"{samples.network_calls} network calls")
    first, last = int(samples.stopped_at.min()), int(samples.stopped_at.max())
    if first < last:
        print(f"the texts were done after {first} to {last} calls")
    if len(samples.texts) > 1 and (samples.ids == samples.ids[0]).all():
        cause = ": temperature=0 draws nothing" if options.temperature == 0 else ""
        print(f"note: all {len(samples.texts)} samples are the same{cause}")


if __name__ == "__main__":
    run(main, flags)
