"""Whether a run that continues gives texts the ids that it gave them before."""

from absl import logging

from gidd_jax.checkpoints.checkpoint import Checkpoint
from gidd_jax.data.tokenizer import Tokenizer
from gidd_jax.data.tokenizer_files import CONFIG_FILE
from gidd_jax.data.tokenizer_spec import recorded_fingerprint
from gidd_jax.errors import InputError
from gidd_jax.settings import Settings


def check_same_tokenizer(checkpoint: Checkpoint, tokenizer: Tokenizer, settings: Settings) -> None:
    """Raise InputError when the run's tokenizer is not what it was when the step was written.

    Where data.tokenizer names another one it only warns: someone insisted on another config.
    """
    recorded = recorded_fingerprint(checkpoint.tokenizer_files().get(CONFIG_FILE))
    # Earlier versions wrote none; what transformers made of their files decides.
    if recorded is None:
        is_same = tokenizer.gives_ids_of(checkpoint.tokenizer())
    else:
        is_same = tokenizer.has_fingerprint(recorded)
    if is_same:
        return
    name = settings.data.tokenizer
    if checkpoint.config()["data"]["tokenizer"] != name:
        logging.warning("data.tokenizer=%s is another tokenizer than before", name)
        return
    raise InputError(
        f"the tokenizer data.tokenizer={name} is not what it was when the checkpoint was written: "
        "restore it, or use the run's own copy, WORKDIR/tokenizer, with --allow_config_change"
    )
