"""Run tasks of EleutherAI's lm-evaluation-harness on a trained model: pip install gidd-jax[harness]

All arguments are those of the harness's own command lm_eval, which knows the model gidd_jax here.

Examples:
  python -m gidd_jax.harness --model gidd_jax --model_args checkpoint=RUN --tasks piqa \\
      --batch_size 32 --output_path results
  python -m gidd_jax.harness --model gidd_jax --tasks my_task --include_path my_tasks \\
      --model_args checkpoint=RUN,ema=True,num_samples_t=128,num_steps=64 --gen_kwargs top_p=0.9

--model_args:
  checkpoint     a run, one of its checkpoints, a Hugging Face folder or owner/name, or a
                 checkpoint of the original
  allow_code     run the process code recorded in the checkpoint (default: False)
  process        FILE.py:CLASS to run instead
  ema            the moving average of the parameters (default: False)
  num_samples_t  times behind the bound of a diffusion model (default: 32)
  estimator      bound, chain or importance (default: bound), with num_orders, chain_order,
                 num_paths and path_steps, as in gidd_jax.evaluate
  check_greedy   whether to answer is_greedy (default: True); False is faster, and enough for
                 multiple choice and perplexity
  seed           of times, noise and sampling (default: 0)
  method, num_steps, grid, top_p, ...  options of the sampler, as in gidd_jax.sample; --gen_kwargs
                 and tasks override them, and set temperature (0 by default)

Log-likelihoods are exact for autoregressive models, and lower bounds for diffusion: perplexities
are then upper bounds, and choices are ranked by noisy bounds, the less so the more num_samples_t.
For the harness's options see lm_eval run --help; --batch_size is 1 unless given.
"""

from gidd_jax.cli import run
from gidd_jax.errors import InputError


def main(argv: list[str]) -> None:
    del argv  # the harness reads the command line itself
    try:
        import lm_eval.models  # noqa: F401  # pyright: ignore[reportMissingImports]
        from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]
        from lm_eval.api.registry import model_registry  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError("no lm_eval: pip install 'gidd-jax[harness]'") from error

    model_registry.register("gidd_jax", target="gidd_jax.evaluation.harness_model:HarnessModel")
    cli_evaluate()


if __name__ == "__main__":
    run(main)
