"""Save a decoding method, load it again, and see that it decodes the same.

    python examples/share_a_recipe.py                            # SmolLM2-135M from a wheel, offline, in a folder
    python examples/share_a_recipe.py --push you/less-flowery    # and then to the Hub

Anyone can then write `hf_logits.pipeline("text-generation", model=..., recipe="you/less-flowery")`.
"""

import argparse
import tempfile
from pathlib import Path

from smollm2 import load

from hf_logits.processors import MixtureLogitsProcessor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hub id or a folder, in place of SmolLM2-135M-Instruct")
    parser.add_argument("--folder", type=Path, help="where to save the recipe; default: a temporary folder")
    parser.add_argument("--push", metavar="REPO_ID", help="also push the recipe to this repository")
    arguments = parser.parse_args()

    model, tokenizer = load(arguments.model)
    inputs = tokenizer("The best thing about rain is", return_tensors="pt")
    negative = tokenizer("Answer in long, vague and flowery sentences.").input_ids
    by_hand = MixtureLogitsProcessor.cfg(model, negative, scale=1.5)

    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        by_hand.save_pretrained(folder, main_model=model)
        print(*sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()))
        loaded = MixtureLogitsProcessor.from_pretrained(folder, main_model=model)

    outputs = [
        model.generate(**inputs, max_new_tokens=24, do_sample=False, logits_processor=processors)[0]
        for processors in ([], [by_hand], [loaded])
    ]
    for name, output in zip(("plain", "by hand", "loaded"), outputs, strict=True):
        print(f"{name:8} {tokenizer.decode(output, skip_special_tokens=True)}")
    print(f"the same tokens: {outputs[1].equal(outputs[2])}")
    if arguments.push:
        print(by_hand.push_to_hub(arguments.push, main_model=model))


if __name__ == "__main__":
    main()
