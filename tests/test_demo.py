"""The demo runs, names every method and leaves its figures."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


DEMO = Path(__file__).parent.parent / "examples" / "demo.py"
METHODS = {
    "LQCD": "lqcd",
    "GeDi": "gedi",
    "STEER": "steer",
    "Classifier-free guidance": "cfg",
    "Context-aware decoding": "context_aware",
    "Refusal tokens": "refusal",
    "Entropy-adaptive decoding": "entropy_adaptive",
    "Dynamic fusion": "fusion",
}


@pytest.mark.real_model
@pytest.mark.slow
def test_the_demo_shows_every_method(tmp_path):
    result = subprocess.run(
        [sys.executable, str(DEMO), "--quick", "--tokens", "4", "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    for title, figure in METHODS.items():
        assert f"=== {title} ===" in result.stdout
        assert (tmp_path / f"{figure}.png").stat().st_size > 5000
        assert f"{figure}.png" in result.stdout
