"""How a trained guide wants to be asked: its control codes and its calibration, in a file beside its weights."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import cached_file


GUIDE_FILE = "gedi.json"


def guide_record(
    codes: Mapping[str, int], *, scale: float, bias: Mapping[str, float], length_normalise: bool
) -> dict[str, Any]:
    """What is worth keeping of a guide, as data.

    Args:
        codes: the control codes and their token ids, in the order of the classes.
        scale, bias: of the class logits; see [`~hf_logits.processors.GeDiLogitsProcessor`].
        length_normalise: whether the class logits are means over the tokens.
    """
    return {"codes": dict(codes), "scale": scale, "bias": dict(bias), "length_normalise": length_normalise}


def guide_settings(source: str | Path | Mapping[str, Any], *, desired: str, **hub: Any) -> dict[str, Any]:
    """Arguments of [`~hf_logits.processors.GeDiLogitsProcessor`] for a guide that was trained here.

    Args:
        source (`str`, `Path` or `Mapping`): the folder or the repository with the guide's weights, or its record.
        desired (`str`): the control code of the wanted class. All others are undesired.
        hub: `revision`, `token`, `cache_dir`, ..., as everywhere on the Hub.

    Returns:
        `dict[str, Any]`: `desired`, `undesired`, `scale`, `bias` and `length_normalise`, with token ids for codes.

    Raises:
        ValueError: no record there, one that does not make sense, or a code that the guide does not know.

    Example:

    ```python
    >>> guide = AutoModelForCausalLM.from_pretrained("me/guide")
    >>> processor = GeDiLogitsProcessor(guide, **guide_settings("me/guide", desired="positive"))
    ```
    """
    record = source if isinstance(source, Mapping) else read_guide(source, **hub)
    codes = record["codes"]
    if desired not in codes:
        raise ValueError(f"The guide has no control code {desired!r}: its codes are {list(codes)}.")
    return {
        "desired": codes[desired],
        "undesired": [token for code, token in codes.items() if code != desired],
        "scale": record["scale"],
        "bias": {codes[code]: value for code, value in record["bias"].items()},
        "length_normalise": record["length_normalise"],
    }


def write_guide(folder: str | Path, record: Mapping[str, Any]) -> None:
    """Put a record beside the weights."""
    Path(folder, GUIDE_FILE).write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_guide(source: str | Path, **hub: Any) -> dict[str, Any]:
    """The record in a folder or a repository, checked. Arguments and errors as in [`guide_settings`]."""
    try:
        path = cached_file(str(source), GUIDE_FILE, **hub)
    except OSError as error:
        raise ValueError(
            f"{source} has no {GUIDE_FILE}, which GeDiTrainer saves with a guide: give scale and bias to the processor yourself."
        ) from error
    try:
        record = json.loads(Path(str(path)).read_text(encoding="utf-8"))
        sound = _is_sound(record)
    except (ValueError, TypeError, KeyError, AttributeError):
        sound = False
    if not sound:
        raise ValueError(f"{path} is not the record of a guide: it needs codes, scale, bias and length_normalise.")
    return record


def _is_sound(record: dict[str, Any]) -> bool:
    ids, numbers = list(record["codes"].values()), [record["scale"], *record["bias"].values()]
    return (
        len(set(ids)) == len(ids) > 1
        and all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids)
        and all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
        and set(record["bias"]) <= set(record["codes"])
        and isinstance(record["length_normalise"], bool)
    )
