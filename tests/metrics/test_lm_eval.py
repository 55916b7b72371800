"""The accuracies and the Brier score against lm-eval's own code, read out of its package where that has been downloaded.

The package is what examples/evaluate_a_steered_model.py takes its questions from. Nothing is downloaded or installed here: without
the file these tests are skipped, and the formulas stay checked as they are written in the tests of each metric.
"""

import ast
import os
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hf_logits.metrics.attentiveness import attentiveness
from hf_logits.metrics.mcq_chain import mcq_chain


CACHE = Path(os.environ.get("HF_LOGITS_CACHE") or Path.home() / ".cache" / "hf_logits").expanduser()
WHEEL = CACHE / "lm_eval-0.4.13-py3-none-any.whl"

pytestmark = pytest.mark.skipif(not WHEEL.is_file(), reason=f"{WHEEL} has not been downloaded")


def taken(file: str, name: str, **known: Any) -> Any:
    """One function of the package, without its decorators and annotations; of several of a name the one that speaks of bytes."""
    with zipfile.ZipFile(WHEEL) as package:
        tree = ast.parse(package.read(file))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name]
    node = next((one for one in found if "acc_bytes" in ast.unparse(one)), found[0])
    node.decorator_list, node.returns = [], None
    for argument in node.args.args:
        argument.annotation = None
    space: dict[str, Any] = {"np": np, **known}
    exec(compile(ast.fix_missing_locations(ast.Module([node], [])), file, "exec"), space)
    return space[name]


WORDS = ["a", "dozen", "na\u00efve", "\u4e8c\u5341", "five words"]
NAMES = {
    "acc": "accuracy",
    "acc_norm": "accuracy_char",
    "acc_bytes": "accuracy_byte",
    "acc_mutual_info": "accuracy_pmi",
}


def test_the_numbers_are_those_of_lm_eval() -> None:
    softmax = taken("lm_eval/utils.py", "softmax")
    process = taken("lm_eval/api/task.py", "process_results", utils=SimpleNamespace(softmax=softmax), eval_logger=None)
    brier = taken("lm_eval/api/metrics.py", "brier_score")
    rng = np.random.default_rng(0)
    values = np.log(rng.dirichlet(np.ones(6), 80))[:, :5]
    prior = -rng.exponential(2.0, (80, 5))
    gold = rng.integers(0, 5, 80).tolist()
    names = [*NAMES, "brier_score"]
    means, scores = dict.fromkeys(NAMES, 0.0), []
    for row, other, right in zip(values, prior, gold, strict=True):
        task = SimpleNamespace(
            OUTPUT_TYPE="multiple_choice",
            config=SimpleNamespace(process_results=None),
            _metric_fn_list=dict.fromkeys(names),
            multiple_input=False,
            multiple_target=False,
            doc_to_choice=lambda doc: WORDS,
            doc_to_target=lambda doc, right=right: right,
        )
        found = process(task, {}, [(one, False) for one in [*row, *other]])
        for key in NAMES:
            means[key] += found[key] / len(gold)
        scores.append(found["brier_score"])
    lengths = {"chars": [[len(one) for one in WORDS]] * 80, "bytes": [[len(one.encode()) for one in WORDS]] * 80}
    ours = attentiveness(values, gold, prior_logprobs=prior, lengths=lengths)
    assert {key: ours[name] for key, name in NAMES.items()} == pytest.approx(means, abs=1e-12)
    assert len({round(one, 9) for one in means.values()}) == 4
    assert mcq_chain(values, gold)["brier"] == pytest.approx(brier(scores), abs=1e-12)
