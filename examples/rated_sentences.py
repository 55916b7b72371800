"""Sentences that people rated, for the examples that train.

They are those of the VADER paper (Hutto & Gilbert 2014): tweets, sentences of newspaper editorials, of reviews of products and of films,
each rated by about twenty people from -4 to 4. They come with the source package of vaderSentiment 0.5 (MIT licence, 2.4 MB), which pip
downloads once.
"""

import io
import tarfile
import zipfile
from collections.abc import Iterable

from packages import package_file


SOURCE = "vaderSentiment-0.5.zip"


def rated_sentences(kinds: Iterable[str]) -> dict[str, list[tuple[str, float]]]:
    """Sentences and their mean ratings, by kind of text.

    Args:
        kinds: of `"tweets"`, `"nytEditorialSnippets"`, `"amazonReviewSnippets"`, `"movieReviewSnippets"`.
    """
    path = package_file("vaderSentiment", "0.5", SOURCE, source=True)
    with zipfile.ZipFile(path) as package:
        inner = package.read("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz")
    found = {}
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        for kind in kinds:
            file = archive.extractfile(f"hutto_ICWSM_2014/{kind}_GroundTruth.txt")
            rows = [line.split("\t", 2) for line in file.read().decode("utf-8", "replace").splitlines()]
            found[kind] = [(text.strip(), float(rating)) for _, rating, text in rows]
    return found
