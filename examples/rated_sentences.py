"""Sentences that people rated, for the examples that train.

They are those of the VADER paper (Hutto & Gilbert 2014): tweets, sentences of newspaper editorials, of reviews of products and of films,
each rated by about twenty people from -4 to 4. They come with the source package of vaderSentiment 0.5 (MIT licence, 2.4 MB), which pip
downloads once.
"""

import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path


SOURCE = "vaderSentiment-0.5.zip"


def rated_sentences(kinds: Iterable[str]) -> dict[str, list[tuple[str, float]]]:
    """Sentences and their mean ratings, by kind of text. `HF_LOGITS_CACHE` overrides `~/.cache/hf_logits`.

    Args:
        kinds: of `"tweets"`, `"nytEditorialSnippets"`, `"amazonReviewSnippets"`, `"movieReviewSnippets"`.
    """
    cache = Path(os.environ.get("HF_LOGITS_CACHE") or Path.home() / ".cache" / "hf_logits").expanduser()
    if not (cache / SOURCE).is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:  # the file appears whole, or not at all
            pip = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--no-binary",
                ":all:",
                "-d",
                folder,
            ]
            subprocess.run([*pip, "vaderSentiment==0.5"], check=True)
            os.replace(Path(folder) / SOURCE, cache / SOURCE)
    with zipfile.ZipFile(cache / SOURCE) as package:
        inner = package.read("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz")
    found = {}
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        for kind in kinds:
            file = archive.extractfile(f"hutto_ICWSM_2014/{kind}_GroundTruth.txt")
            rows = [line.split("\t", 2) for line in file.read().decode("utf-8", "replace").splitlines()]
            found[kind] = [(text.strip(), float(rating)) for _, rating, text in rows]
    return found
