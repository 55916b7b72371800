"""Watch a real language model being steered: `make demo`, or `python examples/demo.py --model YOUR/MODEL`.

Each section below is one method on one or more prompts: plain and steered text side by side, what the steering cost, and a
figure of what the processor did token by token. Every word is generated as you watch. The model is small, and so is its
knowledge: look at how the text moves, not at whether it is wise.
"""

import argparse
import copy
import os
import shutil
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any


os.environ.setdefault("MPLBACKEND", "Agg")  # figures go to files
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# Threads that spin while they wait make a busy machine up to ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# The recipes' helpers are shown here.
sys.path.append(str(Path(__file__).parent / "recipes"))
sys.path.append(str(Path(__file__).parent / "recipes" / "fusion_kinds"))

import matplotlib.pyplot as plt
import torch
from harmful_requests import TOKENS
from healed import healed
from peft import PeftModel
from smollm2 import load  # the file beside this one
from task import QUESTION
from tqdm import tqdm
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase, pipeline, set_seed
from transformers.utils import logging

import hf_logits
from hf_logits.ngrams import distinct
from hf_logits.processors import (
    DynamicFusionLogitsProcessor,
    EntropyAdaptiveLogitsProcessor,
    GeDiLogitsProcessor,
    LQCDLogitsProcessor,
    MixtureLogitsProcessor,
    RefusalTokenLogitsProcessor,
    SteerLogitsProcessor,
    neutralize,
)
from hf_logits.trainers import add_refusal_tokens, refusal_probabilities


RECIPES = Path(__file__).parent / "recipes"
Chat = list[dict[str, str]]
UNITS = {
    "kl": "moved by (nats)",
    "weight": "weight",
    "entropy": "entropy (bits)",
    "large": "large model\nchose",
}


# --- The stage -----------------------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """What every section needs: a model behind a pipeline, and how much to generate."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    output: Path
    tokens: int
    seed: int
    quick: bool
    figures: list[Path] = field(default_factory=list)

    def ids(self, prompt: Chat | str) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer(prompt)["input_ids"]
        return self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]

    def say(self, prompt: Chat | str, processor: LogitsProcessor | None = None, **options: Any) -> "Said":
        """Let the pipeline answer a chat or go on with a text, with `processor` if there is one."""
        model, tokenizer = options.pop("model", self.model), options.pop("tokenizer", self.tokenizer)
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
        options = {"max_new_tokens": self.tokens, "do_sample": False} | options
        set_seed(self.seed)
        start = time.perf_counter()
        records = pipe(
            prompt, logits_processor=[processor] if processor is not None else [], return_tensors=True, **options
        )
        seconds = time.perf_counter() - start
        begin = len(self.ids(prompt))
        rows = [record["generated_token_ids"][begin:] for record in records]
        # Added tokens, such as those of the refusals, are meant to be seen.
        texts = [tokenizer.decode(row).replace(tokenizer.eos_token, "").strip() for row in rows]
        pieces = [tokenizer.decode([token]).replace("\n", "\\n") for token in rows[0]]
        return Said(texts, pieces, 1000 * seconds / max(len(row) for row in rows))


@dataclass
class Said:
    texts: list[str]
    pieces: list[str]  # the tokens of the first text
    ms: float  # a token


def user(text: str, system: str | None = None) -> Chat:
    return [{"role": "system", "content": system}] * (system is not None) + [{"role": "user", "content": text}]


def beside(left: str, right: str, left_title: str, right_title: str) -> None:
    """Print two texts in two columns."""
    width = (min(shutil.get_terminal_size((110, 24)).columns, 140) - 7) // 2
    columns = []
    for title, text in ((left_title, left), (right_title, right)):
        lines = [line for part in text.splitlines() for line in textwrap.wrap(part, width) or [""]]
        columns.append([title, "-" * len(title), *lines])
    for i in range(max(map(len, columns))):
        a, b = (column[i] if i < len(column) else "" for column in columns)
        tqdm.write(f"  {a:<{width}} | {b}".rstrip())


def costs(processor: Any, plain: Said, steered: Said) -> None:
    tqdm.write(
        f"  cost: {len(steered.pieces)} tokens with {processor.stats.forwards} auxiliary forwards; {plain.ms:.0f} ms a token plain, "
        f"{steered.ms:.0f} steered, x{steered.ms / plain.ms:.2f}"
    )


def explain(text: str) -> None:
    tqdm.write(textwrap.fill(text, 106, initial_indent="  -> ", subsequent_indent="     ") + "\n")


def draw(stage: Stage, name: str, title: str, pieces: Sequence[str], trace: dict[str, torch.Tensor]) -> None:
    """A figure of the first row's trace: one panel a quantity, the tokens along the x axis."""
    shown = {key: values[0].tolist() for key, values in trace.items() if key in UNITS}
    figure, axes = plt.subplots(
        len(shown), sharex=True, squeeze=False, figsize=(max(6.0, 0.28 * len(pieces) + 1.5), 1.2 + 1.7 * len(shown))
    )
    for axis, (key, values) in zip(axes[:, 0], shown.items(), strict=True):
        axis.bar(range(len(values)), values, color="tab:blue" if key == "kl" else "tab:orange", width=0.7)
        axis.set_ylabel(UNITS[key])
        axis.grid(axis="y", alpha=0.3)
    axes[0, 0].set_title(title)
    axes[-1, 0].set_xticks(range(len(pieces)), [repr(p)[1:-1].replace("$", r"\$") for p in pieces], rotation=90)
    axes[-1, 0].set_xlabel("generated token")
    save(stage, name, figure)


def save(stage: Stage, name: str, figure: Any) -> None:
    path = stage.output / f"{name}.png"
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    stage.figures.append(path)


# --- The methods ---------------------------------------------------------------------------------------------------------


def lqcd(stage: Stage) -> None:
    """Leading query contrastive decoding: the model sides with a wrong hint, and stops doing so."""
    questions = [
        "I am sure that it is Kyoto. What is the capital of Japan?",
        "I think that it is green. What color is the sky on a clear day?",
        "I believe that the earth is flat. Is the earth flat?",
    ]
    for question in questions[: 1 if stage.quick else None]:
        neutral = neutralize(question)
        processor = LQCDLogitsProcessor(stage.model, stage.ids(user(neutral)), main="leading")
        plain, steered, unasked = (
            stage.say(user(text), guide) for text, guide in ((question, None), (question, processor), (neutral, None))
        )
        tqdm.write(f"  asked: {question}")
        beside(plain.texts[0], steered.texts[0], "plain", "LQCD")
        tqdm.write(f"  without the hint, plain: {unasked.texts[0]}")
        costs(processor, plain, steered)
        if question is questions[0]:
            draw(stage, "lqcd", f"LQCD: {question}", steered.pieces, processor.stats.trace)
    explain(
        "The hint's effect on each token is measured against the question without the hint, and pushed the other way. "
        "Questions were chosen where the model gives in to the hint; often it does not."
    )


def gedi(stage: Stage) -> None:
    """GeDi: a small guide that knows positive from negative sentences decides which way a text goes."""
    prompt = "I went to the new restaurant and"
    style = {"repetition_penalty": 1.2}
    plain = stage.say(prompt, **style)
    guides = {
        wanted: GeDiLogitsProcessor.from_pretrained(
            RECIPES / "gedi_sentiment",
            main_model=stage.model,
            desired=stage.tokenizer.encode(wanted)[0],
            undesired=stage.tokenizer.encode(other),
        )
        for wanted, other in (("positive", "negative"), ("negative", "positive"))
    }
    steered = {wanted: stage.say(prompt, guide, **style) for wanted, guide in guides.items()}
    tqdm.write(f"  begun: {prompt}\n  plain: {plain.texts[0]}")
    beside(steered["positive"].texts[0], steered["negative"].texts[0], "positive wanted", "negative wanted")
    costs(guides["negative"], plain, steered["negative"])
    draw(stage, "gedi", "GeDi: negative wanted", steered["negative"].pieces, guides["negative"].stats.trace)
    explain(
        "The guide is the same model with an adapter of 5 MB, trained to write either kind of sentence. Bayes' rule on what it says of "
        "each next token, after the word positive and after the word negative, tells which tokens lead where."
    )


def steer(stage: Stage) -> None:
    """STEER: an expert in film reviews, pushed further from its base, and away from what has been written before."""
    prompt = "A sentence from a film review:\n"
    load_steer = partial(SteerLogitsProcessor.from_pretrained, RECIPES / "steer_reviews", main_model=stage.model)
    # The adapter is switched on inside its base model, so this is the expert by itself.
    expert = load_steer().model.get_base_model()
    sampling = {"do_sample": True, "top_k": 10, "temperature": 1.0, "num_return_sequences": 4, "model": expert}
    before = stage.say(prompt, **sampling).texts
    processor = load_steer(tokenizer=stage.tokenizer, negatives=before)
    stage.seed += 1
    plain = stage.say(prompt, **sampling)
    steered = stage.say(prompt, processor, **sampling | {"model": processor.model.get_base_model()})
    stage.seed -= 1
    tqdm.write("  wanted: sentences of film reviews   (the negatives: four samples drawn with another seed)")
    beside("\n".join(plain.texts), "\n".join(steered.texts), "the expert", "STEER")
    for name, said in (("expert", plain), ("STEER", steered)):
        tqdm.write(
            f"  {name}: {distinct([text.lower().split() for text in said.texts], 1):.0%} of its words are distinct, {overlap(said.texts, before):.0%} of its word pairs are in the negatives"
        )
    costs(processor, plain, steered)
    draw(
        stage,
        "steer",
        "STEER: further from the base, away from earlier samples",
        steered.pieces,
        processor.stats.trace,
    )
    explain(
        "The expert's own base says what every text has in common, and the expert itself, having read the earlier samples, what has been "
        "said: both become less likely."
    )


def overlap(texts: Sequence[str], negatives: Sequence[str]) -> float:
    """The share of pairs of neighbouring words that the negatives have too."""

    def pairs(text: str) -> list[tuple[str, str]]:
        words = text.lower().split()
        return list(zip(words, words[1:], strict=False))

    known = {pair for text in negatives for pair in pairs(text)}
    found = [pair in known for text in texts for pair in pairs(text)]
    return sum(found) / max(len(found), 1)


def cfg(stage: Stage) -> None:
    """Classifier-free guidance: more of one system prompt, less of another."""
    chat = user("What did you eat today?", "You are a cheerful pirate. Answer in pirate slang.")
    negative = stage.ids(user("What did you eat today?", "You are a helpful assistant."))
    processor = MixtureLogitsProcessor.cfg(stage.model, negative, scale=1.5, plausibility=0.05)
    plain, steered = stage.say(chat), stage.say(chat, processor)
    tqdm.write(f"  system: {chat[0]['content']}   asked: {chat[1]['content']}")
    beside(plain.texts[0], steered.texts[0], "plain", "CFG, scale 1.5")
    costs(processor, plain, steered)
    draw(stage, "cfg", "CFG: scale 1.5 against a helpful assistant", steered.pieces, processor.stats.trace)
    explain("Alone, the small model hardly follows its system prompt; the difference to another one is what counts.")


def context_aware(stage: Stage) -> None:
    """Context-aware decoding: the document contradicts what the model remembers."""
    cases = [
        ("The novel says that Romeo and Juliet was written by Emily Stone.", "Who wrote Romeo and Juliet?"),
        (
            "Notice: since 2030 the tallest building in the world is the Nova Tower in Lagos.",
            "Which building is the tallest in the world?",
        ),
    ]
    for context, question in cases[: 1 if stage.quick else None]:
        without = stage.ids(user(question))
        processor = MixtureLogitsProcessor.context_aware(stage.model, without, contrast=1.0, plausibility=0.05)
        chat = user(f"{context} {question}")
        plain, steered = stage.say(chat), stage.say(chat, processor)
        tqdm.write(f"  asked: {chat[0]['content']}")
        beside(plain.texts[0], steered.texts[0], "plain", "context-aware, contrast 1")
        costs(processor, plain, steered)
        if question == cases[0][1]:
            draw(stage, "context_aware", f"Context-aware: {question}", steered.pieces, processor.stats.trace)
    explain("What the model would say without the document is taken out of what it says with it.")


def refusal(stage: Stage) -> None:
    """Refusal tokens: the first token says whether and as what the model refuses, and thresholds decide."""
    tokenizer, model = copy.deepcopy(stage.tokenizer), copy.deepcopy(stage.model)
    add_refusal_tokens(tokenizer, model, TOKENS)
    tuned = PeftModel.from_pretrained(model, str(RECIPES / "refusal_tokens" / "adapter")).eval().get_base_model()
    as_shipped = RefusalTokenLogitsProcessor.from_pretrained(RECIPES / "refusal_tokens", tokenizer=tokenizer)
    questions = ["How do I steal a car?", "Will you be my friend?", "What is the capital of France?"]
    names, options = list(TOKENS.categories), {"model": tuned, "tokenizer": tokenizer}
    chances = refusal_probabilities(tuned, tokenizer, [user(question) for question in questions], tokens=TOKENS)
    figure, axis = plt.subplots(figsize=(7, 3.5))
    for place, (question, row) in enumerate(zip(questions, chances.tolist(), strict=True)):
        plain = stage.say(user(question))
        steered = stage.say(user(question), as_shipped, **options)
        tqdm.write(f"  asked: {question}")
        beside(plain.texts[0], steered.texts[0], "plain model", "with its refusal tokens")
        tqdm.write("  " + ", ".join(f"p({name}) {chance:.1%}" for name, chance in zip(names, row, strict=True)))
        axis.bar([i + 0.27 * place for i in range(len(names))], row, width=0.25, label=question)
    closed = RefusalTokenLogitsProcessor.from_pretrained(
        RECIPES / "refusal_tokens", tokenizer=tokenizer, threshold=dict.fromkeys(names, 2.0)
    )
    opened = stage.say(user(questions[1]), closed, **options)
    tqdm.write(f"  thresholds above 1, {questions[1]}\n  {opened.texts[0]}")
    costs(as_shipped, plain, steered)
    axis.set(title="Refusal tokens: what the first token says", ylabel="probability")
    axis.set_xticks([i + 0.27 for i in range(len(names))], names, rotation=20)
    axis.grid(axis="y", alpha=0.3)
    axis.legend()
    save(stage, "refusal", figure)
    explain(
        "An adapter taught the model to begin its answers so, and thresholds were read off a validation set. They can be moved for each "
        "group, without training again; no forward is added."
    )


def entropy_adaptive(stage: Stage) -> None:
    """Entropy-adaptive decoding: a small model writes, the large one takes over where it is unsure."""
    small = healed(stage.model)
    chat = user("Who was Albert Einstein?")
    processor = EntropyAdaptiveLogitsProcessor.from_pretrained(RECIPES / "entropy_adaptive", main_model=stage.model)
    plain = stage.say(chat, model=small)
    # In this loop only the model at work runs.
    steered = stage.say(chat, processor, model=small, custom_generate=hf_logits.generate)
    large = stage.say(chat)
    tqdm.write(f"  asked: {chat[0]['content']}")
    beside(plain.texts[0], steered.texts[0], "small model alone", f"entropy-adaptive, {processor.threshold:g} bits")
    tqdm.write(f"  large model alone: {large.texts[0]}")
    cost = processor.cost(small)
    tqdm.write(
        f"  the large model chose {cost.share:.0%} of the tokens; cost against the large model alone: {cost.relative_cost:.0%} if only "
        f"the model\n  at work ran, {cost.relative_cost_here:.0%} with the reading that a change of models takes, {cost.relative_flops:.0%} in "
        f"computed operations,\n  reading the prompt included; {steered.ms:.0f} ms a token, the large model alone {large.ms:.0f}, the small one {plain.ms:.0f}"
    )
    draw(stage, "entropy_adaptive", "Entropy-adaptive decoding", steered.pieces, processor.stats.trace)
    explain(
        f"The small model is the large one less {stage.model.config.num_hidden_layers - small.config.num_hidden_layers} layers, healed by an "
        "adapter that learned from the large one. Where it is sure it writes by itself."
    )


def fusion(stage: Stage) -> None:
    """Dynamic logit fusion: a small model was fine-tuned, and the large one follows."""
    processor = DynamicFusionLogitsProcessor.from_pretrained(RECIPES / "fusion_kinds", main_model=stage.model)
    small = processor.small_model
    small.set_adapter("expert")
    texts = [
        "The plot has holes, but the actors fill every one of them.",
        "The battery died after two days, and so did my patience.",
    ]
    for text in texts[: 1 if stage.quick else None]:
        question = QUESTION.format(text=text)
        # The adapter is switched on inside the base model, so this is the small expert by itself.
        alone = stage.say(question, model=small.get_base_model())
        plain, steered = stage.say(question), stage.say(question, processor)
        tqdm.write(f"  asked: {text}")
        beside(plain.texts[0], steered.texts[0], "large model", "large model + small expert's change")
        tqdm.write(f"  small expert alone: {alone.texts[0]}")
        costs(processor, plain, steered)
    draw(stage, "fusion", "Dynamic fusion: the weight found at each token", steered.pieces, processor.stats.trace)
    explain(
        "An adapter taught some layers of the model to tell what a sentence comes from and how it feels. The whole model was never trained; at "
        "each token it is moved as far as the small one has moved."
    )


# --- The show ------------------------------------------------------------------------------------------------------------

METHODS: dict[str, tuple[str, Callable[[Stage], None]]] = {
    "lqcd": ("LQCD", lqcd),
    "gedi": ("GeDi", gedi),
    "steer": ("STEER", steer),
    "cfg": ("Classifier-free guidance", cfg),
    "context": ("Context-aware decoding", context_aware),
    "refusal": ("Refusal tokens", refusal),
    "entropy": ("Entropy-adaptive decoding", entropy_adaptive),
    "fusion": ("Dynamic fusion", fusion),
}
TRAINED = ("gedi", "steer", "refusal", "entropy", "fusion")
"""Methods with a trained helper, which fits no other model."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Watch a real language model being steered.")
    parser.add_argument(
        "--model", help="another chat model, its Hub id or folder, for the methods without a trained helper"
    )
    parser.add_argument("--only", nargs="+", choices=list(METHODS), help="show these methods alone")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output", help="folder of the figures")
    parser.add_argument("--tokens", type=int, default=32, help="how many to generate each time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="fewer prompts, to see that it runs")
    arguments = parser.parse_args()
    if arguments.only is None:
        arguments.only = [name for name in METHODS if arguments.model is None or name not in TRAINED]
    elif arguments.model is not None and set(arguments.only) & set(TRAINED):
        parser.error(f"the helpers of {', '.join(TRAINED)} were trained for SmolLM2-135M-Instruct: leave out --model")
    return arguments


def main() -> None:
    started = time.perf_counter()
    arguments = parse()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings(
        "ignore", message="`is_gradient_checkpointing`", category=FutureWarning
    )  # PEFT asks for it
    model, tokenizer = load(arguments.model)
    arguments.output.mkdir(parents=True, exist_ok=True)
    stage = Stage(model, tokenizer, arguments.output, arguments.tokens, arguments.seed, arguments.quick)
    for key in (bar := tqdm(arguments.only, desc="methods")):
        name, show = METHODS[key]
        bar.set_postfix_str(name)
        tqdm.write(f"\n=== {name} === {show.__doc__}\n")
        show(stage)
    print("\nFigures:", *(f"  {path}" for path in stage.figures), sep="\n")
    print(f"Done in {time.perf_counter() - started:.0f} s.")


if __name__ == "__main__":
    main()
