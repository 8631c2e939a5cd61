"""What a tokenizer.json says, in a form that can be compared."""

import hashlib
import json
from typing import Any

import tokenizers

FINGERPRINT_KEY = "gidd_jax_fingerprint"  # in the saved config


def unknown_id(spec: dict[str, Any]) -> int | None:
    """The id of what the model of a tokenizer.json does not know, if there is one."""
    model = spec["model"]
    if "unk_id" in model:
        return model["unk_id"]
    token = model.get("unk_token")
    return None if token is None else model["vocab"].get(token)


def canonical(value: Any) -> Any:
    """A spec without what is null or false, which other versions of the library may leave out."""
    if isinstance(value, dict):
        return {k: canonical(v) for k, v in value.items() if v is not None and v is not False}
    return [canonical(v) for v in value] if isinstance(value, list) else value


def pairs(merges: list[Any]) -> list[Any]:
    """Return merges as pairs, however they are written."""
    return [m.split(" ", 1) if isinstance(m, str) else m for m in merges]


def digest(content: Any) -> str:
    """Return the SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def recorded_fingerprint(config: str | None) -> str | None:
    """Fingerprint in a saved tokenizer_config.json; None where an earlier version wrote it."""
    try:
        found = json.loads(config or "{}").get(FINGERPRINT_KEY)
    except (ValueError, AttributeError, RecursionError):
        return None
    return found if isinstance(found, str) else None


def without_tokens(backend: tokenizers.Tokenizer, size: int | None) -> str:
    """Return a backend's tokenizer.json without the tokens that were added from `size` on."""
    if size is None:
        return backend.to_str(pretty=True)
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] < size]
    return json.dumps(spec, indent=2, ensure_ascii=False)
